# SPDX-License-Identifier: MIT
"""Users may write IPv4 addresses as a dual-stack socket does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.labs import Lab
from tests.lab.matrix_lab import copy_of, exchange, moved
from tests.lab.mode_lab import scene
from tests.lab.scenario import ask

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_target_filter_and_criteria(lab: Lab, tmp_path: Path) -> None:
    with scene(lab, "forward", tmp_path) as it:
        case = it.pair("mapped")
        ours, importer = it.address("mapped"), it.address("mapped", "b")
        [answer] = ask(it.host("a"), "list", filter={"local_address": ours, "local_port": case.port})
        # A program that is just being started has it, too.
        assert [one["fd"] for one in answer["sockets"] if one["pid"] == os.getpid()] == [case.fd]
        moved(it.export_passively([(os.getpid(), case.fd)], to=importer))
        [found] = it.take([it.request(case, address=ours)])
        with copy_of(found) as copy:
            assert case.peer is not None
            exchange(case.peer, copy, 1000)
            exchange(copy, case.peer, 1000)
