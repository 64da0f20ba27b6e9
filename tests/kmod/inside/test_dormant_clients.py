# SPDX-License-Identifier: MIT
"""import_socket() in C, Python and asyncio, whose daemon dies while the module has what they have taken."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.kmod.module_client import ACTIVATE, Device, frozen
from tests.lab.client_callers import CALLERS
from tests.lab.client_daemon import Dormant, FakeDaemon, connection


def original(kind: str) -> tuple[socket.socket, socket.socket | None]:
    """A socket to be moved, and its peer."""
    if kind == "connected":
        return connection()
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    if kind == "listening":
        made.listen()
    return made, None


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("kind", ["connected", "bound", "listening"])
@pytest.mark.parametrize("caller", CALLERS)
def test_the_module_closes_it_after_the_daemon_s_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caller: str, kind: str, activated: bool
) -> None:
    """Of a dead daemon's descriptors the control connection may be closed first, and the device last."""
    if caller == "C" and not shutil.which("make"):
        pytest.skip("no compiler in this guest; the debug kernel has that of its host")
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "control"))
    ours, peer = original(kind)
    name = ours.getsockname()
    with Device() as device, ours, frozen(device, ours) as (freeze, image):
        device.commit(freeze)
    with FakeDaemon(tmp_path / "control") as daemon, socket.socket() as target:
        device, copy = Device(), socket.socket()
        device.restore(copy, image, ACTIVATE if activated else 0)
        daemon.listed.append(Dormant(copy, peer, kind, name=name))
        daemon.break_at = "taken"
        before = os.fstat(target.fileno()).st_ino
        later = threading.Thread(target=lambda: (time.sleep(1), device.close()))
        later.start()
        try:
            if activated:
                [_got] = CALLERS[caller]().take([{"fd": target.fileno(), "states": [kind]}], 20)
            else:
                with pytest.raises(OSError) as caught:
                    CALLERS[caller]().take([{"fd": target.fileno(), "states": [kind]}], 20)
                assert caught.value.errno == errno.ECONNRESET
        finally:
            later.join()
        assert (os.fstat(target.fileno()).st_ino != before) is activated
