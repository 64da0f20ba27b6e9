# SPDX-License-Identifier: MIT
"""A listener that has moved is forgotten everywhere when it has ended, and not before."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from lab.labs import Lab
from sockmi.client import Export, ImportRequest, export_sockets, import_socket
from sockmi.journal import Record
from tests.lab.crash_lab import Cluster, cluster, journal_of
from tests.lab.scenario import status, until

PORT = 5080
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104


def records(daemons: Cluster, host: str) -> tuple[int, int]:
    """Routes and holdings that a host's journal has; -1 while its daemon counts others."""
    with journal_of(daemons.lab.host(host)) as journal:
        found = len(journal.records(Record.ROUTE)), len(journal.records(Record.HOLDING))
    now = status(daemons.lab.host(host))
    return found if (now["redirects_out"], now["redirects_in"]) == found else (-1, -1)


def become(daemons: Cluster, **wanted: tuple[int, int]) -> None:
    """Wait for the routes and holdings of hosts."""
    try:
        until(lambda: all(records(daemons, host) == each for host, each in wanted.items()), 15)
    except AssertionError:
        raise AssertionError({host: records(daemons, host) for host in wanted}) from None


def listen(lab: Lab, family: socket.AddressFamily, address: str, shared: bool = False) -> socket.socket:
    """A listener on a."""
    sock = lab.host("a").socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
    sock.bind((address, PORT))
    sock.listen(7)
    return sock


def move(lab: Lab, sock: socket.socket, source: str, target: str) -> socket.socket:
    """The copy, in this process."""
    [record] = export_sockets([Export(sock)], target, control=lab.host(source).control_socket)
    assert record.outcome == "moved", record
    sock.close()
    wanted = [ImportRequest(["listening"], local_port=PORT)]
    [came] = import_socket(wanted, 10, control=lab.host(target).control_socket)
    assert came.socket is not None
    return came.socket


@contextlib.contextmanager
def daemons_of(lab: Lab, hosts: str, **timing: float) -> Iterator[Cluster]:
    """Daemons that look seldom: the kernel's news must do."""
    redirect = {"devices": ["eth0"]}
    timing = {"audit_interval_s": 60.0, "freeze_deadline_s": 5.0} | timing
    with cluster(lab, hosts, redirect=redirect, timing=timing) as daemons:
        yield daemons


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("where", ["any", "a"])
def test_it_is_closed(lab: Lab, family: socket.AddressFamily, where: str) -> None:
    address = ANY[family] if where == "any" else lab.host("a").address(4 if family == socket.AF_INET else 6)
    with daemons_of(lab, "ab") as daemons:
        copy = move(lab, listen(lab, family, address), "a", "b")
        become(daemons, a=(1, 0), b=(0, 1))
        with lab.host("b").socket(family) as other:  # what ends besides it is not it
            other.bind((ANY[family], PORT + 1))
            other.listen()
        daemons.daemons["b"].restart()
        daemons.ready()
        become(daemons, a=(1, 0), b=(0, 1))
        copy.close()
        become(daemons, a=(0, 0), b=(0, 0))


def test_it_is_closed_while_no_daemon_runs(lab: Lab) -> None:
    with daemons_of(lab, "ab") as daemons:
        copy = move(lab, listen(lab, socket.AF_INET6, "::"), "a", "b")
        become(daemons, a=(1, 0), b=(0, 1))
        daemons.daemons["b"].stop()
        copy.close()
        daemons.start("b")
        become(daemons, a=(0, 0), b=(0, 0))


def test_it_only_stops_to_listen(lab: Lab) -> None:
    """Of that the kernel has no news: it is seen at the next look."""
    with daemons_of(lab, "ab", audit_interval_s=0.5) as daemons:
        copy = move(lab, listen(lab, socket.AF_INET, ANY[socket.AF_INET]), "a", "b")
        become(daemons, a=(1, 0), b=(0, 1))
        copy.shutdown(socket.SHUT_RD)
        become(daemons, a=(0, 0), b=(0, 0))
        copy.close()


def test_several_at_one_endpoint(lab: Lab) -> None:
    """With SO_REUSEPORT: as many are known as there are."""
    with daemons_of(lab, "ab") as daemons:
        made = [listen(lab, socket.AF_INET, ANY[socket.AF_INET], shared=True) for _turn in range(3)]
        copies = [move(lab, one, "a", "b") for one in made]
        for left in (3, 2, 1):
            become(daemons, a=(left, 0), b=(0, left))
            copies.pop().close()
        become(daemons, a=(0, 0), b=(0, 0))


@pytest.mark.parametrize("last", ["c", "a"])
def test_it_goes_on(lab: Lab, last: str) -> None:
    """It is the same listener over all hops; at home nothing is known of it any more."""
    with daemons_of(lab, "abc") as daemons:
        copy = move(lab, listen(lab, socket.AF_INET6, "::"), "a", "b")
        become(daemons, a=(1, 0), b=(0, 1), c=(0, 0))
        copy = move(lab, copy, "b", "c")
        become(daemons, a=(1, 0), b=(0, 0), c=(0, 1))
        if last == "a":
            copy = move(lab, copy, "c", "a")
            become(daemons, b=(0, 0), c=(0, 0))
        copy.close()
        become(daemons, a=(0, 0), b=(0, 0), c=(0, 0))


def test_what_is_only_bound_leaves_nothing(lab: Lab) -> None:
    with daemons_of(lab, "ab") as daemons:
        sock = lab.host("a").socket(socket.AF_INET)
        sock.bind((ANY[socket.AF_INET], PORT))
        [record] = export_sockets([Export(sock)], "b", control=lab.host("a").control_socket)
        assert record.outcome == "moved", record
        [came] = import_socket([ImportRequest(["bound"])], 10, control=lab.host("b").control_socket)
        assert came.socket is not None
        until(lambda: status(lab.host("b"))["redirects_in"] == 0)
        assert records(daemons, "a") == records(daemons, "b") == (0, 0)
        came.socket.close()
        sock.close()
