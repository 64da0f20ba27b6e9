# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""An address or network as firewalls write it."""

from __future__ import annotations

DOCUMENTATION = r"""
name: network
author: SockMi contributors (@sockmi)
short_description: An address or network as firewalls write it
version_added: "0.1.0"
description:
  - Without bits of the host, an address without its prefix length, IPv6 in lower case and shortened.
options:
  _input:
    description: An IPv4 or IPv6 address, or network with prefix length.
    type: str
    required: true
"""
EXAMPLES = r"""
- name: Where 10.0.0.5 is
  ansible.builtin.debug:
    msg: "{{ '10.0.0.5/24' | sockmi.appliance.network }}" # 10.0.0.0/24
"""
RETURN = r"""
_value:
  description: The address or network; null if it is none.
  type: str
"""

import ipaddress  # noqa: E402
import socket  # noqa: E402


def network(text: str) -> str | None:
    """The network of ``text``, whose IPv6 is written as inet_ntop(3) does; None if it is none."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    if "%" in text:
        return None
    family = socket.AF_INET if found.version == 4 else socket.AF_INET6
    address = socket.inet_ntop(family, found.network_address.packed)
    return address if found.prefixlen == found.max_prefixlen else f"{address}/{found.prefixlen}"


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, object]:
        """By name."""
        return {"network": network}
