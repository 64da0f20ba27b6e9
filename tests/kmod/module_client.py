# SPDX-License-Identifier: MIT
"""/dev/sockmi from Python: the structs of kmod/uapi/sockmi.h, and one method for each ioctl."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv6Address

DEVICE = "/dev/sockmi"
MAGIC = 0xB9
NO_SLOT = 0xFFFFFFFF
U8, U16, U32, U64, S32 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


class Refusal(enum.IntEnum):
    """enum sockmi_refusal."""

    NONE = 0
    NO_SOCKET = 1
    NOT_TCP = 2
    MPTCP = 3
    ULP = 4
    USER_DATA = 5
    REPAIR = 6
    STATE = 7
    AUTHENTICATED = 8
    FASTOPEN = 9
    ACCECN = 10
    URGENT = 11
    BUSY = 12
    INCONSISTENT = 13
    TOO_LARGE = 14
    IMAGE = 15
    FAMILY = 16
    TARGET = 17
    ADDRESS = 18
    PORT_TAKEN = 19
    TUPLE_TAKEN = 20
    TS_UNIT = 21
    SCALE = 22
    MEMORY = 23
    NAMESPACE = 24
    LIST_FULL = 25
    KTLS = 26
    ZEROCOPY = 27
    ERROR = 28
    NO_LISTENER = 29
    LISTENER = 30
    OWNER = 31
    ACCEPT_QUEUE = 32
    LOCKED = 33
    IPSEC = 34


class EventType(enum.IntEnum):
    """enum sockmi_event_type."""

    EXPORT_REQUEST = 1
    THAWED = 2
    CLAIM_ENDED = 3
    TAKEN = 4
    WAITING = 5
    DISCARDED = 6


class ExportState(enum.IntEnum):
    """enum sockmi_export_state."""

    CLAIMED = 1
    FROZEN = 2
    COMMITTING = 3
    COMMITTED = 4
    THAWING = 5
    THAWED = 6


class ListName(enum.IntEnum):
    """enum sockmi_list."""

    BOUND = 1
    LISTENING = 2
    CONNECTED = 3


ACTIVATE, TRANSPARENT, RESET_PATH = 1, 2, 4
ANY_UID, PUBLISH = 1, 2
PROBE = 2
COMMIT_OWNED, COMMIT_SETTLED = 1, 2


class End(ctypes.Structure):
    """struct sockmi_dev_endpoint."""

    _fields_ = (("address", U8 * 16), ("port", U16), ("reserved", U16), ("scope_id", U32))

    @property
    def name(self) -> tuple[str, int]:
        """Address and port, an IPv4 address as such."""
        address = IPv6Address(bytes(self.address))
        return str(address.ipv4_mapped or address), self.port


class Hello(ctypes.Structure):
    _fields_ = (
        ("abi_major", U16),
        ("abi_minor", U16),
        ("features", U32),
        ("image_major", U16),
        ("image_minor", U16),
        ("slots_max", U32),
        ("image_max_bytes", U64),
        ("slots_max_bytes", U64),
        ("freeze_default_ms", U32),
        ("freeze_max_ms", U32),
        ("claim_max_ms", U32),
        ("dormant_max_ms", U32),
    )


class Slots(ctypes.Structure):
    _fields_ = (("kind", U32), ("count", U32), ("bytes", U64), ("offset", U64))


class Claim(ctypes.Structure):
    _fields_ = (
        ("pid", S32),
        ("fd", S32),
        ("flags", U32),
        ("lifetime_ms", U32),
        ("id", U64),
        ("refusal", U32),
        ("owner_uid", U32),
        ("local", End),
        ("remote", End),
        ("family", U16),
        ("kind", U8),
        ("state", U8),
        ("reserved", U32),
        ("bytes", U64),
    )


class Freeze(ctypes.Structure):
    _fields_ = (
        ("id", U64),
        ("slot", U32),
        ("deadline_ms", U32),
        ("flags", U32),
        ("refusal", U32),
        ("epoch", U32),
        ("reserved", U32),
        ("bytes", U64),
    )


class Decision(ctypes.Structure):
    _fields_ = (("id", U64), ("epoch", U32), ("flags", U32))


class ExportInfo(ctypes.Structure):
    _fields_ = (
        ("id", U64),
        ("state", U32),
        ("epoch", U32),
        ("left_ms", U32),
        ("timed_out", U32),
        ("frozen_us", U64),
    )


class Restore(ctypes.Structure):
    _fields_ = (
        ("fd", S32),
        ("slot", U32),
        ("image", U64),
        ("bytes", U64),
        ("flags", U32),
        ("refusal", U32),
        ("image_error", U32),
        ("lost", U32),
        ("id", U64),
        ("local", End),
        ("approximated", U64),
        ("reset", U64),
        ("lost_options", U16 * 6),
        ("deadline_ms", U32),
    )


class Deliver(ctypes.Structure):
    _fields_ = (
        ("slot", U32),
        ("flags", U32),
        ("image", U64),
        ("bytes", U64),
        ("uid", U32),
        ("restore_flags", U32),
        ("local", End),
        ("remote", End),
        ("ifindex", U32),
        ("refusal", U32),
        ("image_error", U32),
        ("lost", U32),
        ("approximated", U64),
        ("reset", U64),
        ("lost_options", U16 * 6),
        ("listener_uid", U32),
        ("listener_family", U16),
        ("reserved", U16),
        ("queued", U32),
        ("queue_max", U32),
        ("reserved2", U32),
    )


class ListAdd(ctypes.Structure):
    _fields_ = (
        ("slot", U32),
        ("flags", U32),
        ("image", U64),
        ("bytes", U64),
        ("uid", U32),
        ("restore_flags", U32),
        ("local", End),
        ("id", U64),
        ("refusal", U32),
        ("image_error", U32),
    )


class ListInfo(ctypes.Structure):
    _fields_ = (
        ("list", U32),
        ("max", U32),
        ("entries", U32),
        ("reserved", U32),
        ("waiting", U32),
        ("pad", U32),
    )


class ListNext(ctypes.Structure):
    _fields_ = (
        ("list", U32),
        ("published", U32),
        ("after", U64),
        ("id", U64),
        ("bytes", U64),
        ("migration_id", U8 * 16),
        ("local", End),
        ("remote", End),
        ("age_ms", U64),
    )


class Match(ctypes.Structure):
    _fields_ = (
        ("family", U16),
        ("kind", U8),
        ("state", U8),
        ("pad", U32),
        ("waiting", U32),
        ("uid", U32),
        ("flags", U32),
        ("pad2", U32),
        ("local", End),
        ("remote", End),
    )


class Request(ctypes.Structure):
    _fields_ = (
        ("fd", S32),
        ("list", U32),
        ("states", U32),
        ("local_prefix", U16),
        ("remote_prefix", U16),
        ("flags", U32),
        ("result", S32),
        ("local", End),
        ("remote", End),
        ("refusal", U32),
        ("context_room", U32),
        ("id", U64),
        ("migration_id", U8 * 16),
        ("approximated", U64),
        ("reset", U64),
        ("context", U64),
        ("context_bytes", U32),
        ("reserved", U32),
    )


class Import(ctypes.Structure):
    _fields_ = (
        ("requests", U64),
        ("count", U32),
        ("request_bytes", U32),
        ("timeout_ms", S32),
        ("flags", U32),
    )


class Serve(ctypes.Structure):
    _fields_ = (("flags", U32), ("reserved", U32))


class Answer(ctypes.Structure):
    _fields_ = (("id", U64), ("error", U32), ("reserved", U32), ("text", ctypes.c_char * 96))


class Forget(ctypes.Structure):
    _fields_ = (("flags", U32), ("reserved", U32), ("flows", U32), ("entries", U32))


class Event(ctypes.Structure):
    _fields_ = (
        ("type", U32),
        ("lost", U32),
        ("id", U64),
        ("pid", S32),
        ("uid", U32),
        ("list", U16),
        ("state", U8),
        ("kind", U8),
        ("wait_ms", U32),
        ("local", End),
        ("remote", End),
        ("to", End),
        ("bytes", U64),
        ("owner_pid", S32),
        ("owner_fd", S32),
        ("inode", U64),
    )


ORDINALS: dict[str, tuple[int, type[ctypes.Structure]]] = {
    "hello": (0x00, Hello),
    "slots": (0x01, Slots),
    "serve": (0x02, Serve),
    "answer": (0x03, Answer),
    "forget": (0x04, Forget),
    "claim": (0x10, Claim),
    "freeze": (0x11, Freeze),
    "commit": (0x12, Decision),
    "abort": (0x13, Decision),
    "release": (0x14, Decision),
    "export_info": (0x15, ExportInfo),
    "restore": (0x20, Restore),
    "activate": (0x21, Decision),
    "discard": (0x22, Decision),
    "deliver": (0x23, Deliver),
    "list_add": (0x30, ListAdd),
    "publish": (0x31, Decision),
    "remove": (0x32, Decision),
    "list_info": (0x33, ListInfo),
    "list_next": (0x34, ListNext),
    "match": (0x35, Match),
    "import": (0x36, Import),
}


class Refused(OSError):
    """An ioctl failed; ``argument`` is as the module left it."""

    def __init__(self, error: int, name: str, argument: ctypes.Structure) -> None:
        self.argument = argument
        self.refusal = Refusal(getattr(argument, "refusal", 0))
        super().__init__(error, f"{name}: {os.strerror(error)} ({self.refusal.name.lower()})")


def number(name: str) -> int:
    """The ioctl's number."""
    ordinal, struct = ORDINALS[name]
    return 3 << 30 | ctypes.sizeof(struct) << 16 | MAGIC << 8 | ordinal


class Device:
    """One open device file that has said hello, with export slots."""

    def __init__(self, *, slots: int = 2, slot_bytes: int = 1 << 20, greet: bool = True) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self.slot_bytes = slot_bytes
        self.memory: mmap.mmap | None = None
        try:
            if greet:
                self.hello()
            if slots:
                self._make_slots(slots)
        except BaseException:
            self.close()  # it would keep the module loaded
            raise

    def _make_slots(self, count: int) -> None:
        made = self.call("slots", Slots(kind=1, count=count, bytes=self.slot_bytes))
        self.slot_bytes = made.bytes
        self.memory = mmap.mmap(
            self.fd, made.bytes * count, mmap.MAP_SHARED, mmap.PROT_READ, offset=made.offset
        )

    def close(self) -> None:
        if self.memory:
            self.memory.close()
        os.close(self.fd)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def call(self, name: str, argument: ctypes.Structure) -> ctypes.Structure:
        """One ioctl; ``argument`` as the module left it. Refused."""
        try:
            self.result = fcntl.ioctl(self.fd, number(name), argument)
        except OSError as error:
            raise Refused(error.errno or 0, name, argument) from None
        return argument

    def hello(self, major: int = 1) -> Hello:
        return self.call("hello", Hello(abi_major=major))

    def claim(self, sock: socket.socket | int, pid: int = 0, lifetime_ms: int = 0) -> Claim:
        fd = sock if isinstance(sock, int) else sock.fileno()
        return self.call("claim", Claim(pid=pid, fd=fd, lifetime_ms=lifetime_ms))

    def freeze(self, claim: Claim, slot: int = 0, deadline_ms: int = 0) -> Freeze:
        return self.call("freeze", Freeze(id=claim.id, slot=slot, deadline_ms=deadline_ms))

    def image(self, frozen: Freeze) -> bytes:
        """A copy of what the freeze has written."""
        assert self.memory
        start = frozen.slot * self.slot_bytes
        return self.memory[start : start + frozen.bytes]

    def commit(self, frozen: Freeze, flags: int = 0) -> None:
        self.call("commit", Decision(id=frozen.id, epoch=frozen.epoch, flags=flags))

    def abort(self, frozen: Freeze) -> None:
        self.call("abort", Decision(id=frozen.id, epoch=frozen.epoch))

    def release(self, claim: Claim) -> None:
        self.call("release", Decision(id=claim.id))

    def info(self, claim: Claim | Freeze) -> ExportInfo:
        return self.call("export_info", ExportInfo(id=claim.id))

    def restore(
        self, sock: socket.socket, image: bytes, flags: int = ACTIVATE, local: End | None = None
    ) -> Restore:
        memory = ctypes.create_string_buffer(image, max(len(image), 1))
        argument = Restore(
            fd=sock.fileno(), slot=NO_SLOT, image=ctypes.addressof(memory), bytes=len(image), flags=flags
        )
        if local:
            argument.local = local
        return self.call("restore", argument)

    def deliver(self, image: bytes, flags: int = ANY_UID, **members: object) -> Deliver:
        memory = ctypes.create_string_buffer(image, max(len(image), 1))
        argument = Deliver(slot=NO_SLOT, flags=flags, image=ctypes.addressof(memory), bytes=len(image))
        for name, value in members.items():
            setattr(argument, name, value)
        return self.call("deliver", argument)

    def decide(self, name: str, ident: int) -> None:
        self.call(name, Decision(id=ident))

    def list_add(
        self, image: bytes, flags: int = ANY_UID | PUBLISH, uid: int = 0, **members: object
    ) -> ListAdd:
        memory = ctypes.create_string_buffer(image, max(len(image), 1))
        given = {"slot": NO_SLOT, "image": ctypes.addressof(memory), "bytes": len(image)}
        return self.call("list_add", ListAdd(flags=flags, uid=uid, **given, **members))

    def list_info(self, name: ListName) -> ListInfo:
        return self.call("list_info", ListInfo(list=name))

    def take(self, *requests: Request, timeout_ms: int = 0) -> tuple[int, list[Request]]:
        """IMPORT: how many, and the requests with their results."""
        array = (Request * len(requests))(*requests)
        self.call(
            "import",
            Import(
                requests=ctypes.addressof(array),
                count=len(requests),
                request_bytes=ctypes.sizeof(Request),
                timeout_ms=timeout_ms,
            ),
        )
        return self.result, list(array)

    def serve(self) -> None:
        self.call("serve", Serve())

    def answer(self, ident: int, error: int, text: str) -> None:
        self.call("answer", Answer(id=ident, error=error, text=text.encode()))

    def events(self) -> list[Event]:
        """Those that wait now; blocks for the first."""
        data = os.read(self.fd, ctypes.sizeof(Event) * 16)
        size = ctypes.sizeof(Event)
        return [Event.from_buffer_copy(data[at : at + size]) for at in range(0, len(data), size)]


@contextlib.contextmanager
def frozen(device: Device, sock: socket.socket, **options: int) -> Iterator[tuple[Freeze, bytes]]:
    """A claimed, frozen socket and its image; released afterwards."""
    claim = device.claim(sock)
    try:
        freeze = device.freeze(claim, **options)
        yield freeze, device.image(freeze)
    finally:
        with contextlib.suppress(OSError):
            device.release(claim)
