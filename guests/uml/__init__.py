# SPDX-License-Identifier: MIT
"""User-Mode Linux: a kernel that runs as a process, with the host's root as its own."""
