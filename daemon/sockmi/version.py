# SPDX-License-Identifier: MIT
"""The release; also in daemon/pyproject.toml and galaxy.yml (a test compares them)."""

VERSION = "0.1.0"
