"""A drain tells of each socket what became of it, also of those that it could not even take."""

from __future__ import annotations

from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import pytest

from sockmi.addresses import Endpoint
from sockmi.api import parse_request
from sockmi.draining import Drain
from sockmi.engine.listing import Holder, ListedSocket
from sockmi.refusal import Code, Refusal
from sockmi.selection import Found

FORBIDDEN = Refusal(Code.NO_PRIVILEGE, "The kernel does not let this process take it.")
GONE = Refusal(Code.NO_SUCH_SOCKET, "There is no such descriptor.")
NONE_LEFT = Refusal(Code.NO_DESCRIPTORS, "No descriptor is left.")


def found(inode: int) -> Found:
    ends = Endpoint(IPv4Address("192.0.2.1"), 80), Endpoint(IPv4Address("198.51.100.1"), 4000 + inode)
    holder = Holder(7, inode, "echo")
    listed = ListedSocket(inode, inode, 2, "ESTABLISHED", *ends, 0, 0, 0, (holder,))
    return Found(listed, holder, None)


@pytest.mark.parametrize(
    ("why", "refused"), [(FORBIDDEN, ["no-privilege"]), (NONE_LEFT, ["internal"]), (GONE, [])]
)
def test_what_cannot_be_taken(monkeypatch: pytest.MonkeyPatch, why: Refusal, refused: list[str]) -> None:
    """It is refused by name, in the answer and in the journal; only what has been closed is left out."""

    def duplicate(pid: int, fd: int) -> int:
        raise why

    monkeypatch.setattr("sockmi.draining.duplicate", duplicate)
    answers: list[dict[str, Any]] = []
    notes: list[Any] = []
    daemon: Any = SimpleNamespace(
        host_name="a",
        loop=SimpleNamespace(call_later=lambda *_: None),
        shell=SimpleNamespace(note=notes.append),
    )
    request: Any = parse_request(b'{"op": "drain", "filter": {"local_port": 80}}')
    Drain(daemon, request, (None, None), answers.append).start([found(1)])
    last = answers[-1]
    assert not last["more"]
    assert [one["refusal"]["code"] for one in last["migrations"]] == refused
    assert (last["progress"]["selected"], last["progress"]["refused"]) == (len(refused), len(refused))
    assert [news["outcome"] for change in notes for _, _, news in change.audit] == ["refused"] * len(refused)
