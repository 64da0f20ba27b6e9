# SPDX-License-Identifier: MIT
"""Preflight beside the event loop: an owner may keep a look at his socket waiting, for a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from sockmi.engine.base import Engine, Kind, Needs, SocketFacts
from sockmi.engine.listing import known
from sockmi.peers import Peers
from sockmi.refusal import Code, Refusal
from sockmi.selection import kind_of

#: Gets descriptors, and whom to tell: the facts of each, in order, or why there are none.
Look = Callable[[Sequence[int], Callable[[list[SocketFacts] | Exception], None]], None]


def look(
    loop: asyncio.AbstractEventLoop,
    engine: Engine,
    peers: Peers,
    descriptors: Sequence[int],
    done: Callable[[list[SocketFacts] | Exception], None],
) -> None:
    """See ``Look``. In a thread; at once if there is nothing to look at."""
    if not descriptors:
        done([])
        return

    def finish(seen: asyncio.Future[list[SocketFacts]]) -> None:
        try:
            facts = engine.judge(descriptors, seen.result())
        except Exception as error:
            done(error)
            return
        done(facts)

    loop.run_in_executor(None, _look, engine, peers, descriptors).add_done_callback(finish)


def _look(engine: Engine, peers: Peers, descriptors: Sequence[int]) -> list[SocketFacts]:
    """Those that are locked have a name at least."""
    facts = peers.judge(engine.look(descriptors))
    locked = {one.inode for one in facts if one.refusal and one.refusal.code is Code.LOCKED}
    if not locked:
        return facts
    names = known(locked)
    return [
        replace(one, kind=kind_of(name), state=name.state, local=name.local, remote=name.remote)
        if (name := names.get(one.inode))
        else one
        for one in facts
    ]


def unseen(refusal: Refusal) -> SocketFacts:
    """One of which nothing is known."""
    return SocketFacts(0, 0, Kind.BOUND, "CLOSED", 0, None, None, 0, 0, Needs(), refusal)
