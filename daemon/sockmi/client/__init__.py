# SPDX-License-Identifier: MIT
"""The Python API: import and export live TCP sockets through this host's daemon.

    import sockmi

    record = sockmi.export_socket(connection, to="b", context=session)      # on host a
    [arrived] = sockmi.import_socket(sockmi.ImportRequest(["connected"]))   # on host b
    arrived.socket.sendall(...)

Asyncio forms are in `sockmi.aio`. The protocol is docs/control.md. All that takes place on a
connection is written once, as coroutines: `imports` and `exports` on a `link`. Here a link that
blocks drives them, in `sockmi.aio` one on the event loop.
"""

from sockmi.client.control import Control, export_socket, export_sockets, import_socket
from sockmi.client.descriptors import CONTEXT_BYTES_MAX
from sockmi.client.errors import SockMiError
from sockmi.client.exports import Export
from sockmi.client.imports import REQUESTS_MAX, Imported, ImportRequest
from sockmi.client.lines import DESCRIPTORS_MAX, LINE_BYTES_MAX
from sockmi.client.link import CONTROL_PATH
from sockmi.client.records import MigrationError, MigrationRecord

__all__ = [
    "CONTEXT_BYTES_MAX",
    "CONTROL_PATH",
    "DESCRIPTORS_MAX",
    "LINE_BYTES_MAX",
    "REQUESTS_MAX",
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
]
