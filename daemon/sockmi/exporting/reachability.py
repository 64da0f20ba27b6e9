# SPDX-License-Identifier: MIT
"""Whether packets can be led to an importer: asked early, so that the freeze knows it."""

from __future__ import annotations

import contextlib
import threading
import time
from ipaddress import IPv4Address, IPv6Address

from sockmi.protocol.records import Place
from sockmi.redirect.base import Mode
from sockmi.shell import Shell

_TTL_S = 2.0


class Reachability:
    """What the redirects say of importers. They ask the routing tables, which takes milliseconds.

    Who asks while another thread does, gets that one's answer.
    """

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._asking = threading.Lock()  # of _known, and held until the answer is there
        self._known: dict[tuple[Mode, IPv4Address | IPv6Address], tuple[float, str | None]] = {}

    def obstacle(self, place: Place) -> str | None:
        """Why packets cannot be led to a place. OSError if the kernel does not tell."""
        if place.mode is None or place.endpoint is None:
            return None
        return self._ask(place.mode, place.endpoint.address)

    def foresee(self, importer: IPv4Address | IPv6Address) -> None:
        """Ask in a thread: something will soon be led there, most likely in the first mode."""
        mode = self._shell.config.redirect.modes[0]
        if not self._fresh(mode, importer):
            self._shell.loop.run_in_executor(None, self._ask_early, mode, importer)

    def _ask_early(self, mode: Mode, importer: IPv4Address | IPv6Address) -> None:
        with contextlib.suppress(OSError):  # the freeze will find the same, and say so
            self._ask(mode, importer)

    def _ask(self, mode: Mode, importer: IPv4Address | IPv6Address) -> str | None:
        with self._asking:
            known = self._fresh(mode, importer)
            if known is None:
                obstacle = self._shell.redirects[mode].reachable(importer)
                known = self._known[mode, importer] = time.monotonic() + _TTL_S, obstacle
            return known[1]

    def _fresh(self, mode: Mode, importer: IPv4Address | IPv6Address) -> tuple[float, str | None] | None:
        known = self._known.get((mode, importer))
        return known if known is not None and known[0] >= time.monotonic() else None
