# SPDX-License-Identifier: MIT
"""The daemon's `Routes`, in a process of its own: pyroute2 takes 4 MB, and is asked at times only.

That is: at the daemon's start, when addresses change, and in negotiations, before a freeze. The process is
started when there is something to ask (0.1 s, and seconds on a slow or busy host: a loop has it woken by a
thread, see awaiting_routes.py), in the caller's network namespace, and ends by itself when it has not been
asked for ``IDLE_S``. While something is frozen it is told to stay.
JSON lines: a request ``[settings, method, arguments, named ones]`` on standard input, ``{"result": ...}`` or
``{"error": text, "errno": number or null}`` back; what JSON has no word for is in ``_plain``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from sockmi.processes import no_new_process
from sockmi.redirect.settings import Settings
from sockmi.redirect.ways import Held, Way

IDLE_S = 30.0
_PACKAGES = str(Path(__file__).resolve().parents[2])
_COMMAND = (sys.executable, "-W", "ignore", "-m", "sockmi.redirect.routes_worker")


class RoutesWorker:
    """The process, as its parent sees it; for any thread."""

    def __init__(self, settings: Settings, idle_s: float = IDLE_S) -> None:
        self._settings = settings
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answered_at = -idle_s  # time.monotonic()

    @property
    def awake(self) -> bool:
        """Whether it answers at once, and will for half of its idle time."""
        process = self._process
        fresh = time.monotonic() < self._answered_at + self._idle_s / 2
        return fresh and process is not None and process.returncode is None

    def wake(self) -> None:
        """Start it, if it is not there, and wait until it answers. What is wrong with it, ``call`` tells."""
        with contextlib.suppress(OSError):
            self.call("stay")

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What ``Routes.method`` returns or raises. It may be done twice, if the process dies over it."""
        request = [method, self._settings, arguments, named]
        with self._lock:
            try:
                answer = self._asked(request)
            except (BrokenPipeError, EOFError):  # it has ended
                self._close()
                try:
                    answer = self._asked(request)
                except (BrokenPipeError, EOFError):
                    self._close()
                    raise ChildProcessError(
                        f"routes: sockmi.redirect.routes_worker ended twice over {method}; see sockmid's log"
                    ) from None
        if "error" in answer:
            number, text = answer["errno"], answer["error"]
            raise OSError(text) if number is None else OSError(number, text)
        return answer["result"]

    def stay(self) -> None:
        """If it is there it stays for another while: to start it anew would hold up what is frozen."""
        if not self._lock.acquire(blocking=False):
            return  # it is being asked, or started, which takes its time
        try:
            with contextlib.suppress(BrokenPipeError, EOFError):
                if self._process is not None:
                    self._asked(["stay"])
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process, and wait until it has: none is to be left when the daemon ends."""
        with self._lock:
            process = self._process
            self._close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)

    def _asked(self, request: list[Any]) -> dict[str, Any]:
        process = self._process = self._process or _start(self._idle_s)
        assert process.stdin and process.stdout
        process.stdin.write(_line(request))
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise EOFError
        self._answered_at = time.monotonic()
        answer: dict[str, Any] = json.loads(line, object_hook=_typed)
        return answer

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin and process.stdout
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it has not read
                pipe.close()


def _start(idle_s: float) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, (_PACKAGES, os.environ.get("PYTHONPATH"))))
    with no_new_process:
        process = subprocess.Popen(
            [*_COMMAND, str(idle_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # Ctrl-C is for the daemon, which may need it yet
        )
    threading.Thread(target=process.wait, name="sockmi-routes-end", daemon=True).start()  # no zombie
    return process


def _line(value: Any) -> bytes:
    return json.dumps(value, default=_plain).encode() + b"\n"


def _plain(value: Any) -> dict[str, Any]:
    """The inverse of ``_typed``: ``{"its type": what it is made of}``."""
    match value:
        case IPv4Address() | IPv6Address():
            return {"ip_address": str(value)}
        case bytes():
            return {"bytes": value.hex()}
        case frozenset():
            return {"frozenset": list(value)}
        case Settings() | Way() | Held():
            names = (each.name for each in dataclasses.fields(value))
            return {type(value).__name__: {name: getattr(value, name) for name in names}}
    raise TypeError(f"{type(value).__name__} has no words here")


def _typed(found: dict[str, Any]) -> Any:
    match found:
        case {"ip_address": str(text)}:
            return ip_address(text)
        case {"bytes": str(text)}:
            return bytes.fromhex(text)
        case {"frozenset": list(members)}:
            return frozenset(members)
        case {"Settings": dict(fields)}:
            return Settings(**fields | {"devices": tuple(fields["devices"])})
        case {"Way": dict(fields)}:
            return Way(**fields)
        case {"Held": dict(fields)}:
            return Held(**fields)
    return found


def main(idle_s: float) -> None:
    """Serve until standard input ends, or nothing has come for ``idle_s``."""
    from sockmi.redirect.netlink import IPRoute, NetlinkError
    from sockmi.redirect.routes import Routes

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    ip = IPRoute()
    while select.select([requests], [], [], idle_s)[0]:
        if not (line := requests.readline()):
            return
        answer: dict[str, Any]
        try:
            method, *settings_and_arguments = json.loads(line, object_hook=_typed)
            if method == "stay":
                answer = {"result": None}
            else:
                settings, arguments, named = settings_and_arguments
                answer = {"result": getattr(Routes(settings, ip), method)(*arguments, **named)}
        except NetlinkError as error:  # of a package that the daemon does not load
            answer = {"errno": error.code, "error": f"netlink: {os.strerror(error.code)}"}
        except Exception as error:  # the caller reports it
            answer = _failure(error)
            ip.close()  # what it has not read would be taken for the answer to the next request
            ip = IPRoute()
        try:
            answers.write(_line(answer))
            answers.flush()
        except BrokenPipeError:  # whoever has asked was killed
            os._exit(0)  # the interpreter would write it once more, and complain


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        return {"errno": error.errno, "error": error.strerror or str(error)}
    return {"errno": None, "error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(float(sys.argv[1]))
