# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The SockMi daemon's control socket for Ansible modules: standard library only, Python 3.8 and later.

Sockets are named by process and descriptor; the daemon duplicates them itself, so the caller must
be an administrator. The protocol is docs/control.md.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

CONTROL_PATH = "/run/sockmi/control.sock"
LINE_BYTES_MAX = 1 << 20
EXPORTS_PER_REQUEST = 4096


class ControlError(Exception):
    """The daemon cannot be reached, or refused a whole request; ``code`` is "" or a refusal code."""

    def __init__(self, message: str, code: str = "", errno_name: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.errno_name = errno_name


class ControlClient:
    """A connection to the daemon; a context manager. Closing it cancels what is under way.

    ``timeout_s`` limits each wait for a line, None waits for ever.
    """

    def __init__(self, path: str | None = None, timeout_s: float | None = None) -> None:
        self.path = path or os.environ.get("SOCKMI_CONTROL") or CONTROL_PATH
        self._received = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(self.path)
        except OSError as error:
            self._socket.close()
            raise ControlError(
                f"{self.path}: {error.strerror or error}. Is the SockMi daemon running, "
                "and may this user use it?"
            ) from None

    @classmethod
    def when_ready(
        cls, path: str | None = None, timeout_s: float | None = None, wait_s: float = 0.0
    ) -> ControlClient:
        """Connect, trying for ``wait_s`` seconds: for a daemon that has just been started."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return cls(path, timeout_s)
            except ControlError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def lines(self, op: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Send a request and yield the response's lines (dicts). None stands for a field's default."""
        request = {name: value for name, value in fields.items() if value is not None}
        request["op"] = op
        self._send(json.dumps(request, separators=(",", ":")).encode("utf-8") + b"\n")
        more = True
        while more:
            answer = self._receive()
            if answer.get("ok") is not True:
                error = answer.get("error") or {}
                raise ControlError(
                    error.get("message", "The SockMi daemon's answer has neither ok nor an error."),
                    error.get("code", ""),
                    error.get("errno", ""),
                )
            more = bool(answer.get("more"))
            yield answer

    def one(self, op: str, **fields: Any) -> dict[str, Any]:
        """The response of an op that answers in one line; lists of several lines are joined."""
        joined: dict[str, Any] = {}
        for answer in self.lines(op, **fields):
            for name, value in answer.items():
                if isinstance(value, list):
                    joined.setdefault(name, []).extend(value)
                else:
                    joined[name] = value
        joined.pop("more", None)
        return joined

    def export(
        self,
        sockets: Iterable[dict[str, Any]],
        to: str | None = None,
        timeout_s: float | None = None,
        dry_run: bool = False,
    ) -> list[dict[str, Any]]:
        """Move sockets (dicts of pid and fd, or listed, and maybe migration_id); their records, in order."""
        records: list[dict[str, Any]] = []
        sockets = list(sockets)
        for first in range(0, len(sockets), EXPORTS_PER_REQUEST):
            chunk = sockets[first : first + EXPORTS_PER_REQUEST]
            answer = self.one("export", sockets=chunk, to=to, timeout_s=timeout_s, dry_run=dry_run)
            records += _rows(answer, "migrations")
        if len(records) != len(sockets):
            raise ControlError(
                f"The SockMi daemon answered with {len(records)} records for {len(sockets)} sockets."
            )
        return records

    def sockets(self, filter: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of this host's TCP sockets that ``filter`` (a dict) selects."""
        return _rows(self.one("list", table="sockets", filter=filter), "sockets")

    def imports(self, filter: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows of the sockets that wait in the import lists, and that ``filter`` selects."""
        return _rows(self.one("list", table="imports", filter=filter), "imports")

    def redirects(self) -> list[dict[str, Any]]:
        """Rows of this host's redirects."""
        return _rows(self.one("list", table="redirects"), "redirects")

    def status(self) -> dict[str, Any]:
        """The daemon at a glance."""
        return self.one("status")

    def migrations(self, ids: Iterable[str] = (), wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Records by migration id (none: all under way), as soon as all have ended, or after ``wait_s``."""
        return _rows(self.one("info", migration_ids=list(ids), wait_s=wait_s), "migrations")

    def history(self, **criteria: Any) -> list[dict[str, Any]]:
        """Records of ended migrations, latest first; ``criteria`` as in docs/control.md."""
        return _rows(self.one("history", **criteria), "migrations")

    def groups(self, action: str = "list", **fields: Any) -> tuple[list[dict[str, Any]], bool]:
        """(groups, changed) after ``list``, ``join`` or ``leave``."""
        answer = self.one("groups", action=action, **fields)
        return _rows(answer, "groups"), bool(answer.get("changed"))

    def doctor(self) -> tuple[bool, list[dict[str, Any]]]:
        """(healthy, checks)."""
        answer = self.one("doctor")
        return bool(answer.get("healthy")), _rows(answer, "checks")

    def _send(self, line: bytes) -> None:
        if len(line) > LINE_BYTES_MAX:
            raise ControlError(f"The request has {len(line)} bytes; at most {LINE_BYTES_MAX} fit.")
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise ControlError(f"{self.path}: sending a request: {error}") from None

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            if len(self._received) >= LINE_BYTES_MAX:
                raise ControlError(f"{self.path}: the answer is longer than a line may be.")
            try:
                data = self._socket.recv(1 << 16)
            except socket.timeout:  # noqa: UP041 - not TimeoutError before Python 3.10
                raise ControlError(f"{self.path}: the SockMi daemon does not answer; see its log.") from None
            except OSError as error:
                raise ControlError(f"{self.path}: waiting for the answer: {error}") from None
            if not data:
                raise ControlError(f"{self.path}: the SockMi daemon closed the connection; see its log.")
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        try:
            answer = json.loads(line.decode("utf-8"))
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ControlError(f"{self.path}: the answer is no JSON object.")
        return answer


def _rows(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = answer.get(name, [])
    return rows if isinstance(rows, list) else []
