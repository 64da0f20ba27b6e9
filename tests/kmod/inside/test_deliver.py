# SPDX-License-Identifier: MIT
"""Connections delivered to a listener that knows nothing, as if it had just accepted them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sockmi import image as images
from tests.kmod import nat_client
from tests.kmod.inside.test_module_claims import give_page, missing_page
from tests.kmod.inside.test_module_core import (
    CLOSE_WAIT,
    ESTABLISHED,
    FAMILIES,
    device,
    held,
    new_socket,
    read_exactly,
    state_of,
    tcp_info,
    wait_for,
)
from tests.kmod.module_client import (
    ANY_UID,
    NO_SLOT,
    PROBE,
    TRANSPARENT,
    Deliver,
    Device,
    End,
    Refusal,
    Refused,
    frozen,
)

__all__ = ["device"]
LOOPBACK = {"ipv4": "127.0.0.1", "ipv6": "::1", "mapped": "::ffff:127.0.0.1"}
WILDCARD = {"ipv4": "", "ipv6": "::", "mapped": "::"}
FIN, SYN, RST = 1, 2, 4
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def listener(family: str, *, wildcard: bool = False, backlog: int = 16, port: int = 0) -> socket.socket:
    """As any server makes it."""
    sock = new_socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(((WILDCARD if wildcard else LOOPBACK)[family], port))
    sock.listen(backlog)
    return sock


def connected(server: socket.socket, family: str) -> tuple[socket.socket, socket.socket]:
    """(ours, the peer's), ours accepted from ``server``."""
    peer = new_socket(family)
    peer.connect((LOOPBACK[family], server.getsockname()[1]))
    return server.accept()[0], peer


@contextlib.contextmanager
def taken(device: Device, ours: socket.socket) -> Iterator[bytes]:
    """The image of ``ours``, whose original is closed; what is sent meanwhile is dropped."""
    with held(ours), frozen(device, ours) as (freeze, image):
        device.commit(freeze)
        yield image
    ours.close()


def redeliver(device: Device, server: socket.socket, ours: socket.socket, **members: object) -> socket.socket:
    """``ours`` through ``server``'s accept()."""
    with taken(device, ours) as image:
        device.deliver(image, **members)
    server.settimeout(5)
    return server.accept()[0]


class Wire:
    """TCP flags and lengths of what crosses the loopback to or from a port, in order."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        self.sock.bind(("lo", 3))
        self.sock.setblocking(False)

    def flags(self) -> list[int]:
        """Of the packets until now."""
        seen = []
        time.sleep(0.05)
        while True:
            try:
                data, address = self.sock.recvfrom(65536)
            except BlockingIOError:
                return seen
            if address[2] == socket.PACKET_OUTGOING:
                continue
            header = 40 if data[0] >> 4 == 6 else (data[0] & 15) * 4
            source, dest = struct.unpack_from("!HH", data, header)
            if self.port in (source, dest):
                seen.append(data[header + 13])

    def close(self) -> None:
        self.sock.close()


# ---- What the application gets ----


@pytest.mark.parametrize("wildcard", [False, True], ids=["bound", "wildcard"])
@pytest.mark.parametrize("family", FAMILIES)
def test_accept_returns_the_connection_with_its_names(device: Device, family: str, wildcard: bool) -> None:
    server = listener(family, wildcard=wildcard)
    ours, peer = connected(server, family)
    names = ours.getsockname(), ours.getpeername()
    copy = redeliver(device, server, ours)
    assert (copy.getsockname(), copy.getpeername()) == names
    assert copy.family == server.family
    assert state_of(copy) == ESTABLISHED
    copy.sendall(b"from the copy")
    assert read_exactly(peer, 13) == b"from the copy"
    peer.sendall(b"from the peer")
    assert read_exactly(copy, 13) == b"from the peer"
    copy.close()
    assert peer.recv(1) == b""


def test_the_address_of_accept_is_the_peers(device: Device) -> None:
    server = listener("ipv4", wildcard=True)
    ours, peer = connected(server, "ipv4")
    with taken(device, ours) as image:
        device.deliver(image)
    server.settimeout(5)
    _unused, address = server.accept()
    assert address == peer.getsockname()


@pytest.mark.parametrize("family", FAMILIES)
def test_queues_and_sequence_numbers_go_on_exactly(device: Device, family: str) -> None:
    server = listener(family)
    ours, peer = connected(server, family)
    wire = Wire(server.getsockname()[1])
    peer.sendall(b"unread by the first owner ")
    wait_for(lambda: len(ours.recv(100, socket.MSG_PEEK)) == 26)
    with held(ours):
        # Both directions have something that the hold has dropped: it must come from the copy, or again.
        ours.sendall(b"sent, and lost ")
        with frozen(device, ours) as (freeze, image):
            before = images.decode(image)
            device.commit(freeze)
            device.deliver(image)
    server.settimeout(5)
    copy, _unused = server.accept()
    with frozen(device, copy) as (freeze, again):
        after = images.decode(again)
        device.abort(freeze)
    for member in ("iss", "irs", "snd_una", "write_seq", "copied_seq", "rcv_nxt"):
        if hasattr(before.sequence, member):
            assert getattr(after.sequence, member) == getattr(before.sequence, member), member
    peer.sendall(b"and more")
    assert read_exactly(copy, 34) == b"unread by the first owner and more"
    copy.sendall(b"and after")
    assert read_exactly(peer, 24) == b"sent, and lost and after"
    assert not [flags for flags in wire.flags() if flags & (SYN | RST | FIN)]
    wire.close()


def test_much_unsent_data_is_sent(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    ours.setblocking(False)
    data = bytes(range(256)) * 4096
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < len(data):
            sent += ours.send(data[sent:])
    copy = redeliver(device, server, ours)
    assert read_exactly(peer, sent) == data[:sent]
    copy.close()


def test_a_fin_of_the_peer_is_read(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    peer.sendall(b"last words")
    peer.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(ours) == CLOSE_WAIT)
    copy = redeliver(device, server, ours)
    assert read_exactly(copy, 10) == b"last words"
    assert copy.recv(1) == b""
    copy.sendall(b"answer")
    assert read_exactly(peer, 6) == b"answer"


def test_poll_epoll_and_a_blocked_accept_wake(device: Device) -> None:
    server = listener("ipv4")
    for way in ("epoll", "edge", "blocked"):
        ours, peer = connected(server, "ipv4")
        with taken(device, ours) as image:
            if way == "blocked":
                got: list[socket.socket] = []
                server.settimeout(None)
                thread = threading.Thread(target=lambda got=got: got.append(server.accept()[0]))
                thread.start()
                time.sleep(0.1)
                device.deliver(image)
                thread.join(5)
                copy = got[0]
            else:
                poller = select.epoll()
                poller.register(server, select.EPOLLIN | (select.EPOLLET if way == "edge" else 0))
                assert not poller.poll(0)
                device.deliver(image)
                assert [event & select.EPOLLIN for _unused, event in poller.poll(1)]
                copy, _unused = server.accept()
                poller.close()
        peer.sendall(b"x")
        assert read_exactly(copy, 1) == b"x"


def test_what_comes_before_accept_waits(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    with taken(device, ours) as image:
        device.deliver(image)
    peer.sendall(b"early")
    wait_for(lambda: tcp_info(peer)["unacked"] == 0)
    copy, _unused = server.accept()
    assert read_exactly(copy, 5) == b"early"


@pytest.mark.parametrize("option", ["defer", "fastopen", "cookies", "reuseport"])
def test_listeners_with_options(device: Device, option: str) -> None:
    server = new_socket("ipv4")
    if option == "reuseport":
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", 0))
    if option == "defer":
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
    if option == "fastopen":
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
    cookies = Path("/proc/sys/net/ipv4/tcp_syncookies")
    before = cookies.read_text()
    server.listen(16)
    try:
        if option == "cookies":
            cookies.write_text("2")
        peer = new_socket("ipv4")
        peer.connect(server.getsockname())
        peer.sendall(b"a")
        ours, _unused = server.accept()
        read_exactly(ours, 1)
        copy = redeliver(device, server, ours)
        peer.sendall(b"b")
        assert read_exactly(copy, 1) == b"b"
        copy.sendall(b"c")
        assert read_exactly(peer, 1) == b"c"
    finally:
        cookies.write_text(before)


def test_the_device_is_the_listeners(device: Device) -> None:
    """The exporter's interface may be one by which the peer's packets do not come here."""
    for images_own, listeners_own in ((b"lo", b""), (b"", b"lo"), (b"sm-deliver", b"")):
        server = listener("ipv4")
        ours, peer = connected(server, "ipv4")
        with taken(device, ours) as image:
            given = images.decode(image)
            if images_own:
                given.socket_options.append(images.OptionValue(images.Option.BINDTODEVICE, images_own, 0))
                given.socket_options.sort(key=lambda option: option.option)
            if listeners_own:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, listeners_own)
            interface = socket.if_nametoindex("lo") if listeners_own else 0
            argument = device.deliver(images.encode(given), ifindex=interface)
        assert argument.lost == 0
        server.settimeout(5)
        copy = server.accept()[0]
        name = copy.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
        assert name.rstrip(b"\0") == listeners_own
        peer.sendall(b"here")
        assert read_exactly(copy, 4) == b"here"


def test_one_of_a_reuseport_group_gets_it_and_the_group_can_grow(device: Device) -> None:
    servers = []
    for _turn in range(4):
        server = new_socket("ipv4")
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("127.0.0.1", servers[0].getsockname()[1] if servers else 0))
        server.listen(16)
        server.setblocking(False)
        servers.append(server)
    peer = new_socket("ipv4")
    peer.connect(servers[0].getsockname())
    ready, _unused, _unused = select.select(servers, [], [], 5)
    ours, _unused = ready[0].accept()
    with taken(device, ours) as image:
        device.deliver(image)
    # The same tuple: the same member as its SYN found.
    assert select.select(servers, [], [], 5)[0] == ready
    copy, _unused = ready[0].accept()
    another = new_socket("ipv4")
    another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    another.bind(servers[0].getsockname())
    another.listen()
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"


@pytest.mark.parametrize(("image_family", "server_family"), [("ipv4", "ipv6"), ("mapped", "ipv4")])
def test_ipv4_to_dual_stack_listeners_and_back(device: Device, image_family: str, server_family: str) -> None:
    first = listener(image_family, wildcard=True)
    ours, peer = connected(first, image_family)
    port = first.getsockname()[1]
    first.close()
    second = listener(server_family, wildcard=True, port=port)
    copy = redeliver(device, second, ours)
    assert copy.family == second.family
    name = copy.getpeername()[0]
    assert name == ("::ffff:127.0.0.1" if server_family == "ipv6" else "127.0.0.1")
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"
    copy.sendall(b"y")
    assert read_exactly(peer, 1) == b"y"


def test_an_ipv6_only_listener_gets_no_ipv4(device: Device) -> None:
    first = listener("ipv4")
    ours, _peer = connected(first, "ipv4")
    port = first.getsockname()[1]
    first.close()
    second = socket.socket(socket.AF_INET6)
    second.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    second.bind(("::", port))
    second.listen()
    with taken(device, ours) as image, pytest.raises(Refused) as caught:
        device.deliver(image)
    assert caught.value.refusal == Refusal.NO_LISTENER


def test_a_foreign_address_with_a_wildcard_listener(device: Device) -> None:
    """Forward mode: the copy keeps the exporter's address, which this host has not."""
    server = listener("ipv4", wildcard=True)
    subprocess.run(["ip", "address", "add", "198.51.100.7/32", "dev", "lo"], check=True)
    peer = new_socket("ipv4")
    peer.bind(("127.0.0.1", 0))
    peer.connect(("198.51.100.7", server.getsockname()[1]))
    ours, _unused = server.accept()
    try:
        with taken(device, ours) as image:
            subprocess.run(["ip", "address", "del", "198.51.100.7/32", "dev", "lo"], check=True)
            with pytest.raises(Refused) as caught:
                device.deliver(image)
            assert caught.value.refusal == Refusal.ADDRESS
            device.deliver(image, restore_flags=TRANSPARENT)
            copy, _unused = server.accept()
            assert copy.getsockname()[0] == "198.51.100.7"
            subprocess.run(["ip", "address", "add", "198.51.100.7/32", "dev", "lo"], check=True)
        peer.sendall(b"x")
        assert read_exactly(copy, 1) == b"x"
        copy.sendall(b"y")
        assert read_exactly(peer, 1) == b"y"
    finally:
        subprocess.run(["ip", "address", "del", "198.51.100.7/32", "dev", "lo"], check=False)


def test_another_local_address_than_the_images(device: Device) -> None:
    """NAT mode: the listener here has another address; the peer hears of it by translation."""
    first = listener("ipv4")
    ours, peer = connected(first, "ipv4")
    second = socket.socket()
    second.bind(("127.0.0.2", first.getsockname()[1]))
    second.listen()
    local = End(port=first.getsockname()[1])
    local.address[10] = local.address[11] = 0xFF
    for at, byte in enumerate((127, 0, 0, 2), 12):
        local.address[at] = byte
    # The peer resets the stranger at once: nobody translates for it here.
    with taken(device, ours) as image, held(peer, nat_client.Flag.HOLD):
        answer = device.deliver(image, local=local)
        assert answer.remote.name == peer.getsockname()
        second.settimeout(5)
        copy, address = second.accept()
        assert address == peer.getsockname()
        assert copy.getsockname() == second.getsockname()
        copy.close()


def test_moved_ten_times_by_the_same_listener(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    for turn in range(10):
        peer.sendall(b"%d" % turn)
        ours = redeliver(device, server, ours)
        assert read_exactly(ours, 1) == b"%d" % turn
        ours.sendall(b"ok")
        assert read_exactly(peer, 2) == b"ok"


def test_the_listener_can_be_closed_and_bound_again(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    copy = redeliver(device, server, ours)
    name = server.getsockname()
    server.close()
    again = listener("ipv4", port=name[1])
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"
    again.close()


# ---- Refusals: nothing is left, and the image is as good as before ----


def refused(device: Device, image: bytes, **members: object) -> Refused:
    with pytest.raises(Refused) as caught:
        device.deliver(image, **members)
    return caught.value


def test_no_listener_then_one(device: Device) -> None:
    first = listener("ipv4")
    ours, peer = connected(first, "ipv4")
    port = first.getsockname()[1]
    first.close()
    wire = Wire(port)
    with taken(device, ours) as image:
        error = refused(device, image)
        assert (error.errno, error.refusal) == (errno.ECONNREFUSED, Refusal.NO_LISTENER)
        assert error.argument.listener_family == 0
        second = listener("ipv4", port=port)
        device.deliver(image)
    copy, _unused = second.accept()
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"
    assert not [flags for flags in wire.flags() if flags & (SYN | RST | FIN)]
    wire.close()


def test_a_full_accept_queue_then_room(device: Device) -> None:
    server = listener("ipv4", backlog=2)
    ours, peer = connected(server, "ipv4")
    others = [socket.create_connection(server.getsockname()) for _turn in range(3)]
    with taken(device, ours) as image:
        error = refused(device, image)
        assert (error.errno, error.refusal) == (errno.EAGAIN, Refusal.ACCEPT_QUEUE)
        assert (error.argument.queued, error.argument.queue_max) == (3, 2)
        accepted = [server.accept()[0] for _unused in others]
        assert device.deliver(image).queued == 1
    copy, address = server.accept()
    assert address == peer.getsockname()
    peer.sendall(b"x")
    assert read_exactly(copy, 1) == b"x"
    assert len(accepted) == 3


def test_the_owner_of_the_listener(device: Device) -> None:
    server = listener("ipv4")
    os.fchown(server.fileno(), 1234, -1)
    ours, _peer = connected(server, "ipv4")
    with taken(device, ours) as image:
        error = refused(device, image, flags=0, uid=77)
        assert (error.errno, error.refusal) == (errno.EACCES, Refusal.OWNER)
        assert error.argument.listener_uid == 1234
        device.deliver(image, flags=0, uid=1234)
    server.accept()


def test_the_very_connection_exists(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    with frozen(device, ours) as (freeze, image):
        error = refused(device, image)
        assert (error.errno, error.refusal) == (errno.EADDRINUSE, Refusal.TUPLE_TAKEN)
        device.abort(freeze)
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_listeners_whose_children_are_special(device: Device) -> None:
    server = listener("ipv4")
    ours, _peer = connected(server, "ipv4")
    accept_all = struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF)
    buffer = ctypes.create_string_buffer(accept_all, 8)
    server.setsockopt(
        socket.SOL_SOCKET,
        26,
        struct.pack(
            "HxxxxxxP" if ctypes.sizeof(ctypes.c_void_p) == 8 else "HxxP", 1, ctypes.addressof(buffer)
        ),
    )  # SO_ATTACH_FILTER
    with taken(device, ours) as image:
        error = refused(device, image)
        assert (error.errno, error.refusal) == (errno.EOPNOTSUPP, Refusal.LISTENER)
        server.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER
        device.deliver(image)
    server.accept()


def test_states_that_accept_does_not_know(device: Device) -> None:
    server = listener("ipv4")
    with frozen(device, server) as (freeze, image):
        device.abort(freeze)
    assert refused(device, image).refusal == Refusal.STATE
    ours, _peer = connected(server, "ipv4")
    ours.shutdown(socket.SHUT_WR)
    with frozen(device, ours) as (freeze, image):
        device.abort(freeze)
    assert refused(device, image).refusal == Refusal.STATE


def test_bad_arguments(device: Device) -> None:
    server = listener("ipv4")
    ours, _peer = connected(server, "ipv4")
    with frozen(device, ours) as (freeze, image):
        device.abort(freeze)
    for members in (
        {"flags": 4},
        {"restore_flags": 1},
        {"reserved": 1},
        {"reserved2": 1},
        {"ifindex": 1 << 31},
    ):
        assert refused(device, image, **members).errno == errno.EINVAL
    error = refused(device, image[:-5])
    assert (error.errno, error.refusal) == (errno.EBADMSG, Refusal.IMAGE)
    assert error.argument.image_error
    assert refused(device, image, slot=3).errno == errno.ENXIO
    with pytest.raises(Refused) as caught:
        device.call("deliver", Deliver(slot=NO_SLOT, flags=ANY_UID, image=8, bytes=len(image)))
    assert caught.value.errno == errno.EFAULT


def test_only_administrators(device: Device) -> None:
    server = listener("ipv4")
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setresuid(1000, 1000, 1000)
            with Device(slots=0) as mine:
                mine.deliver(b"x" * 100, flags=PROBE | ANY_UID)
        except Refused as error:
            status = 0 if error.errno == errno.EPERM else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    server.close()


def test_a_probe_tells_who_listens_and_changes_nothing(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    claim = device.claim(ours)
    answer = device.deliver(b"", flags=PROBE | ANY_UID, local=claim.local, remote=claim.remote)
    assert (answer.listener_family, answer.listener_uid) == (socket.AF_INET, os.getuid())
    assert (answer.queued, answer.queue_max) == (0, 16)
    device.release(claim)
    server.close()
    error = refused(device, b"", flags=PROBE | ANY_UID, local=claim.local, remote=claim.remote)
    assert error.refusal == Refusal.NO_LISTENER
    peer.sendall(b"x")
    assert read_exactly(ours, 1) == b"x"


# ---- Ends ----


def test_a_listener_that_is_closed_resets_what_it_has_not_accepted(device: Device) -> None:
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    with taken(device, ours) as image:
        device.deliver(image)
    server.close()
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_a_closing_member_of_a_reuseport_group_hands_it_on(device: Device) -> None:
    """net.ipv4.tcp_migrate_req: the kernel moves what waits in one queue to another."""
    switch = Path("/proc/sys/net/ipv4/tcp_migrate_req")
    switch.write_text("1")
    try:
        servers = []
        for _turn in range(2):
            server = new_socket("ipv4")
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("127.0.0.1", servers[0].getsockname()[1] if servers else 0))
            server.listen(16)
            servers.append(server)
        peer = new_socket("ipv4")
        peer.connect(servers[0].getsockname())
        ready, _unused, _unused = select.select(servers, [], [], 5)
        ours, _unused = ready[0].accept()
        with taken(device, ours) as image:
            device.deliver(image)
        ready[0].close()
        other = servers[1] if servers[0] is ready[0] else servers[0]
        other.settimeout(5)
        copy, _unused = other.accept()
        peer.sendall(b"x")
        assert read_exactly(copy, 1) == b"x"
    finally:
        switch.write_text("0")


def test_a_namespace_that_ends_with_a_delivery_in_the_queue() -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            assert LIBC.unshare(CLONE_NEWNET) == 0
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            with Device() as mine:
                server = listener("ipv4")
                ours, _peer = connected(server, "ipv4")
                with taken(mine, ours) as image:
                    mine.deliver(image)
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.processors(2)
def test_accept_and_close_race_with_deliveries(device: Device) -> None:
    """Listeners come and go while connections are delivered; each ends in an accept() or a clear refusal."""
    stop = threading.Event()
    base = listener("ipv4")
    port = base.getsockname()[1]
    base.close()

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                server = listener("ipv4", port=port)
                server.settimeout(0.02)
                for _turn in range(3):
                    with contextlib.suppress(TimeoutError):
                        server.accept()[0].close()
                server.close()

    thread = threading.Thread(target=serve)
    thread.start()
    outcomes = {Refusal.NONE: 0, Refusal.NO_LISTENER: 0}
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                first = new_socket("ipv4")
                first.bind(("127.0.0.3", port))
                first.listen()
                peer = new_socket("ipv4")
                peer.connect(first.getsockname())
                ours, _unused = first.accept()
                first.close()
                with held(ours), frozen(device, ours) as (freeze, image):
                    device.commit(freeze)
                    local = End(port=port)
                    local.address[10] = local.address[11] = 0xFF
                    for at, byte in enumerate((127, 0, 0, 1), 12):
                        local.address[at] = byte
                    try:
                        device.deliver(image, local=local)
                        outcomes[Refusal.NONE] += 1
                    except Refused as error:
                        outcomes[Refusal(error.refusal)] += 1
                ours.close()
                peer.close()
    finally:
        stop.set()
        thread.join()
    assert outcomes[Refusal.NONE] > 5


@pytest.mark.kernels("6.*", "7.*")
def test_a_listener_that_is_kept_busy_holds_nobody_up(device: Device) -> None:
    """Its owner has its lock for as long as a system call of his waits for a page."""
    server = listener("ipv4")
    ours, peer = connected(server, "ipv4")
    with taken(device, ours) as image:
        with missing_page() as (_memory, address, descriptor):
            setting = threading.Thread(
                target=LIBC.setsockopt,
                args=(server.fileno(), socket.IPPROTO_IP, socket.IP_OPTIONS, ctypes.c_void_p(address), 4),
            )
            setting.start()
            time.sleep(0.2)
            started = time.monotonic()
            with pytest.raises(Refused) as caught:
                device.deliver(image)
            assert (caught.value.errno, caught.value.refusal) == (errno.EBUSY, Refusal.LOCKED)
            assert time.monotonic() - started < 2
            give_page(address, descriptor)
            setting.join()
        device.deliver(image)
    server.settimeout(5)
    peer.sendall(b"1")
    assert read_exactly(server.accept()[0], 1) == b"1"
