# SPDX-License-Identifier: MIT
"""The daemon's `Routes`, in a process of its own: pyroute2 takes 4 MB, and is asked at times only.

That is: at the daemon's start, when addresses change, and in negotiations, before a freeze. The process is
started when there is something to ask (0.1 s, for which the daemon waits), in the caller's network namespace,
and ends by itself when it has not been asked for ``IDLE_S``: it is still there when an address is taken over.
A request ``(settings, method, arguments, named ones)`` is pickled to standard input; ``(True, result)`` or
``(False, error)`` comes back.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sockmi.redirect.settings import Settings

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

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """What ``Routes.method`` returns or raises. It may be done twice, if the process dies over it."""
        with self._lock:
            try:
                good, answer = self._asked((self._settings, method, arguments, named))
            except (BrokenPipeError, EOFError):  # it has ended
                self._close()
                try:
                    good, answer = self._asked((self._settings, method, arguments, named))
                except (BrokenPipeError, EOFError):
                    self._close()
                    raise ChildProcessError(
                        f"routes: sockmi.redirect.routes_worker ended twice over {method}; see sockmid's log"
                    ) from None
        if not good:
            raise answer
        return answer

    def close(self) -> None:
        """End the process, and wait until it has: none is to be left when the daemon ends."""
        with self._lock:
            process = self._process
            self._close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)

    def _asked(self, request: tuple[Any, ...]) -> tuple[bool, Any]:
        process = self._process = self._process or _start(self._idle_s)
        assert process.stdin and process.stdout
        process.stdin.write(pickle.dumps(request))
        process.stdin.flush()
        good, answer = pickle.load(process.stdout)  # noqa: S301 - what our own program has written
        return good, answer

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
    process = subprocess.Popen(
        [*_COMMAND, str(idle_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        process_group=0,  # Ctrl-C is for the daemon, which may need it yet
    )
    threading.Thread(target=process.wait, name="sockmi-routes-end", daemon=True).start()  # no zombie
    return process


def main(idle_s: float) -> None:
    """Serve until standard input ends, or nothing has come for ``idle_s``."""
    from sockmi.redirect.netlink import NetlinkError
    from sockmi.redirect.routes import Routes

    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while select.select([requests], [], [], idle_s)[0]:
        try:
            settings, method, arguments, named = pickle.load(requests)  # noqa: S301 - what the daemon has written
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            answer = True, getattr(Routes(settings), method)(*arguments, **named)
        except NetlinkError as error:  # of a package that the daemon does not load
            answer = False, OSError(error.code, f"netlink: {os.strerror(error.code)}")
        except Exception as error:  # the caller reports it
            answer = False, error
        answers.write(pickle.dumps(answer))
        answers.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
