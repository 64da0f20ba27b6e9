# SPDX-License-Identifier: MIT
"""What a kernel log says of bugs: KASAN, lockdep, WARN, oops, hung tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

CONTEXT = 70  # lines of the log that are kept with a report

_BAD = re.compile(
    r"""BUG:|Oops:|Kernel\ panic|kernel\ BUG\ at|general\ protection\ fault|double\ fault|divide\ error
    |Unable\ to\ handle\ kernel|unable\ to\ handle\ page\ fault
    |WARNING:\ (?!kernel\ not\ to\ be\ built|Unprivileged)
    |KASAN:|KCSAN:|KFENCE:|UBSAN:|kmemleak:\ (?!\d+\ new|Automatic|Kernel\ memory\ leak\ detector\ init)
    |INFO:\ (?:task|rcu|suspicious|inconsistent|possible|trying\ to\ register)
    |ODEBUG:|DEBUG_LOCKS_WARN_ON|refcount_t:|list_(?:add|del)\ corruption|ref_tracker:\ (?!.*refcnt)
    |unregister_netdevice:\ waiting|leaked\ lock|scheduling\ while\ atomic|sleeping\ function\ called
    |self-detected\ stall|detected\ stalls|soft\ lockup|hard\ LOCKUP|workqueue\ lockup
    |Bad\ page\ state|bad\ page\ map|page\ allocation\ failure|stack\ smashing|corrupted\ stack""",
    re.VERBOSE,
)

KNOWN: tuple[tuple[str, str], ...] = (
    # 6.1's maple tree is not annotated for PROVE_RCU: boot and exec say so once each, without us.
    (r"WARNING: suspicious RCU usage", r"lib/maple_tree\.c:\d+ suspicious rcu_dereference_check"),
)
"""Reports that stock kernels make without our module: how the first line looks, and one of the next five."""


@dataclass(frozen=True)
class Report:
    """One thing that a kernel complained of."""

    title: str
    text: str


def reports(log: str, allowed: Iterable[str] = ()) -> list[Report]:
    """What ``log`` complains of, but for what matches one of ``allowed`` in its first six lines."""
    lines = log.replace("\r", "").splitlines()
    found: list[Report] = []
    covered = -1
    for number, line in enumerate(lines):
        if number <= covered or not _BAD.search(line):
            continue
        near = "\n".join(lines[number : number + 6])
        if any(re.search(pattern, near) for pattern in allowed):
            continue
        if any(re.search(first, line) and re.search(second, near) for first, second in KNOWN):
            continue
        found.append(Report(line.strip(), "\n".join(lines[max(0, number - 5) : number + CONTEXT])))
        covered = number + 8  # the lines that follow a title name the same thing again
    return found
