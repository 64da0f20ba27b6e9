# SPDX-License-Identifier: MIT
"""`make bench`: what a move costs, as ratios inside one run. Never a timed test."""
