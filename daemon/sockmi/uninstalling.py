# SPDX-License-Identifier: MIT
"""Removal of all that this host's redirects have in the kernel: ``sockmid --remove-redirects``.

For a host that shall have no SockMi any more. The daemon must not run (it would make everything anew,
and the journal is its own), and nothing may depend on what goes, unless the caller insists.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable
from pathlib import Path

from sockmi import durable
from sockmi.addresses import Endpoint
from sockmi.config import Config
from sockmi.journal import Journal
from sockmi.protocol.events import Started
from sockmi.redirect.base import Mode, Redirect
from sockmi.redirect.factory import make_redirects
from sockmi.redirect.iptables import unusable

_NAMED_MAX = 10


class Needed(Exception):
    """Connections depend on the redirects; the text names some and says what to do."""


def remove_redirects(config: Config, *, force: bool = False, check: bool = False) -> int:
    """Remove tables, chains, ip rules and routes; returns how many connections have lost theirs.

    With ``check`` nothing is removed, and it returns how many would. Raises Needed, and changes nothing, if
    there are any and ``force`` is not given. OSError: the kernel refused. The caller holds the state
    directory's lock. Repeating it is no error.
    """
    started, used = _noted(config.journal_path)
    # An earlier configuration may have had others.
    modes = {*config.redirect.modes, *used} | ({*Mode} - {Mode.IPTABLES})
    if unusable() is None and _has_iptables():
        modes.add(Mode.IPTABLES)
    redirects, tables = make_redirects(config.redirect, sorted(modes))
    try:
        needed = {_named("left", one.local, one.remote) for one in started.routes}
        needed |= {_named("came", one.local, one.remote) for one in started.holdings}
        for chunk in started.prepared:
            items = (chunk.arrivals[position].item for position in chunk.prepared)
            needed |= {_named("coming", one.local, one.remote) for one in items}
        if not needed:  # a journal may have been moved away; the kernel knows it too, by other names
            needed = _in_kernel(redirects.values())
        if needed and not force:
            raise Needed(_sentence(sorted(needed)))
        if Mode.IPTABLES in redirects and (why := unusable()):
            raise OSError(errno.EOPNOTSUPP, f"redirect mode iptables: {why}; its chains cannot be removed")
        if not check:
            for redirect in redirects.values():
                redirect.teardown()
    finally:
        tables.close()
    return len(needed)


def _noted(path: Path) -> tuple[Started, set[Mode]]:
    """What the journal knows, and by which modes; nothing is made of one that is not there."""
    if not path.exists():
        return Started(), set()
    journal = Journal(path)
    try:
        return durable.started(journal), durable.modes_in_use(journal)
    finally:
        journal.close()


def _has_iptables() -> bool:
    """Whether this network namespace has any legacy table: to look into one that is not there makes it."""
    for version in ("ip", "ip6"):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/net/{version}_tables_names").read_text().strip():
                return True
    return False


def _in_kernel(redirects: Iterable[Redirect]) -> set[str]:
    found: set[str] = set()
    for redirect in redirects:
        try:
            found |= {_named("left", one.tuple.local, one.tuple.remote) for one in redirect.outbound()}
            found |= {_named("came", one.tuple.local, one.tuple.remote) for one in redirect.inbound()}
        except OSError as error:
            if error.errno != errno.ENOENT:  # no such table: nothing was ever set up, or it is gone
                raise
    return found


def _named(how: str, local: Endpoint | None, remote: Endpoint | None) -> str:
    return f"{local} <-> {remote} ({how})" if remote else f"listener {local} ({how})"


def _sentence(needed: list[str]) -> str:
    named = ", ".join(needed[:_NAMED_MAX])
    more = f" and {len(needed) - _NAMED_MAX} more" if len(needed) > _NAMED_MAX else ""
    return (
        f"{len(needed)} moved connections depend on this host's redirects: {named}{more}; start the daemon, "
        "let them end or move them on (`sockmi list redirects`, `sockmi drain`), or cut them off with --force"
    )
