# SPDX-License-Identifier: MIT
"""Exports that a plain shell asks for: ``sysctl -w sockmi.export="pid=510 fd=5 [to=ADDRESS]"``.

The module claims the socket and hands the command to us; the writer waits for our answer. A move is begun
only after the command was taken: from then on the writer can no longer withdraw it (kmod/uapi/sockmi.h, "An
export by the sysctl"). What is not committed is undone before the writer would have waited too long.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import logging
import os
from ipaddress import IPv6Address
from typing import Any

from sockmi.api import ERRNO
from sockmi.engine.closing import close_all
from sockmi.engine.duplicate import duplicate
from sockmi.exporting import Selected
from sockmi.frozen import frozen
from sockmi.native import library
from sockmi.parts import Parts
from sockmi.protocol.records import BatchId
from sockmi.refusal import Code, Refusal

_log = logging.getLogger(__name__)

_REQUESTS_AT_ONCE = 16
_TEXT_BYTES_MAX = 95  # SOCKMI_ANSWER_TEXT, without its zero
_RETRY_S = 5.0
# Shares of the time that the writer waits: for an offer, and until what is not committed is undone.
_NEGOTIATING, _UNDECIDED = 0.6, 0.8


class _Request(ctypes.Structure):
    """``struct sockmi_export_request`` of serve.h."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("owner_pid", ctypes.c_int32),
        ("owner_fd", ctypes.c_int32),
        ("writer_pid", ctypes.c_int32),
        ("writer_uid", ctypes.c_uint32),
        ("wait_ms", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("to", ctypes.c_uint8 * 16),
    )


@functools.cache
def _native() -> Any:
    """libsockmi-engine, with the prototypes of the functions used here."""
    lib = library()
    fd, request_id = ctypes.c_int, ctypes.c_uint64
    lib.sockmi_serve_read.argtypes = [fd, ctypes.POINTER(_Request), ctypes.c_size_t]
    lib.sockmi_serve_take.argtypes = [fd, request_id]
    lib.sockmi_serve_answer.argtypes = [fd, request_id, ctypes.c_uint32, ctypes.c_char_p]
    return lib


@frozen
class Command:
    """One write to the sysctl; ``to``: the address of the wanted host, None: any."""

    id: int
    pid: int
    fd: int
    inode: int
    to: str | None
    writer_pid: int
    writer_uid: int
    wait_s: float

    @classmethod
    def of(cls, request: _Request) -> Command:
        """From what the module tells."""
        address = IPv6Address(bytes(request.to))
        to = None if address.is_unspecified else str(address.ipv4_mapped or address)
        return cls(
            request.id, request.owner_pid, request.owner_fd, request.inode, to,
            request.writer_pid, request.writer_uid, request.wait_ms / 1000,
        )  # fmt: skip

    def __str__(self) -> str:
        wanted = f" to={self.to}" if self.to else ""
        return f"sysctl sockmi.export=pid={self.pid} fd={self.fd}{wanted}"


class SysctlExports:
    """Serves this network namespace's sysctl, where the engine is the kernel's. All calls from one thread."""

    def __init__(self, daemon: Parts) -> None:
        self._daemon = daemon
        self._file = -1
        self._retry: asyncio.TimerHandle | None = None
        self._told_busy = False
        self._giving_up: dict[int, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Begin to serve; where another program does, as soon as that has ended."""
        if self._daemon.shell.engine.name != "kernel":
            return
        self._retry = None
        fd = _native().sockmi_serve_open()
        if fd >= 0:
            self._file = fd
            self._daemon.loop.add_reader(fd, self._readable)
            _log.info("this daemon serves the sysctl sockmi.export now")
        elif fd == -errno.EBUSY:
            if not self._told_busy:
                _log.warning("another program serves the sysctl sockmi.export of this network namespace")
            self._told_busy = True
            self._retry = self._daemon.loop.call_later(_RETRY_S, self.start)
        elif fd == -errno.EPROTONOSUPPORT:
            _log.warning(
                "the sysctl sockmi.export is not served: the loaded module is older than this daemon; "
                "install both of the same release"
            )
        else:
            _log.warning("the sysctl sockmi.export cannot be served: %s", os.strerror(-fd))

    def close(self) -> None:
        """Serve no more; writers that still wait are told that the daemon has ended."""
        if self._retry is not None:
            self._retry.cancel()
        for timer in self._giving_up.values():
            timer.cancel()
        if self._file >= 0:
            self._daemon.loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _readable(self) -> None:
        requests = (_Request * _REQUESTS_AT_ONCE)()
        count = _native().sockmi_serve_read(self._file, requests, _REQUESTS_AT_ONCE)
        if count < 0:
            _log.error("the sysctl sockmi.export is served no more: %s", os.strerror(-count))
            self.close()
            return
        for request in requests[:count]:
            self._begin(Command.of(request))

    def _begin(self, command: Command) -> None:
        try:
            selected, refusal = self._selected(command), None
        except Refusal as why:
            selected, refusal = None, why
        if (
            _native().sockmi_serve_take(self._file, command.id) < 0
        ):  # the writer has gone, or its claim has ended
            if selected is not None:
                close_all([selected.descriptor])
            self._answer(command, errno.ETIMEDOUT, "it was read too late: nothing was done")
        elif selected is None:
            assert refusal is not None
            self._refuse(command, refusal)
        else:
            self._export(command, selected)

    def _selected(self, command: Command) -> Selected:
        if self._daemon.stopping:
            raise Refusal(Code.SHUTTING_DOWN, "this daemon is stopping")
        if command.pid == os.getpid():
            raise Refusal(Code.OWNER_IS_DAEMON, "that is this daemon's own descriptor")
        if not command.pid:
            raise Refusal(Code.NO_SUCH_SOCKET, "the process is not in this daemon's pid namespace")
        descriptor = duplicate(command.pid, command.fd, command.inode)
        return Selected(descriptor, command.pid, command.fd, user_id=command.writer_uid)

    def _export(self, command: Command, selected: Selected) -> None:
        exporting = self._daemon.exporting
        try:
            target = self._daemon.members.target(command.to)
        except Refusal as refusal:
            close_all([selected.descriptor])
            self._refuse(command, refusal)
            return
        try:
            batch = exporting.admission.export(
                [selected],
                target=target,
                timeout_s=command.wait_s * _NEGOTIATING,
                dry_run=False,
                done=lambda records: self._done(command, records[0]),
            )
        except Exception as error:
            _log.exception("%s", command)
            message = f"the daemon failed ({error}); its log has the details"
            self._refuse(command, Refusal(Code.INTERNAL, message))
            return
        if batch in exporting.batches:
            wait_s = command.wait_s * _UNDECIDED
            self._giving_up[command.id] = self._daemon.loop.call_later(wait_s, self._give_up, command, batch)

    def _give_up(self, command: Command, batch: BatchId) -> None:
        """What is committed goes on, and is told to readers; all else is undone."""
        self._giving_up.pop(command.id, None)
        _log.info("%s: it takes too long; what is not committed is undone", command)
        self._daemon.exporting.admission.cancel(batch)

    def _done(self, command: Command, record: dict[str, Any]) -> None:
        if (timer := self._giving_up.pop(command.id, None)) is not None:
            timer.cancel()
        refusal = record.get("refusal")
        if record["outcome"] == "moved":
            self._answer(command, 0, f"moved to {record['to']}, migration {record['migration_id']}")
        elif refusal is not None:
            self._refuse(command, Refusal(Code(refusal["code"]), refusal["message"]), record["outcome"])
        else:
            self._answer(command, errno.EIO, f"{record['outcome']}, migration {record['migration_id']}")

    def _refuse(self, command: Command, refusal: Refusal, outcome: str = "refused") -> None:
        self._answer(command, getattr(errno, ERRNO[refusal.code]), f"{outcome}, {refusal}")

    def _answer(self, command: Command, error: int, text: str) -> None:
        """Tell the writer and the readers, the latter as much as there is room for, and the log."""
        _log.log(
            logging.WARNING if error else logging.INFO,
            "%s by process %d of user %d: %s%s",
            command, command.writer_pid, command.writer_uid, text,
            f" ({errno.errorcode[error]})" if error else "",
        )  # fmt: skip
        if self._file < 0:
            return
        line = " ".join(text.split()).encode()[:_TEXT_BYTES_MAX].decode(errors="ignore").encode()
        failed = -_native().sockmi_serve_answer(self._file, command.id, error, line)
        if failed and failed != errno.ENOENT:  # ENOENT: it was withdrawn
            _log.error("%s: the answer cannot be given: %s", command, os.strerror(failed))
