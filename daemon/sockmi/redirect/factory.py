# SPDX-License-Identifier: MIT
"""The redirects that a configuration asks for, and the tables that they share."""

from __future__ import annotations

from collections.abc import Iterable

from sockmi.config import RedirectConfig
from sockmi.redirect.base import Mode, Redirect
from sockmi.redirect.forward import Forward
from sockmi.redirect.nat import Nat
from sockmi.redirect.settings import Settings
from sockmi.redirect.tables import Tables
from sockmi.redirect.takeover import Takeover


def make_redirects(
    config: RedirectConfig, in_use: Iterable[Mode] = ()
) -> tuple[dict[Mode, Redirect], Tables]:
    """One object for each configured mode, and for those still ``in_use``; nothing is set up yet."""
    modes = dict.fromkeys([*config.modes, *in_use])
    tables = Tables(
        Settings(
            table=config.table,
            mark=config.mark,
            route_table=config.route_table,
            rule_priority=config.rule_priority,
            devices=config.devices,
            log_group=config.log_group,
            forward=Mode.FORWARD in modes,
        )
    )
    return {mode: _make(mode, tables) for mode in modes}, tables


def _make(mode: Mode, tables: Tables) -> Redirect:
    if mode is Mode.FORWARD:
        return Forward(tables)
    if mode is Mode.NAT:
        return Nat(tables)
    if mode is Mode.TAKEOVER:
        return Takeover(tables)
    # python-iptables takes a second to load and is optional: only who asks for it pays for it.
    from sockmi.redirect.iptables import Iptables

    return Iptables(tables)
