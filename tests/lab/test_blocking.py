# SPDX-License-Identifier: MIT
"""O_NONBLOCK is of the descriptor's open file, not of the socket: it does not travel with an image."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from lab.labs import Lab
from sockmi import aio
from sockmi.client import ImportRequest, export_sockets, import_socket
from sockmi.client.exports import Export
from tests.lab.crash_lab import cluster

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.mark.parametrize("exported_blocks", [True, False])
def test_what_the_importer_gets_is_as_it_wants_it(lab: Lab, exported_blocks: bool) -> None:
    """A new socket object waits as any new one does, a replaced one as it did before; asyncio's never."""
    port = 7700
    with cluster(lab, "ab"), lab.host("a").socket() as listener:
        listener.bind((lab.host("a").address(4), port))
        listener.listen()
        control = lab.host("b").control_socket
        for way in ("new", "replaced, blocking", "replaced, not blocking", "asyncio"):
            with lab.host("peer").socket() as peer, lab.host("b").socket() as target:
                peer.connect((lab.host("a").address(4), port))
                ours, _unused = listener.accept()
                ours.setblocking(exported_blocks)
                export_sockets([Export(ours)], "b", control=lab.host("a").control_socket)
                ours.close()
                target.setblocking(way == "replaced, blocking")
                replace = target if way.startswith("replaced") else None
                wanted = ImportRequest(["connected"], local_port=port, replace=replace)
                if way == "asyncio":
                    [came] = asyncio.run(aio.import_socket([wanted], 10, control=control))
                else:
                    [came] = import_socket([wanted], 10, control=control)
                sock = came.socket or target
                blocks = way in ("new", "replaced, blocking")
                assert os.get_blocking(came.fd) is blocks, way
                assert (sock.gettimeout() is None) is blocks, way
                if blocks:
                    peer.sendall(b"at last")
                    assert sock.recv(99) == b"at last"
                sock.close()


def test_a_default_timeout_counts(lab: Lab) -> None:
    """As for any new socket object."""
    port = 7701
    with cluster(lab, "ab"), lab.host("a").socket() as listener, lab.host("peer").socket() as peer:
        listener.bind((lab.host("a").address(4), port))
        listener.listen()
        peer.connect((lab.host("a").address(4), port))
        ours, _unused = listener.accept()
        export_sockets([Export(ours)], "b", control=lab.host("a").control_socket)
        ours.close()
        socket.setdefaulttimeout(0.2)
        try:
            wanted = ImportRequest(["connected"], local_port=port)
            [came] = import_socket([wanted], 10, control=lab.host("b").control_socket)
            assert came.socket is not None
            with came.socket as sock, pytest.raises(TimeoutError):
                sock.recv(1)
        finally:
            socket.setdefaulttimeout(None)
