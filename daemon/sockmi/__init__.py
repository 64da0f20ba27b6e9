# SPDX-License-Identifier: MIT
"""SockMi: move live TCP sockets between Linux hosts while the peer notices nothing.

The public API (``sockmi.import_socket`` and so on) is loaded on first use: the daemon's own
parts are in this package too, and need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sockmi.aio import export_socket as export_socket_async
    from sockmi.aio import import_socket as import_socket_async
    from sockmi.aio import imports
    from sockmi.client import (
        Control,
        Export,
        Imported,
        ImportRequest,
        MigrationError,
        MigrationRecord,
        SockMiError,
        export_socket,
        export_sockets,
        import_socket,
    )
    from sockmi.engine.base import Fidelity, Kind

_HOMES = {
    "Fidelity": ("sockmi.engine.base", "Fidelity"),
    "Kind": ("sockmi.engine.base", "Kind"),
    "import_socket_async": ("sockmi.aio", "import_socket"),
    "export_socket_async": ("sockmi.aio", "export_socket"),
    "imports": ("sockmi.aio", "imports"),
    **{
        name: ("sockmi.client", name)
        for name in (
            "Control",
            "Export",
            "ImportRequest",
            "Imported",
            "MigrationError",
            "MigrationRecord",
            "SockMiError",
            "export_socket",
            "export_sockets",
            "import_socket",
        )
    },
}

__all__ = [
    "Control",
    "Export",
    "Fidelity",
    "ImportRequest",
    "Imported",
    "Kind",
    "MigrationError",
    "MigrationRecord",
    "SockMiError",
    "export_socket",
    "export_socket_async",
    "export_sockets",
    "import_socket",
    "import_socket_async",
    "imports",
]


def __getattr__(name: str) -> object:
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
