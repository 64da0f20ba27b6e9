# SPDX-License-Identifier: MIT
"""How many descriptors this process may have."""

from __future__ import annotations

import contextlib
import resource

_SPARE_MAX = 64


def raise_limit() -> int:
    """Raise the soft limit (RLIMIT_NOFILE) to the hard one; returns the limit.

    1024 is for programs that use select(2); this one does not.
    """
    _unused, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # above fs.nr_open: it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def is_spare(descriptor: int) -> bool:
    """Whether a new descriptor is one of the last: they are left for what moves the sockets already taken.

    The kernel gives out the lowest number that is free, so a high one says that the lower ones are taken.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit != resource.RLIM_INFINITY and descriptor >= limit - min(_SPARE_MAX, limit // 4)
