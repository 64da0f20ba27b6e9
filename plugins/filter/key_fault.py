# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the daemon would refuse of a group's keys."""

from __future__ import annotations

DOCUMENTATION = r"""
name: key_fault
author: SockMi contributors (@sockmi)
short_description: What the daemon would refuse of a group's keys
version_added: "0.1.0"
description:
  - Says so before the keys are written to a host. What it says shows no key.
options:
  _input:
    description: One key a line, 64 hexadecimal digits or base64 of 32 bytes; C(#) begins a comment.
    type: str
    required: true
"""
EXAMPLES = r"""
- name: Refuse a key that is not random
  ansible.builtin.assert:
    that: sockmi_group_key | sockmi.appliance.key_fault == ''
  no_log: true
"""
RETURN = r"""
_value:
  description: What is wrong, to follow the words "the key of the group"; empty if nothing is.
  type: str
"""

import base64  # noqa: E402

_BYTES = 32
_DISTINCT_BYTES_MIN = 8
_KEYS_MAX = 8


def key_fault(text: object) -> str:
    """What the daemon's Keyring would refuse of ``text``; a test compares them."""
    if not hasattr(text, "split"):  # what a vault keeps is text, but need not be a str
        return "is no text; put a number in quotes, and several keys one a line"
    lines = [line.partition("#")[0].strip() for line in text.split("\n")]
    keys = [_decoded(line) for line in lines if line]
    if not keys or b"" in keys:
        return "is not set, or not 64 hexadecimal digits or the base64 of 32 bytes (several, one a line)"
    if any(len(set(key)) < _DISTINCT_BYTES_MIN for key in keys):
        return "is not random"
    if len(set(keys)) < len(keys):
        return "is there twice"
    return f"is one of {len(keys)}, of which there may be {_KEYS_MAX}" if len(keys) > _KEYS_MAX else ""


def _decoded(line: str) -> bytes:
    try:
        key = bytes.fromhex(line) if len(line) == _BYTES * 2 else base64.b64decode(line, validate=True)
    except ValueError:
        return b""
    return key if len(key) == _BYTES else b""


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, object]:
        """By name."""
        return {"key_fault": key_fault}
