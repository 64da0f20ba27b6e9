# SPDX-License-Identifier: MIT
"""Named places in the daemon at which a test can have it die: ``SOCKMI_CRASH_AT=POINT[:NTH[:SIGNAL]],...``.

``reached(point)`` stands beside each step that a crash must not spoil. Without the variable it does
nothing. With it, the NTH time (from 1) that POINT is reached the process gets SIGNAL (KILL; STOP, to
have it pause there). A name that is not in ``POINTS`` is an error at the start of the daemon.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

VARIABLE = "SOCKMI_CRASH_AT"

EXPORTER = (
    "freeze.stopped",  # the owners
    "freeze.held",
    "freeze.captured",
    "thaw.unheld",
    "commit.led-away",
    "commit.journalled",
    "commit.accepted",  # what waited in listeners' queues
    "release.closed",  # inside the engine's call, see arm(); the first of those that go together
    "commit.released",
    "commit.done",  # nobody has been told
    "decision.forgetting",
    "decision.forgotten",
    "queue.ended",
)
IN_REPAIR = (  # of the exporter by the repair engine; inside its calls, see arm()
    "capture.inlined",  # if something is unread
    "capture.peeked",  # the same
    "capture.in-repair",
    "release.arrested",
)
IMPORTER = (
    "prepare.held",
    "prepare.restored",
    "prepare.spooled",
    "prepare.journalled",  # PREPARED has not been said
    "drop.led-again",  # nothing is closed yet
    "discard.dropped",
    "discard.journalled",
    "activate.suspended",
    "activate.journalled",
    "hand.sent",
    "taken.received",
    "taken.admitted",
    "taken.activated",
    "taken.unspooled",
    "taken.journalled",
    "taken.answered",
)
ENGINE = (  # inside its calls, see arm()
    "restore.open",  # out of repair for a moment, with all that has not been sent
    "alive.hearing",  # still in repair
    "alive.begun",  # nothing has been pushed
)
ROUTES = (
    "reroute.led",
    "reroute.journalled",
    "collect.expired",
    "collect.journalled",
    "forget-holdings.evicted",
    "forget-holdings.journalled",
)
REHEARSAL = ("rehearsal.led-away", "rehearsal.taken-in")  # all that a real move would have set is set
RESTART = ("recovery.taken-back", "queue.closing")
POINTS = EXPORTER + IN_REPAIR + IMPORTER + ENGINE + ROUTES + REHEARSAL + RESTART


_rehearsals = 0


@contextmanager
def rehearsing() -> Iterator[None]:
    """An imaginary move goes through here: none of the points of real ones is reached."""
    global _rehearsals  # noqa: PLW0603 - as is `reached`
    _rehearsals += 1
    try:
        yield
    finally:
        _rehearsals -= 1


def parse(text: str) -> list[tuple[str, int, signal.Signals]]:
    """The variable's value; ValueError says what is wrong with it."""
    return [_parse(one) for one in text.split(",")]


def _parse(text: str) -> tuple[str, int, signal.Signals]:
    point, _unused, rest = text.partition(":")
    nth, _unused, name = rest.partition(":")
    if point not in POINTS:
        raise ValueError(f"{VARIABLE}: no point is called {point!r}; choose of {', '.join(POINTS)}")
    if nth and (not nth.isdecimal() or int(nth) < 1):
        raise ValueError(f"{VARIABLE}: {nth!r} is no count; use POINT[:NTH[:SIGNAL]], counting from 1")
    try:
        return point, int(nth or 1), signal.Signals[f"SIG{name or 'KILL'}"]
    except KeyError:
        raise ValueError(f"{VARIABLE}: there is no signal {name!r}; use KILL or STOP") from None


def _armed(text: str) -> Callable[[str], None]:
    wanted = {(point, nth): number for point, nth, number in parse(text)}
    seen: Counter[str] = Counter()
    daemon = os.getpid()

    def reached(here: str) -> None:
        if _rehearsals and here not in REHEARSAL:
            return
        seen[here] += 1
        number = wanted.get((here, seen[here]))
        if number is not None:
            os.kill(daemon, number)  # not the child that closes what goes together

    return reached


def _unarmed(_point: str) -> None:
    pass


reached: Callable[[str], None] = _armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _unarmed

_hook = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda point: reached(point.decode()))


def arm(library: ctypes.CDLL) -> None:
    """Let the places inside libsockmi-engine be reached too (``sockmi_crash_hook`` of engine.h)."""
    if os.environ.get(VARIABLE):
        place = ctypes.c_void_p.in_dll(library, "sockmi_crash_hook")
        place.value = ctypes.cast(_hook, ctypes.c_void_p).value
