# SPDX-License-Identifier: MIT
"""pyroute2, without the parts of it that the daemon never uses."""

from __future__ import annotations

from types import SimpleNamespace

from sockmi.unread import unread

# unittest: for a method that only pyroute2's own tests call.
with unread("unittest", mock=SimpleNamespace(Mock=object)), unread("pyroute2"):
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["IPRoute", "NetlinkError"]
