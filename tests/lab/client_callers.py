# SPDX-License-Identifier: MIT
"""The three forms of the client API behind one face, so that one test suite runs against all."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import functools
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import sockmi
from sockmi import aio

ROOT = Path(__file__).parents[2]
STATES = {"bound": 1, "listening": 2, "connected": 4}


@functools.cache
def build(flags: str = "", compiler: str = "cc") -> Path:
    """Directory with libsockmi.so and sockmi.pc, built with additional flags."""
    place = Path(tempfile.mkdtemp(prefix="smt-client-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    subprocess.run(
        ["make", "-s", "-C", ROOT / "daemon/libsockmi", f"B={place}", "client", f"CC={compiler} {flags}"],
        check=True,
        timeout=120,
    )
    return place


@dataclass
class Got:
    """A satisfied request."""

    request: int
    fd: int
    kind: str
    local: str
    remote: str
    context: bytes
    migration_id: UUID


class Caller(Protocol):
    """One form of the API. ``requests`` are dicts with ``fd``, ``states`` and criteria."""

    def take(self, requests: list[dict[str, Any]], timeout_s: float | None = None) -> list[Got]: ...

    def export(self, fd: int | UUID, pid: int | None = None, **options: Any) -> UUID: ...


class _Python:
    def _requests(self, requests: list[dict[str, Any]]) -> list[sockmi.ImportRequest]:
        return [
            sockmi.ImportRequest(
                one["states"],
                one.get("preferred", ()),
                replace=one["fd"],
                **{k: v for k, v in one.items() if k not in ("fd", "states", "preferred")},
            )
            for one in requests
        ]

    def _got(self, arrived: list[sockmi.Imported]) -> list[Got]:
        return [
            Got(
                one.request,
                one.fd,
                str(one.kind),
                str(one.local),
                str(one.remote),
                one.context,
                one.record.migration_id,
            )
            for one in arrived
        ]


class Synchronous(_Python):
    """sockmi.client"""

    def take(self, requests: list[dict[str, Any]], timeout_s: float | None = None) -> list[Got]:
        return self._got(sockmi.import_socket(self._requests(requests), timeout_s))

    def export(self, fd: int | UUID, pid: int | None = None, **options: Any) -> UUID:
        return sockmi.export_socket(fd, pid=pid, **options).migration_id


class Asynchronous(_Python):
    """sockmi.aio"""

    def take(self, requests: list[dict[str, Any]], timeout_s: float | None = None) -> list[Got]:
        blocking = [os.get_blocking(one["fd"]) for one in requests if one["fd"] >= 0]
        got = self._got(asyncio.run(aio.import_socket(self._requests(requests), timeout_s)))
        for one in got:  # documented: non-blocking; the suite's checks want what was there before
            assert not os.get_blocking(one.fd)
            os.set_blocking(one.fd, blocking[one.request])
        return got

    def export(self, fd: int | UUID, pid: int | None = None, **options: Any) -> UUID:
        return asyncio.run(aio.export_socket(fd, pid=pid, **options)).migration_id


class Endpoint(ctypes.Structure):
    _fields_ = (("af", ctypes.c_int), ("port", ctypes.c_uint), ("address", ctypes.c_ubyte * 16))

    def fill(self, address: str | None, port: int | None) -> None:
        self.port = port or 0
        if address:
            packed = ip_address(address).packed
            self.af = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            self.address[: len(packed)] = packed

    def __str__(self) -> str:
        if not self.af:
            return "None"
        if self.af == socket.AF_INET:
            return f"{ip_address(bytes(self.address[:4]))}:{self.port}"
        return f"[{ip_address(bytes(self.address))}]:{self.port}"


Id = ctypes.c_ubyte * 16


class ImportReq(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int),
        ("states", ctypes.c_uint),
        ("preferred", ctypes.c_uint),
        ("local", Endpoint),
        ("remote", Endpoint),
        ("listener", Id),
        ("returned", ctypes.c_uint),
        ("returned_local", Endpoint),
        ("returned_remote", Endpoint),
        ("returned_origin", Endpoint),
        ("returned_listener", Id),
        ("migration", Id),
        ("reserved", ctypes.c_ubyte * 32),
    )


class Context(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class ImportOptions(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("contexts", ctypes.POINTER(Context)),
    )


class ExportOptions(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("control", ctypes.c_char_p),
        ("host", ctypes.c_char_p),
        ("context", ctypes.c_char_p),
        ("context_bytes", ctypes.c_size_t),
        ("timeout", ctypes.c_int),
        ("flags", ctypes.c_uint),
        ("migration", Id),
    )


class Result(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("migration", Id),
        ("host", ctypes.c_char * 256),
        ("mode", ctypes.c_char * 16),
        ("blackout_us", ctypes.c_uint64),
        ("receive_queue_bytes", ctypes.c_uint64),
        ("sent_bytes", ctypes.c_uint64),
        ("unsent_bytes", ctypes.c_uint64),
        ("hop", ctypes.c_uint),
    )


class Error(ctypes.Structure):
    _fields_ = (("errnum", ctypes.c_int), ("code", ctypes.c_char_p), ("message", ctypes.c_char_p))


class C:
    """libsockmi.so"""

    def __init__(self) -> None:
        built = os.environ.get("SOCKMI_CLIENT_LIBRARY")  # where there is no compiler
        self.library = ctypes.CDLL(built or str(build() / "libsockmi.so"), use_errno=True)
        self.library.sockmi_last_error.restype = ctypes.POINTER(Error)
        self.library.import_socket_ex.argtypes = [
            ctypes.POINTER(ImportReq),
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.POINTER(ImportOptions),
        ]

    def fail(self) -> OSError:
        """What the last call says."""
        error = self.library.sockmi_last_error().contents
        assert error.errnum == ctypes.get_errno()
        assert error.message
        return sockmi.SockMiError(error.errnum, error.message.decode(), error.code.decode())

    def take(self, requests: list[dict[str, Any]], timeout_s: float | None = None) -> list[Got]:
        irqs = (ImportReq * max(len(requests), 1))()
        contexts = (Context * max(len(requests), 1))()
        for irq, one in zip(irqs, requests, strict=False):
            irq.fd = one["fd"]
            irq.states = sum(STATES.get(str(state), 64) for state in one["states"])
            irq.preferred = sum(STATES[str(state)] for state in one.get("preferred", ()))
            irq.local.fill(one.get("local_address"), one.get("local_port"))
            irq.remote.fill(one.get("remote_address"), one.get("remote_port"))
            if "listener" in one:
                irq.listener[:] = one["listener"].bytes
        options = ImportOptions(ctypes.sizeof(ImportOptions), None, contexts)
        timeout = -1 if timeout_s is None else round(timeout_s * 1000)
        n = self.library.import_socket_ex(irqs, len(requests), timeout, options)
        if n < 0:
            raise self.fail()
        got = []
        names = {mask: name for name, mask in STATES.items()}
        for index, (irq, context) in enumerate(zip(irqs, contexts, strict=True)):
            if irq.returned:
                data = ctypes.string_at(context.data, context.bytes) if context.data else b""
                free(context.data)
                got.append(
                    Got(
                        index,
                        irq.fd,
                        names[irq.returned],
                        str(irq.returned_local),
                        str(irq.returned_remote),
                        data,
                        UUID(bytes=bytes(irq.migration)),
                    )
                )
        assert len(got) == n
        return got

    def export(self, fd: int | UUID, pid: int | None = None, **options: Any) -> UUID:
        given = ExportOptions(ctypes.sizeof(ExportOptions))
        address, af = None, 0
        if "to" in options:
            try:
                packed = ip_address(options["to"]).packed
                address, af = packed, socket.AF_INET if len(packed) == 4 else socket.AF_INET6
            except ValueError:
                given.host = options["to"].encode()
        given.context = bytes(options.get("context", b""))
        given.context_bytes = len(options.get("context", b""))
        given.timeout = round(options.get("timeout_s", 0) * 1000)
        given.flags = int(options.get("dry_run", False))
        if "migration_id" in options:
            given.migration[:] = options["migration_id"].bytes
        result = Result(ctypes.sizeof(Result))
        more = af, address, ctypes.byref(given), ctypes.byref(result)
        if isinstance(fd, UUID):
            n = self.library.export_listed(fd.bytes, *more)
        else:
            n = self.library.export_socket_ex(-1 if pid is None else pid, fd, *more)
        if n < 0:
            raise self.fail()
        return UUID(bytes=bytes(result.migration))


def free(data: int | None) -> None:
    """free(3)"""
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(data)


CALLERS: dict[str, type[Any]] = {"C": C, "Python": Synchronous, "asyncio": Asynchronous}
