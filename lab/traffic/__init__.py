# SPDX-License-Identifier: MIT
"""Real servers and clients: every byte checked, and servers that can be handed over."""
