# SPDX-License-Identifier: MIT
"""Which engine this host uses."""

from __future__ import annotations

import logging
from typing import Literal

from sockmi.engine.base import Engine
from sockmi.engine.kernel import KernelEngine, ModuleMissing
from sockmi.engine.repair import RepairEngine

_log = logging.getLogger(__name__)

EngineName = Literal["auto", "kernel", "repair"]


def choose(wanted: EngineName, inject_mark: int) -> tuple[Engine, str]:
    """The engine, and why it is not the other one (empty if it was asked for).

    ``auto``: the kernel's if its module is loaded. Raises ModuleMissing if that is wanted and cannot be used.
    """
    repair = RepairEngine(inject_mark=inject_mark)
    if wanted == "repair":
        return repair, ""
    try:
        kernel = KernelEngine(repair)
    except ModuleMissing as missing:
        if wanted == "kernel":
            raise
        _log.info("engine repair, as %s", missing)
        return repair, str(missing)
    _log.info("engine kernel, device interface %s", kernel.version)
    return kernel, ""
