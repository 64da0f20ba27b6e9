# SPDX-License-Identifier: MIT
"""What ``sockmid --check`` sees of the host, besides the file: without starting, and changing nothing."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from sockmi.config import Config, GroupConfig
from sockmi.engine.choice import choose
from sockmi.engine.kernel import ModuleMissing
from sockmi.redirect.base import Mode
from sockmi.transport.keyring import KeyFileError, Keyring


@dataclass(slots=True)
class Found:
    """Sentences: what is wrong, what is not there yet (it may still come), and what would be used."""

    wrong: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)


def examine(config: Config) -> Found:
    """Look at key files, interfaces, the state folder, iptables and the engine.

    As root, else less can be seen.
    """
    found = Found()
    for group in config.groups:
        _group(group, found)
    _state(config, found)
    if Mode.IPTABLES in config.redirect.modes:
        _iptables(found)
    if os.geteuid() == 0:
        try:
            engine, why = choose(config.engine, 0)
            found.used.append(f"engine {engine.name}" + (f", as {why}" if why else ""))
        except ModuleMissing as missing:
            found.missing.append(f"engine: kernel is asked for, but {missing}")
    return found


def _group(group: GroupConfig, found: Found) -> None:
    try:
        keys = len(Keyring.load(group.key_file).keys)
        found.used.append(f"group {group.name}: {keys} key{'s' * (keys > 1)} in {group.key_file}")
    except KeyFileError as error:
        reason = error.__cause__.__cause__ if error.__cause__ else None
        absent = isinstance(reason, FileNotFoundError | PermissionError)
        (found.missing if absent else found.wrong).append(f"group {group.name}: {error}")
    known = [name for _index, name in socket.if_nameindex()]
    if group.interface is not None and group.interface not in known:
        found.missing.append(f"group {group.name}: there is no interface {group.interface}")


def _state(config: Config, found: Found) -> None:
    folder = config.state_dir
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        found.missing.append(f"state_dir: {folder} cannot be written by this user")
    elif folder.exists() and not folder.is_dir():
        found.wrong.append(f"state_dir: {folder} is no folder")


def _iptables(found: Found) -> None:
    from sockmi.redirect.iptables import unloaded, unusable  # and pyroute2: only for who uses that mode

    if why := unusable() or unloaded():
        found.missing.append(f"redirect mode iptables: {why}")
