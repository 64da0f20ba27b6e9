# SPDX-License-Identifier: MIT
"""QEMU's monitor: what can be done to a machine from outside."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from guests.errors import HarnessError

LIMIT = 20  # seconds for an answer


def ask(monitor: Path, command: str, **arguments: object) -> object:
    """The answer to ``command`` of the machine whose monitor listens at ``monitor``.

    Raises HarnessError if it refuses, or if there is no such machine.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.settimeout(LIMIT)
        try:
            made.connect(str(monitor))
        except OSError as error:
            raise HarnessError(f"no machine answers at {monitor}: {error}") from None
        stream = made.makefile("rw")
        stream.readline()
        for name, given in (("qmp_capabilities", {}), (command, arguments)):
            stream.write(json.dumps({"execute": name, "arguments": given}) + "\n")
            stream.flush()
            while "event" in (answer := json.loads(stream.readline())):
                pass
            if "error" in answer:
                raise HarnessError(f"QEMU refuses {name}: {answer['error']['desc']}")
        return answer["return"]
