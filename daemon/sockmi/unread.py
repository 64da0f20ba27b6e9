# SPDX-License-Identifier: MIT
"""Packages of which the daemon needs some submodules only.

``import PACKAGE`` reads all that the package imports for others: hundreds of modules of pyroute2, an HTTP
server of prometheus_client; some MB, and a tenth of a second of the daemon's start. So the package is
put in place unread while its submodules are imported; whoever asks it for a name later (another
library of this process) has it read then. The same goes for modules of which a package imports a name
that it never uses here: that name has a stand-in meanwhile.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def unread(name: str, **stand_ins: object) -> Iterator[None]:
    """Within the block, submodules of the package ``name`` can be imported without it.

    ``stand_ins``: what it seems to have meanwhile. Does nothing if it has been read already, or is not there.
    """
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is None:
        yield
        return
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    vars(package).update(stand_ins)
    try:
        yield
    except BaseException:
        del sys.modules[name]
        raise
    for stand_in in stand_ins:
        delattr(package, stand_in)
    _read_when_asked(package)
    parent, _unused, child = name.rpartition(".")
    if parent:  # as the import would have done
        setattr(sys.modules[parent], child, package)


def _read_when_asked(package: ModuleType) -> None:
    def read(wanted: str) -> Any:
        loader = package.__spec__.loader if package.__spec__ else None
        if wanted.startswith("__") or loader is None:
            raise AttributeError(wanted)
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, wanted)

    package.__getattr__ = read  # type: ignore[method-assign]
