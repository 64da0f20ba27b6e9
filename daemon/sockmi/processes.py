# SPDX-License-Identifier: MIT
"""When no process may be begun: it would have descriptors that are to be closed, and wait for them."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence

#: Held while a process is begun, and from when a client's descriptors come until those that may keep whoever
#: closes them waiting (``engine.closing.close_aside``) are gone.
no_new_process = threading.RLock()


def run(
    command: Sequence[str], text: str = "", *, timeout_s: float = 10.0
) -> subprocess.CompletedProcess[str]:
    """A program, to its end, with ``text`` on its standard input; from any thread.

    OSError if it cannot be begun (FileNotFoundError: there is no such program), or does not end in time.
    """
    pipe = subprocess.PIPE
    with no_new_process:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    with process:
        try:
            said, complained = process.communicate(text, timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(
                f"the program {command[0]} has not ended within {timeout_s:g} s; try again when this host is "
                "less busy"
            ) from None
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)
