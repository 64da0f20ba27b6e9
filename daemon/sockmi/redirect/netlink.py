# SPDX-License-Identifier: MIT
"""pyroute2, without the parts of it that the daemon never uses.

``import pyroute2`` reads some 200 modules: 6 MB, and a tenth of a second of the daemon's start. Its
submodules do not need them. So its package is put in place unread; whoever asks it for a name
later (another library of this process) has it read then.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


def _unread(name: str) -> ModuleType | None:
    """A package whose submodules can be imported; None if it has been read already, or is not there."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is None:
        return None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    return package


def _read_when_asked(package: ModuleType) -> None:
    def read(wanted: str) -> Any:
        loader = package.__spec__.loader if package.__spec__ else None
        if wanted.startswith("__") or loader is None:
            raise AttributeError(wanted)
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, wanted)

    package.__getattr__ = read  # type: ignore[method-assign]


_package = _unread("pyroute2")

from pyroute2.iproute.linux import IPRoute  # noqa: E402 - see above
from pyroute2.netlink.exceptions import NetlinkError  # noqa: E402

if _package is not None:
    _read_when_asked(_package)

__all__ = ["IPRoute", "NetlinkError"]
