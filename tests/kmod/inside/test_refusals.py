# SPDX-License-Identifier: MIT
"""What the preflight refuses (tests/lab/test_preflight.py), asked of the kernel engine: the same codes.

And the module itself, which looks once more under the socket's lock, refuses too: nothing gets frozen.
Urgent data, which the other engine refuses, it carries (test_engine_kernel.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from sockmi.engine.base import SocketFacts
from sockmi.engine.kernel import KernelEngine
from sockmi.refusal import Code, Refusal
from tests.lab import test_preflight

#: Of urgent data; or in processes of their own, which look without an engine.
_OTHERS = {
    "test_a_thousand_at_once",
    "test_md5_cannot_be_ruled_out_without_inet_diag",
    "test_no_privilege",
    "test_out_of_time_is_locked_and_nothing_else",
    "test_traffic_is_not_mistaken_for_urgent_data",
    "test_urgent_byte",
    "test_urgent_byte_inline",
}
globals().update(
    {
        name: value
        for name, value in vars(test_preflight).items()
        if not name.startswith("_") and name not in _OTHERS
    }
)

#: What the daemon alone looks for: the image would be right, but not what became of it.
_DAEMONS = {Code.LINK_LOCAL, Code.SOCKMAP}
#: What the module does not tell apart.
_ALIKE = ({Code.NO_SUCH_SOCKET, Code.NOT_TCP}, {Code.STATE, Code.ENDED})


def _refuses(engine: KernelEngine, fd: int, expected: Refusal) -> None:
    """The module does; but an administrator of another namespace may do there what he likes."""
    if expected.code in _DAEMONS or "namespace" in expected.message:
        return
    (item,) = engine.capture([fd])
    assert isinstance(item, Refusal), (expected, item)
    assert item.code == expected.code or {item.code, expected.code} in _ALIKE, (expected, item)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks in the place of ``inspect``; what it refuses is asked of the module, too."""
    with contextlib.closing(KernelEngine()) as made:

        def inspect(fds: Sequence[int]) -> list[SocketFacts]:
            seen = made.inspect(fds)
            for fd, facts in zip(fds, seen, strict=True):
                if facts.refusal is not None:
                    _refuses(made, fd, facts.refusal)
            return seen

        monkeypatch.setattr(test_preflight, "inspect", inspect)
        yield
