# SPDX-License-Identifier: MIT
"""What the harness raises when it cannot go on; the message says what, where, and what to do next."""

from __future__ import annotations


class HarnessError(Exception):
    """The harness, not the tested code, failed: a package, a build, a boot."""
