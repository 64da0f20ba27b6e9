# SPDX-License-Identifier: MIT
"""Every refusal that a daemon with the kernel engine can give: before the freeze, and the connection goes on.

The codes and cases are those of tests/lab/test_matrix_refusals.py. What this engine does not refuse has tests
of its own here: urgent data moves, and owners that cannot be stopped are no obstacle. What wants a later
kernel is in test_refusals_late_daemons.py.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.labs import Lab
from sockmi.refusal import Code
from tests.lab import test_matrix_refusals as all_refusals
from tests.lab.matrix_lab import EVERYWHERE, Bench, Keeper, bench, copy_of, moved
from tests.lab.scenario import daemons, status, until
from tests.lab.test_matrix_refusals import descriptors, goes_on, ours, refused, refused_for_the_moment

# What could differ between kernels is the module's (test_refusals.py).
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.kernels("uml-6.1-debug")]

_SAME = (
    "test_no_tcp_socket",
    "test_no_such_socket",
    "test_kernel_tls",
    "test_signed_connections",
    "test_addresses_and_states",
    "test_too_large",
    "test_nobody_takes_it",
    "test_already_migrating",
    "test_taken_ports_of_bound_sockets",
    "test_a_tuple_that_is_taken_at_home",
    "test_window_scale",
    "test_it_takes_too_long",
    "test_whoever_asked_has_gone",
    "test_the_importer_dies",
    "test_the_exporter_stops",
)
globals().update({name: getattr(all_refusals, name) for name in (*_SAME, "it")})


@pytest.fixture(scope="module")
def running(lab: Lab) -> Iterator[Bench]:
    """Daemons for all tests of the module, whom everybody may ask."""
    with (
        daemons(
            lab, "ab", redirect={"devices": ["eth0"], "modes": ["nat"]}, control_mode=0o666,
            timing={"freeze_deadline_s": 5.0}, image_bytes_max=all_refusals.IMAGE_BYTES_MAX,
        ) as both,
        bench(lab, "nat", both) as made,
    ):  # fmt: skip
        assert {status(lab.host(name))["engine"] for name in "ab"} == {"kernel"}
        made.warm()
        yield made


def test_what_cannot_be_carried(it: Bench) -> None:
    """Zero-copy, sockmap, repair: refused, and moved as soon as that is over."""
    case = it.pair("v4")
    assert case.peer
    refused_for_the_moment(it, case)
    moved(it.export_passively(ours(case.ours)))
    [came] = it.take([it.request(case)])
    it.finish(case, copy_of(came))
    copy_of(came).close()


def test_a_taken_port(it: Bench) -> None:
    """Of a listener; a connection gets another port by this redirect."""
    port = it.port()
    with it.listener("b", "v4", port, EVERYWHERE), it.listener("a", "v4", port, EVERYWHERE) as mine:
        refused(it, ours(mine), Code.PORT_TAKEN)
        with it.sock("peer", "v4") as peer:
            peer.connect((it.address("v4"), port))
            mine.accept()[0].close()


def test_owners(it: Bench) -> None:
    """io_uring is refused, also where nobody is stopped; a debugger is no obstacle."""
    cases = [it.pair("v4") for _turn in range(2)]

    def with_ring() -> None:
        assert all_refusals.LIBC.syscall(
            all_refusals.IO_URING_SETUP, 4, ctypes.create_string_buffer(120)
        ) >= 0  # fmt: skip
        signal.pause()

    def with_debugger() -> None:
        assert all_refusals.LIBC.ptrace(all_refusals.PTRACE_SEIZE, debugged.pid, None, None) == 0
        signal.pause()

    with (
        Keeper([cases[0].fd], with_ring) as ring,
        Keeper([cases[1].fd]) as debugged,
        Keeper([], with_debugger) as debugger,
    ):
        until(lambda: "io_uring" in descriptors(ring.pid))
        until(lambda: f"TracerPid:\t{debugger.pid}" in Path(f"/proc/{debugged.pid}/status").read_text())
        assert str(ring.pid) in refused(it, [(ring.pid, cases[0].fd)], Code.OWNER_IO_URING)
        goes_on(cases[0])
        goes_on(cases[1])
        moved(it.export_passively([(debugged.pid, cases[1].fd)]))
    [came] = it.take([it.request(cases[1])])
    it.finish(cases[1], copy_of(came))
    copy_of(came).close()
    refused(it, [(it.daemons["a"].pid, 0)], Code.OWNER_IS_DAEMON)
