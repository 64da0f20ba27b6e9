# SPDX-License-Identifier: MIT
"""Images near the limit: what fits is shipped, what does not is refused, and the daemons go on."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator

import pytest

from lab.labs import Lab
from sockmi.protocol.records import IMAGE_BYTES_MAX
from sockmi.refusal import Code
from tests.lab.matrix_lab import Bench, Case, Later, bench, copy_of, moved, verdict
from tests.lab.scenario import daemons, status, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

MIB = 1 << 20
SO_SNDBUFFORCE = 32


@pytest.fixture(scope="module")
def it(lab: Lab) -> Iterator[Bench]:
    """Two hosts with all limits as they are."""
    modes = {"devices": ["eth0"], "modes": ["forward"]}
    timing = {"freeze_deadline_s": 5.0}
    with daemons(lab, "ab", redirect=modes, timing=timing) as running, bench(lab, "forward", running) as made:
        made.warm()
        yield made


def fill(it: Bench, case: Case, size: int) -> None:
    """So many bytes in the send queue of ours; the peer is deaf."""
    case.to_peer = random.Random(size).randbytes(size)  # noqa: S311
    case.ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * size)
    it.deafen([case.port])
    case.deaf = True
    case.ours.setblocking(False)
    assert case.ours.send(case.to_peer) == size


def arrives(it: Bench, case: Case) -> None:
    """All of it is delivered from b."""
    [came] = it.take([it.request(case)])
    it.deafen([case.port], False)
    it.finish(case, copy_of(came))
    copy_of(came).close()


def test_a_large_image_is_shipped(it: Bench) -> None:
    case = it.pair("v4")
    fill(it, case, IMAGE_BYTES_MAX - 2 * MIB)
    moved(it.export_passively([(os.getpid(), case.fd)]))
    arrives(it, case)


def test_a_larger_one_is_refused(it: Bench) -> None:
    """Before the freeze, and what is said of the limit is true."""
    case = it.pair("v4")
    fill(it, case, IMAGE_BYTES_MAX + MIB)
    [record] = it.export_passively([(os.getpid(), case.fd)])
    assert verdict(record)[:2] == ("refused", Code.TOO_LARGE)
    assert str(IMAGE_BYTES_MAX) in verdict(record)[2]


def test_what_grows_before_the_freeze(it: Bench) -> None:
    """Two that were small when they were chosen: together too large for their chunk, they move one by one.

    A third has become too large for any: it is not frozen.
    """
    cases = [it.pair("v4") for _turn in range(3)]
    importer = it.daemons["b"].process
    assert importer is not None
    importer.send_signal(signal.SIGSTOP)
    try:
        sockets = [(os.getpid(), case.fd) for case in cases]
        exporting = Later(it.export_passively, sockets, timeout_s=20.0)
        until(lambda: status(it.host("a"))["migrations_under_way"] == len(cases))
        for case, size in zip(cases, (40, 30, 65), strict=True):
            fill(it, case, size * MIB)
    finally:
        importer.send_signal(signal.SIGCONT)
    *records, large = exporting.result()
    moved(records)
    assert verdict(large)[:2] == ("refused", Code.TOO_LARGE)
    for case in cases[:2]:
        arrives(it, case)
