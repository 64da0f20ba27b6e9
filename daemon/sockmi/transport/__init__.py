# SPDX-License-Identifier: MIT
"""How daemons reach each other: sealed datagrams in a group, TLS streams between two."""
