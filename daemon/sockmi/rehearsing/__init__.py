# SPDX-License-Identifier: MIT
"""An imaginary move, by the very parts that make a real one, just before that begins.

A daemon that has been asleep does everything for the first time: neither its code and data nor the
kernel's are in the processor's caches, and the freeze of one connection takes twice as long as it does in
the middle of many. So the parts of this package have one that is nobody's go all the way first: nothing of
it leaves the host, is journalled, counted or told, and nothing is left of it.
"""

from sockmi.rehearsing.rehearsal import FEW, Rehearsal

__all__ = ["FEW", "Rehearsal"]
