# SPDX-License-Identifier: MIT
"""The wheelhouse: who builds it is alone. What is in it: tests/kmod/bundle.py, molecule/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import collection

# The script, whose building takes a while and leaves a line.
BUILDER = """
import json, pathlib, runpy, sys, time
script = runpy.run_path(sys.argv[1])
def build(folder, pythons, machine, inputs):
    with (folder / "built").open("a") as built:
        built.write("begun\\n"); built.flush(); time.sleep(1); built.write("done\\n")
    (folder / "sockmi-1.tar").write_text("")
    one = {"file": "sockmi-1.tar", "sha256": script["sha256"](folder / "sockmi-1.tar")}
    bundles = {f"cp{each.replace('.', '')}-{machine}": one for each in pythons}
    return {"inputs": inputs, "bundles": bundles, "dkms": one}
script["main"].__globals__["build"] = build
sys.argv[1:2] = []
sys.exit(script["main"]())
"""


def test_runs_side_by_side_build_it_once(tmp_path: Path) -> None:
    script = str(collection.PROJECT / "scripts/wheelhouse")
    words = [sys.executable, "-c", BUILDER, script, str(tmp_path / "house")]
    begun = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _turn in range(3)]
    said = [process.communicate(timeout=100)[0] for process in begun]
    assert [process.returncode for process in begun] == [0, 0, 0]
    assert sorted('"changed": true' in one for one in said) == [False, False, True]
    assert (tmp_path / "house/built").read_text() == "begun\ndone\n"


def test_check_mode_makes_nothing(tmp_path: Path) -> None:
    script = collection.PROJECT / "scripts/wheelhouse"
    done = subprocess.run(
        [sys.executable, script, "--check", tmp_path / "house"], capture_output=True, text=True, check=True
    )
    assert '"changed": true' in done.stdout
    assert list(tmp_path.iterdir()) == []
