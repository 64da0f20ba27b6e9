# SPDX-License-Identifier: MIT
"""The Ansible modules under any options: a documented result, readable requests, never a traceback."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sockmi import api
from sockmi.refusal import Refusal
from tests import returned

pytest.importorskip("ansible")

PROJECT = Path(__file__).resolve().parents[2]
ID = "7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01"
WORDS = (
    *(
        "1",
        "80",
        "0.1",
        "inf",
        "nan",
        "yes",
        "no",
        "a",
        "web",
        "~",
        "~x",
        "/",
        "nowhere/../x",
        "{{x}}",
        "::1",
        "[::1]:7",
    ),
    *(
        "192.0.2.1",
        "192.0.2.0/24",
        "192.0.2.1:99999",
        "239.7.7.7",
        "ff05::7",
        "connected",
        "listening",
        "sockets",
    ),
    *(
        "all",
        "history",
        "export",
        "moved",
        "ESTABLISHED",
        "present",
        "absent",
        "loaded",
        "built",
        "unloaded",
        "9.9.9",
    ),
)
NUMBERS = [0, 1, 7, 80, 65535, 65536, -1, 2**70, 0.5]
PLAUSIBLE = st.sampled_from([*WORDS, *NUMBERS, ID, "00" * 32, "# none", "", " ", "a\0b", "\ud800"])
SCALARS = st.none() | st.booleans() | PLAUSIBLE | st.integers() | st.floats() | st.text(max_size=12)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=5) | PLAUSIBLE, SCALARS, max_size=3)
)


class Daemon:
    """Answers what the real one's parser lets through, with the samples of the documentation."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "control.sock"
        self.unreadable: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _unused = self._listener.accept()
                with connection, connection.makefile("rb") as lines:
                    for line in lines:
                        connection.sendall(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            api.parse_request(line)
        except Refusal as error:
            self.unreadable.append(line)
            why = {"code": "bad-request", "message": str(error), "errno": "EINVAL"}
            return {"ok": False, "error": why}
        request = json.loads(line)
        info = returned.documentation("info")
        moved = dict(returned.documentation("export")["migrations"]["sample"][0])
        if request["op"] == "list":
            return {"ok": True, request["table"]: info[request["table"]]["sample"]}
        if request["op"] == "export":
            outcome = "planned" if request.get("dry_run") else "moved"
            return {
                "ok": True,
                "migrations": [
                    {**moved, "migration_id": one["migration_id"], "outcome": outcome}
                    for one in request["sockets"]
                ],
            }
        if request["op"] in ("history", "info"):
            return {"ok": True, "migrations": [moved]}
        if request["op"] == "groups":
            return {"ok": True, "groups": info["groups"]["sample"], "changed": True}
        return {"ok": True, **info["daemon"]["sample"]}

    def close(self) -> None:
        """No more."""
        self._listener.close()


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """One for all examples."""
    with tempfile.TemporaryDirectory() as folder:
        made = Daemon(Path(folder))
        yield made
        made.close()


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    """Imports a module of the collection."""
    link = PROJECT / ".build/collections/ansible_collections/sockmi/appliance"
    if not link.is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../../../..")
    sys.path.insert(0, str(link.parents[2]))
    yield lambda name: importlib.import_module(f"ansible_collections.sockmi.appliance.plugins.modules.{name}")
    sys.path.remove(str(link.parents[2]))


def run(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The result of the module, run in this process."""
    from ansible.module_utils import basic

    basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": options}).encode()
    basic._ANSIBLE_PROFILE = "legacy"
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        module.main()
    result: dict[str, Any] = json.loads(told.getvalue())
    return result


def options_of(module: Any) -> Any:
    """Any of a module's options, with any values; but for what the test itself sets."""
    names = sorted(set(module.argument_spec()) - {"control", "key_file"})
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=5)


FLAGS = st.fixed_dictionaries({"_ansible_check_mode": st.booleans(), "_ansible_diff": st.booleans()})


def judge(module: str, result: dict[str, Any]) -> None:
    """Documented, and foreseen."""
    assert not returned.differences(module, result), result
    assert isinstance(result.get("msg", ""), str)
    assert "something unforeseen" not in result.get("msg", ""), result["msg"]


class Clock:
    """On which whoever sleeps loses no time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Go on."""
        assert seconds >= 0
        self._now += seconds


@pytest.mark.parametrize("name", ["drain", "export", "info", "group"])
def test_any_options(
    name: str, daemon: Daemon, load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load(name)
    if name == "drain":
        monkeypatch.setattr(module, "time", Clock())
    key_file = str(tmp_path / "key")

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(options_of(module), FLAGS, st.booleans(), VALUES, st.booleans())
    def attempt(
        options: dict[str, Any], flags: dict[str, bool], reachable: bool, nowhere: Any, keyed: bool
    ) -> None:
        if options.get("wait_s") is not None:
            options["wait_s"] = 0
        options = {**options, **flags}
        options["control"] = str(daemon.path) if reachable else nowhere
        if name == "group":
            options.setdefault("name", "web")
            if keyed:
                options["key_file"] = key_file
        daemon.unreadable.clear()
        judge(name, run(module, options))
        for line in daemon.unreadable:  # a lone surrogate is no text in JSON
            assert b"\\ud8" in line, line

    attempt()


def configured() -> list[Path]:
    """What the module could have written."""
    return sorted(Path("/etc").glob("mod*.d/*"))


def test_any_options_of_kmod(load: Callable[[str], Any], tmp_path: Path) -> None:
    """In check mode, where it looks at everything and does nothing."""
    module = load("kmod")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/dkms.conf").write_text('PACKAGE_NAME="sockmi"\nPACKAGE_VERSION="1.0"\n')
    before = configured()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(options_of(module), st.booleans(), st.sampled_from([None, "tree", "tree/dkms.conf", "none"]))
    def attempt(options: dict[str, Any], diff: bool, source: str | None) -> None:
        if source:
            options["source"] = str(tmp_path / source)
        judge("kmod", run(module, {**options, "_ansible_check_mode": True, "_ansible_diff": diff}))

    attempt()
    assert configured() == before
