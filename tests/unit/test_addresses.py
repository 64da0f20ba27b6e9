# SPDX-License-Identifier: MIT
"""Addresses as users write them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from pydantic import TypeAdapter

from sockmi.addresses import Endpoint, parse_address, parse_network
from sockmi.api.fields import AddressText, EndpointText

ONE = IPv4Address("192.0.2.1")


def test_v4_mapped_is_what_is_on_the_wire() -> None:
    """A program with a dual-stack socket says its own name so."""
    assert parse_address("::ffff:192.0.2.1") == parse_address("192.0.2.1") == ONE
    assert parse_address("2001:db8::1") == IPv6Address("2001:db8::1")
    assert Endpoint.parse("[::ffff:192.0.2.1]:80") == Endpoint(ONE, 80)
    assert TypeAdapter(AddressText).validate_python("::ffff:192.0.2.1") == "192.0.2.1"
    assert TypeAdapter(EndpointText).validate_python("[::ffff:192.0.2.1]:80") == "192.0.2.1:80"
    assert (
        parse_network("::ffff:192.0.2.77/120") == parse_network("192.0.2.0/24") == ip_network("192.0.2.0/24")
    )
    assert parse_network("::ffff:192.0.2.1") == ip_network("192.0.2.1")
    assert parse_network("::/0") == ip_network("::/0")
    with pytest.raises(ValueError, match="does not appear to be"):
        parse_address("192.0.2")
