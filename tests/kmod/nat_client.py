# SPDX-License-Identifier: MIT
"""The NAT helper's ioctls, spoken from Python: structs packed by hand, as the header describes them."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from sockmi.addresses import Endpoint, FourTuple

DEVICE = "/dev/sockmi"
MAGIC = 0xB9
HELLO, CHANGE, READ, LIST, FLUSH = 0x00, 0x40, 0x41, 0x42, 0x43

END = struct.Struct("=16sHHI")
RULE = struct.Struct("=24s24s24sII16s")
WHOLE = struct.Struct("=24s24s24sII16sQQQQQQIIII")
HELLO_ARG = struct.Struct("=HHIHHIQQIIII")
CHANGE_ARG = struct.Struct("=QIIII")
READ_ARG = struct.Struct("=QIIQII")
FLUSH_ARG = struct.Struct("=II")
NOBODY = bytes(END.size)


class Flag(enum.IntFlag):
    """What a flow does."""

    HOLD = 1
    MUTE = 2
    REDIRECT = 4
    TRANSLATE = 8
    UNTRACKED = 16


NO_FLAG = Flag(0)


class Seen(enum.IntFlag):
    """What a flow has met."""

    SYN_IN = 1
    FIN_IN = 2
    RST_IN = 4
    FIN_OUT = 8
    RST_OUT = 16
    LAPSE = 32


UNSEEN = Seen(0)


class Action(enum.IntEnum):
    """What NAT_CHANGE does."""

    ADD = 1
    REPLACE = 2
    SET = 3
    REMOVE = 4


def pack_end(end: Endpoint | None) -> bytes:
    """struct sockmi_dev_endpoint: IPv4 as v4-mapped."""
    if end is None:
        return NOBODY
    address = end.address
    raw = b"\0" * 10 + b"\xff\xff" + address.packed if isinstance(address, IPv4Address) else address.packed
    return END.pack(raw, end.port, 0, 0)


def unpack_end(data: bytes) -> Endpoint | None:
    """Its inverse."""
    if data == NOBODY:
        return None
    raw, port, reserved, scope = END.unpack(data)
    assert reserved == scope == 0
    address = IPv6Address(raw)
    return Endpoint(address.ipv4_mapped or address, port)


@dataclass(frozen=True)
class Flow:
    """struct sockmi_ioc_nat_flow."""

    local: Endpoint | None
    remote: Endpoint | None
    flags: Flag = NO_FLAG
    to: Endpoint | None = None
    hold_ms: int = 0
    tag: bytes = bytes(16)
    id: int = field(default=0, compare=False)
    packets: int = field(default=0, compare=False)
    bytes: int = field(default=0, compare=False)
    held: int = field(default=0, compare=False)
    muted: int = field(default=0, compare=False)
    errors: int = field(default=0, compare=False)
    seen: Seen = field(default=UNSEEN, compare=False)
    idle_s: int = field(default=0, compare=False)
    kept: int = field(default=0, compare=False)

    def pack(self) -> bytes:
        """As the kernel reads it."""
        ends = (pack_end(end) for end in (self.local, self.remote, self.to))
        return WHOLE.pack(*ends, self.flags, self.hold_ms, self.tag, *[0] * 10)

    @classmethod
    def unpack(cls, data: bytes) -> Flow:
        """As the kernel wrote it."""
        local, remote, to, flags, hold_ms, tag, *counts, seen, idle_s, kept, reserved = WHOLE.unpack(data)
        assert reserved == 0
        ends = [unpack_end(end) for end in (local, remote, to)]
        return cls(ends[0], ends[1], Flag(flags), ends[2], hold_ms, tag, *counts, Seen(seen), idle_s, kept)


def held(ends: FourTuple, flags: Flag = Flag.HOLD | Flag.MUTE, hold_ms: int = 0) -> Flow:
    """A rule that rewrites nothing."""
    return Flow(ends.local, ends.remote, flags, hold_ms=hold_ms)


def redirect(ends: FourTuple, to: Endpoint) -> Flow:
    """The exporter's rule once the importer is ready."""
    return Flow(ends.local, ends.remote, Flag.REDIRECT | Flag.MUTE, to)


def translate(here: Endpoint, ends: FourTuple, flags: Flag = NO_FLAG) -> Flow:
    """The importer's rule: ``ends`` as the peer knows them, ``here`` the copy's own end."""
    return Flow(here, ends.remote, Flag.TRANSLATE | flags, ends.local)


class BatchError(OSError):
    """A batch stopped; ``done`` took effect before."""

    def __init__(self, error: int | None, done: int) -> None:
        super().__init__(error, f"{os.strerror(error or 0)} after {done} flows")
        self.done = done


class Nat:
    """The helper of the network namespace in which this is made."""

    def __init__(self) -> None:
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.call(HELLO, HELLO_ARG.pack(1, 0, *[0] * 10))
        except BaseException:
            self.close()  # it would keep the module loaded
            raise

    def close(self) -> None:
        os.close(self.fd)

    def call(self, ordinal: int, argument: bytes) -> bytes:
        """One ioctl; the argument as the kernel left it. OSError."""
        buffer = bytearray(argument)
        fcntl.ioctl(self.fd, 3 << 30 | len(buffer) << 16 | MAGIC << 8 | ordinal, buffer)
        return bytes(buffer)

    def failing_call(self, ordinal: int, argument: bytes) -> tuple[int, bytes]:
        """(errno or 0, the argument afterwards)."""
        buffer = bytearray(argument)
        try:
            fcntl.ioctl(self.fd, 3 << 30 | len(buffer) << 16 | MAGIC << 8 | ordinal, buffer)
        except OSError as error:
            return error.errno or 0, bytes(buffer)
        return 0, bytes(buffer)

    def change(self, action: Action, *flows: Flow) -> None:
        """BatchError."""
        self.change_packed(action, b"".join(flow.pack() for flow in flows), len(flows))

    def change_packed(self, action: int, data: bytes, count: int, flow_bytes: int = WHOLE.size) -> None:
        buffer = _Buffer(data)
        error, back = self.failing_call(CHANGE, CHANGE_ARG.pack(buffer.address, count, flow_bytes, action, 0))
        done = CHANGE_ARG.unpack(back)[4]
        if error:
            raise BatchError(error, done)
        assert done == count

    def add(self, *flows: Flow) -> None:
        self.change(Action.ADD, *flows)

    def set(self, *flows: Flow) -> None:
        self.change(Action.SET, *flows)

    def replace(self, *flows: Flow) -> None:
        self.change(Action.REPLACE, *flows)

    def remove(self, *flows: Flow) -> None:
        self.change(Action.REMOVE, *flows)

    def read(self, *flows: Flow) -> list[Flow]:
        """The flows of these tuples. BatchError."""
        buffer = _Buffer(b"".join(flow.pack() for flow in flows))
        error, back = self.failing_call(READ, READ_ARG.pack(buffer.address, len(flows), WHOLE.size, 0, 0, 0))
        done = READ_ARG.unpack(back)[4]
        if error:
            raise BatchError(error, done)
        return [Flow.unpack(part) for part in buffer.parts(WHOLE.size, done)]

    def one(self, ends: FourTuple | Flow) -> Flow:
        """The flow of one tuple."""
        return self.read(Flow(ends.local, ends.remote))[0]

    def pages(self, size: int = 1000) -> Iterator[Sequence[Flow]]:
        """All flows, so many at a time."""
        after = 0
        buffer = _Buffer(bytes(WHOLE.size * size))
        while True:
            back = self.call(LIST, READ_ARG.pack(buffer.address, size, WHOLE.size, after, 0, 0))
            _unused, count, _unused, after, _unused, _unused = READ_ARG.unpack(back)
            if count:
                yield [Flow.unpack(part) for part in buffer.parts(WHOLE.size, count)]
            if count < size:
                return

    def list(self) -> list[Flow]:
        return [flow for page in self.pages() for flow in page]

    def total(self) -> int:
        """How many flows there are."""
        return int(READ_ARG.unpack(self.call(LIST, READ_ARG.pack(0, 0, WHOLE.size, 0, 0, 0)))[5])

    def flush(self, flags: int = 0) -> int:
        return int(FLUSH_ARG.unpack(self.call(FLUSH, FLUSH_ARG.pack(flags, 0)))[1])


class _Buffer:
    """Memory with an address."""

    def __init__(self, data: bytes) -> None:
        self._memory = ctypes.create_string_buffer(data, max(len(data), 1))
        self.address = ctypes.addressof(self._memory)

    def parts(self, size: int, count: int) -> Iterable[bytes]:
        raw = self._memory.raw
        return [raw[size * i : size * (i + 1)] for i in range(count)]


@contextlib.contextmanager
def opened() -> Iterator[Nat]:
    """The helper of the calling thread's namespace; its flows are gone afterwards."""
    nat = Nat()
    try:
        yield nat
    finally:
        nat.flush()
        nat.close()
