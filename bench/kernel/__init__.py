# SPDX-License-Identifier: MIT
"""The kernel engine and the NAT helper, measured in a guest beside what they replace."""
