# SPDX-License-Identifier: MIT
"""nftables sets and maps: batched changes through the C library, look-up and listing."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator

from sockmi import native

INET = 1  # NFPROTO_INET
NETDEV = 5  # NFPROTO_NETDEV

_SET = struct.Struct("=BBBx32s32s")  # struct sockmi_nft_set
_OP = struct.Struct("=BBxxI40s16s")  # struct sockmi_nft_op
_ADD, _REMOVE = 0, 1
_NFNL_SUBSYS_NFTABLES = 10 << 8
_NFT_MSG_GETTABLE, _NFT_MSG_GETCHAIN, _NFT_MSG_GETSETELEM = 1, 4, 13
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_BYTES = 1 << 18
_WALKS_MAX = 20
_REHASH_S = 0.01


class NftSet:
    """A set, or a map if ``data_bytes`` is not 0; fields of a concatenated key are padded to 4 bytes.

    Made once and the key of every batch: so it is hashed by its identity, and ``packed`` for C in advance.
    """

    __slots__ = ("data_bytes", "family", "key_bytes", "name", "packed", "table")

    def __init__(self, family: int, table: str, name: str, key_bytes: int, data_bytes: int = 0) -> None:
        self.family = family
        self.table = table
        self.name = name
        self.key_bytes = key_bytes
        self.data_bytes = data_bytes
        self.packed = _SET.pack(family, key_bytes, data_bytes, table.encode(), name.encode())


@functools.cache
def _library() -> ctypes.CDLL:
    lib = native.library()
    lib.sockmi_nft_open.argtypes = (ctypes.c_uint,)
    lib.sockmi_nft_open.restype = ctypes.c_void_p
    lib.sockmi_nft_close.argtypes = (ctypes.c_void_p,)
    lib.sockmi_nft_close.restype = None
    lib.sockmi_nft_has_destroy.argtypes = (ctypes.c_void_p,)
    lib.sockmi_nft_has_destroy.restype = ctypes.c_int
    lib.sockmi_nft_batch.argtypes = (
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.POINTER(ctypes.c_size_t),
    )
    lib.sockmi_nft_batch.restype = ctypes.c_int
    return lib


class Batch:
    """Changes that will be one transaction; list equal operations on one set together."""

    def __init__(self) -> None:
        self.sets: dict[NftSet, int] = {}
        self.ops: list[bytes] = []
        self.afterwards: list[Callable[[], object]] = []

    def _index(self, nftset: NftSet) -> int:
        return self.sets.setdefault(nftset, len(self.sets))

    def add(self, nftset: NftSet, items: Iterable[tuple[bytes, bytes]], timeout_ms: int = 0) -> None:
        """Add (key, data) elements; present ones must have the same data. 0: no timeout."""
        index, pack = self._index(nftset), _OP.pack
        self.ops += [pack(_ADD, index, timeout_ms, key, data) for key, data in items]

    def remove(self, nftset: NftSet, keys: list[bytes]) -> None:
        """Remove elements; absent ones are no error."""
        index, pack = self._index(nftset), _OP.pack
        self.ops += [pack(_REMOVE, index, 0, key, b"") for key in keys]

    def put(self, nftset: NftSet, keys: list[bytes], datas: list[bytes], timeout_ms: int = 0) -> None:
        """Add elements or replace their data and timeout."""
        self.remove(nftset, keys)
        self.add(nftset, zip(keys, datas, strict=True), timeout_ms)

    def then(self, call: Callable[[], object]) -> None:
        """Make ``call`` once the transaction is committed."""
        self.afterwards.append(call)


class NftSocket:
    """A netlink socket in the network namespace of the thread that makes it; one caller at a time."""

    def __init__(self, use_destroy: bool = True) -> None:
        """``use_destroy=False`` does without what only Linux >= 6.3 has, even where it is."""
        self._lib = _library()
        self._handle: int | None = self._lib.sockmi_nft_open(0 if use_destroy else 1)
        if not self._handle:
            number = ctypes.get_errno()
            raise OSError(
                number, f"nftables netlink socket: {os.strerror(number)}; the daemon must run as root"
            )
        self._reader = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 12)
        self._reader.bind((0, 0))
        self._seq = 0

    @property
    def has_destroy(self) -> bool:
        """Whether removals of absent elements need no second try."""
        return bool(self._lib.sockmi_nft_has_destroy(self._handle))

    def commit(self, batch: Batch) -> None:
        """Apply all of ``batch`` or nothing; OSError names the set whose element failed."""
        if batch.ops:
            self._commit(batch)
        for call in batch.afterwards:
            call()

    def _commit(self, batch: Batch) -> None:
        sets = b"".join([one.packed for one in batch.sets])
        ops, failed = batch.ops, ctypes.c_size_t()
        result = self._lib.sockmi_nft_batch(
            self._handle, sets, len(batch.sets), b"".join(ops), len(ops), ctypes.byref(failed)
        )
        if result:
            where = "the batch"
            if failed.value < len(ops):
                nftset = list(batch.sets)[ops[failed.value][1]]
                where = f"set {nftset.name} of table {nftset.table}"
            hint = "; run setup() first" if result == -errno.ENOENT else ""
            raise OSError(-result, f"nftables: {where}: {os.strerror(-result)}{hint}")

    def get(self, nftset: NftSet, key: bytes) -> bytes | None:
        """The data of one element (empty for a set), or None if it is absent or has expired."""
        value = _attr(1, key[: nftset.key_bytes])  # NFTA_DATA_VALUE
        element = _attr(0x8001, _attr(0x8001, value))  # NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY
        for found, data in self._request(nftset, 0, _attr(0x8003, element)):
            if found == key[: nftset.key_bytes]:
                return data
        return None

    def dump(self, nftset: NftSet) -> list[tuple[bytes, bytes]]:
        """All (key, data) of a set; concurrent changes may or may not be seen.

        A set that has just grown or shrunk is rehashed by the kernel in the background, and a walk that
        meets this misses elements (nft_rhash_walk()): so it is read until two walks agree.
        """
        found = dict(self._request(nftset, _NLM_F_DUMP, b""))
        for _turn in range(_WALKS_MAX):
            again = dict(self._request(nftset, _NLM_F_DUMP, b""))
            if again == found:
                break
            found = again
            time.sleep(_REHASH_S)
        return list(found.items())

    def table(self, family: int, name: str) -> bytes | None:
        """What no other table has had since the boot: its handle; None if there is none of that name."""
        asked = _attr(1, name.encode() + b"\0")  # NFTA_TABLE_NAME
        for answer in self._answers(_NFT_MSG_GETTABLE, family, asked, f"table {name}"):
            return next(
                (bytes(value) for kind, value in _attrs(answer) if kind == 4), b""
            )  # NFTA_TABLE_HANDLE
        return None

    def chain(self, family: int, table: str, name: str) -> tuple[bytes, bytes] | None:
        """Its handle, and the number of its rules and of those that lead to it; None if it is not there."""
        # NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
        asked = _attr(1, table.encode() + b"\0") + _attr(3, name.encode() + b"\0")
        for answer in self._answers(_NFT_MSG_GETCHAIN, family, asked, f"chain {name}"):
            found = {kind: bytes(value) for kind, value in _attrs(answer)}
            return found.get(2, b""), found.get(6, b"")  # NFTA_CHAIN_HANDLE, NFTA_CHAIN_USE
        return None

    def _request(self, nftset: NftSet, flags: int, elements: bytes) -> Iterator[tuple[bytes, bytes]]:
        asked = _attr(1, nftset.table.encode() + b"\0") + _attr(2, nftset.name.encode() + b"\0") + elements
        what = f"set {nftset.name}"
        for answer in self._answers(_NFT_MSG_GETSETELEM, nftset.family, asked, what, flags):
            yield from _elements(answer)

    def _answers(
        self, message: int, family: int, asked: bytes, what: str, flags: int = 0
    ) -> Iterator[memoryview]:
        """The attributes of each answer; none if what is asked for is not there."""
        self._seq += 1
        seq = self._seq
        body = struct.pack("=BBH", family, 0, 0) + asked
        kind = _NFNL_SUBSYS_NFTABLES | message
        header = struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | flags, seq, 0)
        self._reader.send(header + body)
        while True:
            answer = memoryview(self._reader.recv(_DUMP_BYTES))
            while len(answer) >= 16:
                length, kind, _unused, of, _unused = struct.unpack_from("=IHHII", answer)
                payload, answer = answer[16:length], answer[(length + 3) & ~3 :]
                if of != seq:
                    continue  # the rest of a dump that nobody read to its end
                if kind == _NLMSG_ERROR:
                    (error,) = struct.unpack_from("=i", payload)
                    if error == -errno.ENOENT and not flags:
                        return
                    raise OSError(-error, f"nftables: {what}: {os.strerror(-error)}")
                if kind == _NLMSG_DONE:
                    return
                yield payload[4:]
                if not flags:
                    return

    def close(self) -> None:
        """Close the sockets; nothing in the kernel changes."""
        if self._handle:
            self._lib.sockmi_nft_close(self._handle)
            self._handle = None
            self._reader.close()


def _attr(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def _attrs(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def _value(data: memoryview) -> bytes:
    return next((bytes(value) for kind, value in _attrs(data) if kind == 1), b"")


def _elements(message: memoryview) -> Iterator[tuple[bytes, bytes]]:
    for kind, elements in _attrs(message):
        if kind != 3:  # NFTA_SET_ELEM_LIST_ELEMENTS
            continue
        for _unused, element in _attrs(elements):
            key = data = b""
            for part, value in _attrs(element):
                if part == 1:  # NFTA_SET_ELEM_KEY
                    key = _value(value)
                elif part == 2:  # NFTA_SET_ELEM_DATA
                    data = _value(value)
            yield key, data
