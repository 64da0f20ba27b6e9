# SPDX-License-Identifier: MIT
"""A part of a test in a process of its own, with a socket between the two."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable


def start(
    action: Callable[[socket.socket], object], timeout_s: float, *others: socket.socket
) -> tuple[int, socket.socket]:
    """The process of ``action(its end)``, which closes ``others`` first, and our end, with this timeout."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for one in (ours, *others):
                one.close()
            action(theirs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    theirs.close()
    ours.settimeout(timeout_s)
    return child, ours


def end(child: int, ours: socket.socket) -> None:
    """Closes our end, and waits for the process, which must not have failed."""
    ours.close()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
