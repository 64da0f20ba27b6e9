# SPDX-License-Identifier: MIT
"""A host of the transport tests: a process in its own network namespace with a group and a stream pool.

As a program it obeys commands, a JSON object a line on its standard input, and tells events
likewise on its standard output. As a module it makes the segment, starts nodes and talks to them.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from sockmi.addresses import Endpoint
from sockmi.transport.group import Group, GroupError, GroupSettings, Member
from sockmi.transport.hello import Introduction
from sockmi.transport.identity import HostId, Identity
from sockmi.transport.keyring import Keyring
from sockmi.transport.sockaddr import SockAddr
from sockmi.transport.stream import StreamPool, StreamSettings

DAEMON = Path(__file__).resolve().parents[2] / "daemon"
Event = dict[str, Any]


# --- the node, in its process --------------------------------------------------------------


class Daemon:
    """What the tests let a node do; method names are the commands."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: dict[str, Any]) -> None:
        self.loop = loop
        self.key_file = Path(config["key_file"])
        identity = Identity.load_or_create(Path(config["state_dir"]))
        self.pool = StreamPool(
            loop,
            identity,
            StreamSettings(ping_interval_s=0.3, dead_after_s=1.5, open_timeout_s=1.5),
            on_message=self._on_stream,
            on_open=lambda host: self.tell("open", host=host.hex()),
            on_lost=lambda host, reason: self.tell("lost", host=host.hex(), reason=reason),
        )
        listen = self.pool.listen([Endpoint(ip_address(config["listen"]), 0)])
        settings = config["group"]
        for name in ("multicast", "address"):
            settings[name] = ip_address(settings[name]) if settings.get(name) else None
        settings["members"] = tuple(Endpoint.parse(text) for text in settings.get("members", ()))
        self.group = Group(
            loop,
            GroupSettings(**settings),
            Keyring.load(self.key_file),
            identity,
            Introduction(
                identity.certificate, listen[0].port, config["name"], engines=("repair",), redirects=("nat",)
            ),
            on_message=self._on_datagram,
            on_member=self._on_member,
            on_leave=self._on_leave,
            alive=self.pool.is_open,
        )
        self.run_left = 0
        self.run_host = b""
        self.run_size = 0
        self.run_sent_at = 0.0
        self.run_s: list[float] = []
        self.tell("ready", host=identity.host_id.hex())

    def tell(self, kind: str, **fields: object) -> None:
        os.write(1, json.dumps({"event": kind, **fields}).encode() + b"\n")

    def obey(self, command: Event) -> None:
        getattr(self, "do_" + command.pop("do"))(**command)

    def do_start(self) -> None:
        try:
            self.group.start()
            self.tell("started", local=[str(one) for one in self.group.local])
        except GroupError as error:
            self.tell("error", text=str(error))

    def do_send(self, text: str, to: str | None = None) -> None:
        self.group.send(b"T" + text.encode(), bytes.fromhex(to) if to else None)

    def do_open(self, to: str) -> None:
        if self.pool.open(bytes.fromhex(to)):
            self.tell("open", host=to)

    def do_stream(self, to: str, text: str) -> None:
        self.tell("sent", ok=self.pool.send(bytes.fromhex(to), b"T" + text.encode()))

    def do_status(self) -> None:
        self.tell(
            "status",
            members=sorted(host.hex() for host in self.group.members),
            names=sorted(member.host_name for member in self.group.members.values()),
            endpoints={
                host.hex(): [str(at) for at in one.endpoints] for host, one in self.group.members.items()
            },
            seal=dict(self.group.seal_counters),
            group=dict(self.group.counters),
            pool=dict(self.pool.counters),
        )

    def do_rekey(self) -> None:
        self.group.rekey(Keyring.load(self.key_file))
        self.tell("rekeyed")

    def do_close(self) -> None:
        self.group.close()
        self.pool.close()
        self.tell("closed")
        self.loop.stop()

    def do_round_trips(self, to: str, count: int, size: int, channel: str) -> None:
        """Echo ``count`` messages one after the other; tells the times."""
        self.run_host, self.run_left, self.run_size, self.run_s = bytes.fromhex(to), count, size, []
        self._ping(channel)

    def do_throughput(self, to: str, mib: int, chunk_kib: int) -> None:
        """Send so much in messages of one chunk; the receiver tells the last one."""
        chunk = os.urandom(chunk_kib << 10)
        host = bytes.fromhex(to)
        self.run_sent_at = time.perf_counter()
        for _turn in range((mib << 10) // chunk_kib):
            self.pool.send(host, [b"B", chunk])
        self.pool.send(host, b"F")

    # --- callbacks ---

    def _ping(self, channel: str) -> None:
        if self.run_left == 0:
            times = sorted(self.run_s)
            self.tell(
                "round_trips",
                median_us=statistics.median(times) * 1e6,
                p99_us=times[len(times) * 99 // 100] * 1e6,
            )
            return
        self.run_left -= 1
        self.run_sent_at = time.perf_counter()
        if channel == "datagram":
            self.group.send(b"P" + bytes(self.run_size), self.run_host)
        else:
            self.pool.send(self.run_host, b"P" + bytes(self.run_size))

    def _on_datagram(self, sender: HostId, address: SockAddr, message: bytes) -> None:
        if message[:1] == b"P":
            self.group.send(b"R" + message[1:], sender)
        elif message[:1] == b"R":
            self.run_s.append(time.perf_counter() - self.run_sent_at)
            self._ping("datagram")
        else:
            self.tell("datagram", host=sender.hex(), address=address[0], text=message[1:].decode())

    def _on_stream(self, sender: HostId, message: memoryview) -> None:
        kind = bytes(message[:1])
        if kind == b"P":
            self.pool.send(sender, [b"R", message[1:]])
        elif kind == b"R":
            self.run_s.append(time.perf_counter() - self.run_sent_at)
            self._ping("stream")
        elif kind == b"F":
            self.pool.send(sender, b"D")
        elif kind == b"D":
            self.tell("throughput", seconds=time.perf_counter() - self.run_sent_at)
        elif kind == b"T":
            self.tell("stream", host=sender.hex(), text=bytes(message[1:]).decode())

    def _on_member(self, member: Member) -> None:
        self.tell("trusted", host=member.host_id.hex(), ok=self.pool.update(member))

    def _on_leave(self, member: Member, reason: str) -> None:
        self.pool.forget(member.host_id)
        self.tell("left", host=member.host_id.hex(), reason=reason)


def main() -> None:
    loop = asyncio.new_event_loop()
    daemon = Daemon(loop, json.loads(sys.argv[1]))
    os.set_blocking(0, False)
    pending = bytearray()

    def commands() -> None:
        data = os.read(0, 1 << 20)
        if not data:
            loop.stop()
        pending.extend(data)
        while (end := pending.find(b"\n")) >= 0:
            line = bytes(pending[:end])
            del pending[: end + 1]
            daemon.obey(json.loads(line))

    loop.add_reader(0, commands)
    loop.run_forever()


# --- the tests' side -----------------------------------------------------------------------


class Node:
    """A node as the tests see it; use it as a context manager."""

    def __init__(self, namespace: str, name: str, directory: Path, key_file: Path, **group: object) -> None:
        self.namespace, self.name, self.directory, self.key_file = namespace, name, directory, key_file
        self.settings = {"port": 7780, "announce_interval_s": 0.3, "expiry_s": 1.5, **group}
        self.events: list[Event] = []
        self._seen = 0
        self.start()

    def start(self) -> None:
        """(Again): a new process of the same host."""
        self.directory.mkdir(exist_ok=True)
        multicast = str(self.settings.get("multicast") or (self.settings.get("members") or ["0.0.0.0"])[0])  # type: ignore[index]  # noqa: S104
        six = multicast.startswith("[") or multicast.count(":") > 1
        config = {
            "name": self.name,
            "state_dir": str(self.directory),
            "key_file": str(self.key_file),
            "listen": "::" if six else "0.0.0.0",  # noqa: S104
            "group": self.settings,
        }
        self.process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.namespace,
                sys.executable,
                str(Path(__file__).resolve()),
                json.dumps(config),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(DAEMON)},
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._partial = b""
        self.id: str = self.wait("ready")["host"]
        self.do("start")

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As a crash: no farewell."""
        self.process.send_signal(signal.SIGKILL) if self.process.poll() is None else None
        self.process.wait(10)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def do(self, command: str, **arguments: object) -> None:
        """Give a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, kind: str, timeout_s: float = 15.0, **fields: object) -> Event:
        """The next event of this kind with these fields; those before it are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            while self._seen < len(self.events):
                event = self.events[self._seen]
                self._seen += 1
                if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                    return event
            self._read(deadline, f"{self.name}: no {kind} {fields}")

    def _read(self, deadline: float, what: str) -> None:
        assert self.process.stdout is not None
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
            raise AssertionError(f"{what}; events: {self.events[-10:]}")
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        if not data:
            raise AssertionError(f"{what}: the process has ended with {self.process.wait(5)}")
        *lines, self._partial = (self._partial + data).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def status(self) -> Event:
        """Members and counters."""
        self.do("status")
        return self.wait("status")

    def until(self, condition: Callable[[Event], object], timeout_s: float = 15.0) -> Event:
        """Poll the status."""
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"{self.name}: {status}"
            time.sleep(0.05)
        return status

    def knows(self, *others: Node) -> Event:
        """Wait until exactly these are its members."""
        want = sorted(other.id for other in others)
        return self.until(lambda status: status["members"] == want)


def run(*command: str, check: bool = True) -> str:
    """A short command; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Segment:
    """One L2 segment: a switch and a namespace for each name, 10.77.0.N and fd77::N on ``eth0``."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"smt-{os.getpid()}-t{os.urandom(2).hex()}"
        self.names = names
        self.switch = f"{self._prefix}-sw"

    def __getitem__(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def address(self, name: str, version: int = 4) -> str:
        number = self.names.index(name) + 1
        return f"10.77.0.{number}" if version == 4 else f"fd77::{number}"

    def make(self) -> None:
        run("ip", "netns", "add", self.switch)
        run(
            "ip",
            "-n",
            self.switch,
            "link",
            "add",
            "br0",
            "type",
            "bridge",
            "mcast_snooping",
            "0",
            "forward_delay",
            "0",
        )
        run("ip", "-n", self.switch, "link", "set", "br0", "up")
        for name in self.names:
            run("ip", "netns", "add", self[name])
            run("ip", "-n", self[name], "link", "set", "lo", "up")
            self.plug(name)

    def plug(self, name: str) -> None:
        """Give the host its interface, (again)."""
        run(
            "ip",
            "-n",
            self.switch,
            "link",
            "add",
            f"p-{name}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self[name],
        )
        run("ip", "netns", "exec", self[name], "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
        run("ip", "-n", self[name], "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        run("ip", "-n", self[name], "address", "add", f"{self.address(name, 6)}/64", "dev", "eth0", "nodad")
        run("ip", "-n", self[name], "link", "set", "eth0", "up")
        run("ip", "-n", self.switch, "link", "set", f"p-{name}", "master", "br0", "up")

    def unplug(self, name: str) -> None:
        """Remove the interface altogether."""
        run("ip", "-n", self.switch, "link", "del", f"p-{name}")

    def cable(self, name: str, state: str) -> None:
        """``down``: the host is cut off, and does not see why."""
        master = ["master", "br0"] if state == "up" else ["nomaster"]
        run("ip", "-n", self.switch, "link", "set", f"p-{name}", *master)

    def remove(self) -> None:
        for name in (*(self[name] for name in self.names), self.switch):
            run("ip", "netns", "del", name, check=False)


@contextmanager
def segment(*names: str) -> Iterator[Segment]:
    """A segment for the time of a test."""
    one = Segment(*names)
    try:
        one.make()
        yield one
    finally:
        one.remove()


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread in another network namespace: sockets made here live there."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net", "rb") as home, open(f"/run/netns/{namespace}", "rb") as there:  # noqa: PTH123
        assert libc.setns(there.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), 0x40000000) == 0


class Attacker:
    """Somebody on the segment without the key: hears, records, repeats, invents."""

    def __init__(self, namespace: str, group: str, port: int) -> None:
        self.group = (group, port)
        with inside(namespace):
            self.ears = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.mouth = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.ears.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.ears.bind(self.group)
            request = (
                socket.inet_aton(group) + bytes(4) + socket.if_nametoindex("eth0").to_bytes(4, sys.byteorder)
            )
            self.ears.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
            self.mouth.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
            self.mouth.setblocking(False)

    def record(self, count: int, timeout_s: float = 10.0) -> list[bytes]:
        """The next datagrams to the group."""
        self.ears.settimeout(timeout_s)
        return [self.ears.recv(65535) for _turn in range(count)]

    def say(self, datagram: bytes, to: tuple[str, int] | None = None) -> None:
        with suppress(OSError):  # full, or too long for the path: nothing to attack with
            self.mouth.sendto(datagram, to or self.group)

    def answers(self) -> list[bytes]:
        """What was sent to the attacker."""
        found = []
        while select.select([self.mouth], [], [], 0.3)[0]:
            found.append(self.mouth.recv(65535))
        return found

    def close(self) -> None:
        self.ears.close()
        self.mouth.close()


if __name__ == "__main__":
    main()
