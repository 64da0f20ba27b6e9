# SPDX-License-Identifier: MIT
"""A daemon for tests: it has sockets, hosts that take them, and its moods."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sockmi import api
from tests.unit.test_modules import HEARD, WEB, record, row


def refusal(code: str) -> dict[str, str]:
    return {"code": code, "message": f"It said {code}.", "errno": "EIO"}


class Daemon:
    """Has ``count`` sockets, with the descriptors 1, 2 ...; ``moves`` tells what went where.

    ``say``: (descriptor, target) -> None to move it, a refusal code, or an error for the whole request;
    ConnectionError: it is not begun, and the connection ends when the others have moved.
    ``imports`` wait in its lists, and none moves: ``say_listed`` is told its id.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.rows = {number: self._row(number) for number in range(1, count + 1)}
        self.quiet: Callable[[int], bool] = lambda _number: True
        self.say: Callable[[int, str | None], str | Exception | None] = lambda _number, _target: None
        self.listed: Callable[[], None] = lambda: None
        self.under_way: Callable[[], int] = lambda: 0
        self.moves: list[tuple[int, str | None]] = []
        self.imports: list[dict[str, Any]] = []
        self.say_listed: Callable[[str], None] = lambda _id: None
        self.records: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self._broken = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _row(self, number: int) -> dict[str, Any]:
        return {
            **row(number),
            **{"process": "x", "unit": None, "user_id": 0, "kind": "connected", "state": "ESTABLISHED"},
            **{"remote": f"192.0.2.9:{4000 + number}", "receive_queue_bytes": 0, "send_queue_bytes": 0},
            **{"received_bytes": 7, "refusal": None},
        }

    def add(self, number: int) -> None:
        self.rows[number] = self._row(number)

    def _serve(self) -> None:
        while True:
            try:
                connection, _unused = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                api.parse_request(line)
                request = json.loads(line)
                self.requests.append(request)
                self._broken = False
                answer = {
                    "list": self._list,
                    "export": self._export,
                    "status": self._status,
                    "groups": self._groups,
                    "info": self._info,
                }[request["op"]](request)
                if self._broken:
                    return
                connection.sendall(json.dumps({"ok": True, **answer}).encode() + b"\n")

    def _status(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {"host": "a", "migrations_under_way": self.under_way()}

    def _groups(self, _request: dict[str, Any]) -> dict[str, Any]:
        members = [{**HEARD, "host": name} for name in ("b", "c")]
        return {"groups": [{**WEB, "members": members}]}

    def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["table"] == "imports":
            return {"imports": list(self.imports)}
        self.listed()
        idle = "idle_s" in request["filter"]
        rows = [one for number, one in self.rows.items() if not idle or self.quiet(number)]
        return {"sockets": rows}

    def _export(self, request: dict[str, Any]) -> dict[str, Any]:
        records = []
        for one in request["sockets"]:
            if "listed" in one:
                self.say_listed(one["listed"])
                records.append(record(outcome="refused", pid=None, refusal=refusal("no-such-socket")))
                continue
            number = one["fd"]
            assert one["inode"] == number
            said = self.say(number, request.get("to"))
            if isinstance(said, ConnectionError):
                self._broken = True
                continue
            if isinstance(said, Exception):
                return {"ok": False, "error": refusal(str(said))}
            records.append(self._record(number, one, request, said))
            self.records[one["migration_id"]] = records[-1]
        return {"migrations": records}

    def _info(self, request: dict[str, Any]) -> dict[str, Any]:
        known = [self.records[one] for one in request["migration_ids"] if one in self.records]
        return {"migrations": [{**one, "direction": "export"} for one in known]}

    def _record(
        self, number: int, one: dict[str, Any], request: dict[str, Any], said: str | None
    ) -> dict[str, Any]:
        known = {
            "migration_id": one["migration_id"],
            "pid": one["pid"],
            "fd": number,
            "to": request.get("to"),
        }
        if said is not None:
            remote = f"192.0.2.9:{4000 + number}"
            return record(**known, remote=remote, outcome="refused", refusal=refusal(said))
        if request["dry_run"]:
            return record(**known, remote=self.rows[number]["remote"], outcome="planned")
        self.moves.append((number, request.get("to")))
        return record(**known, remote=self.rows.pop(number)["remote"])

    def close(self) -> None:
        self._listener.close()
