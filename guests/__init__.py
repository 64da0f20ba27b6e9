# SPDX-License-Identifier: MIT
"""Kernels to try the module in: User-Mode Linux (fast, with sanitizers), and Debian's own in QEMU guests.

Standard library only, so that it runs with the system's python3 before any environment is made. All that it
makes is cached under ``.build/`` by what it was made from, and what it starts ends with the process that
started it.
"""
