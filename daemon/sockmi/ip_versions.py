# SPDX-License-Identifier: MIT
"""Which IP versions this kernel has: IPv6 may be disabled at boot, or not be built in."""

from __future__ import annotations

import errno
import functools
import socket

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@functools.cache
def families() -> dict[int, socket.AddressFamily]:
    """AF_INET and AF_INET6, by IP version, of those that are there. OSError if that cannot be known."""
    found = {}
    for version, family in _FAMILIES.items():
        try:
            socket.socket(family, socket.SOCK_DGRAM).close()
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:
                raise
        else:
            found[version] = family
    return found
