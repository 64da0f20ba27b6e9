# SPDX-License-Identifier: MIT
"""pyroute2, without the parts of it that the daemon never uses."""

from __future__ import annotations

from sockmi.unread import unread

with unread("pyroute2"):
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["IPRoute", "NetlinkError"]
