# SPDX-License-Identifier: MIT
"""The Ansible modules: options as documented, old Pythons, ``ansible-doc``, and answers of odd daemons."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import errno
import importlib
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import yaml

from sockmi import api
from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.transport.group import Group, GroupError, GroupSettings
from sockmi.transport.hello import Introduction
from sockmi.transport.identity import Identity
from sockmi.transport.keyring import KeyFileError, Keyring
from sockmi.transport.sockaddr import routed_address
from tests import collection, returned

pytest.importorskip("ansible")

PROJECT = Path(__file__).resolve().parents[2]
MODULES = ("drain", "export", "group", "info", "kmod")
OF_THE_DAEMON = ("drain", "export", "group", "info")  # those that speak to it, and are an action group
TARGET_SIDE = sorted(
    [*(PROJECT / "plugins/modules").glob("*.py"), *(PROJECT / "plugins/module_utils").glob("*.py")]
)
ID = "7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01"
KEY = "00112233445566778899aabbccddeeff" * 2
CHECKED = ("type", "elements", "default", "choices", "required")


@pytest.fixture(scope="module", autouse=True)
def collections() -> Path:
    """The folder of collections that has this checkout as sockmi.appliance."""
    link = PROJECT / ".build/collections/ansible_collections/sockmi/appliance"
    if not link.is_dir():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("../../../..")
    return link.parents[2]


@pytest.fixture(scope="module")
def load(collections: Path) -> Iterator[Callable[[str], Any]]:
    """Imports a plugin, as the controller does."""
    sys.path.insert(0, str(collections))
    yield lambda name: importlib.import_module(f"ansible_collections.sockmi.appliance.plugins.{name}")
    sys.path.remove(str(collections))


def run(
    collections: Path,
    module: str,
    *,
    check: bool = False,
    env: dict[str, str] | None = None,
    within: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run a module as the target does, ``within`` a command; its result, with ``rc``."""
    arguments = {"ANSIBLE_MODULE_ARGS": {**options, "_ansible_check_mode": check, "_ansible_diff": True}}
    result = subprocess.run(
        [*within, sys.executable, "-m", f"ansible_collections.sockmi.appliance.plugins.modules.{module}"],
        input=json.dumps(arguments),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(collections)} | (env or {}),
    )
    assert "Traceback" not in result.stdout + result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    assert not returned.differences(module, content)
    return {**content, "rc": result.returncode}


class OddDaemon:
    """Answers each request with the next of ``answers``: a dict, raw bytes, or None to hang up; or a maker.

    Whoever looks for what could be moved finds nothing in the import lists, or the next of ``imports``.
    """

    def __init__(self, folder: Path, answers: list[Any]) -> None:
        self.path = folder / "control.sock"
        self.imports: list[list[dict[str, Any]]] = []
        self.requests: list[dict[str, Any]] = []
        self._answers = iter(answers)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, StopIteration):
            while True:
                connection, _unused = self._listener.accept()
                with connection, connection.makefile("rb") as lines:
                    for line in lines:
                        request = json.loads(line)
                        if request.get("table") == "imports" and "filter" in request:
                            rows = self.imports.pop(0) if self.imports else []
                            connection.sendall(json.dumps({"ok": True, "imports": rows}).encode() + b"\n")
                            continue
                        self.requests.append(request)
                        answer = next(self._answers)
                        answer = answer() if callable(answer) else answer
                        if answer is None:
                            break
                        raw = (
                            answer
                            if isinstance(answer, bytes)
                            else json.dumps({"ok": True, **answer}).encode()
                        )
                        connection.sendall(raw + b"\n")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Callable[..., OddDaemon]]:
    """Makes daemons that answer as they are told."""
    with contextlib.ExitStack() as stack:

        def make(*answers: Any) -> OddDaemon:
            daemon = OddDaemon(tmp_path, list(answers))
            stack.callback(daemon.close)
            return daemon

        yield make


def record(**fields: Any) -> dict[str, Any]:
    """A migration record as the daemon sends it."""
    content = {
        "migration_id": ID,
        "kind": "connected",
        "state": "ESTABLISHED",
        "local": "192.0.2.1:80",
        "remote": "192.0.2.9:4000",
        "from": "a",
        "to": "b",
        "started_at": "2026-11-23T12:00:00Z",
        "outcome": "moved",
        **fields,
    }
    made: dict[str, Any] = api.MigrationRecord.model_validate_json(json.dumps(content)).model_dump(
        mode="json", by_alias=True
    )
    return made


def row(inode: int, **fields: Any) -> dict[str, Any]:
    """A row of the socket list."""
    return {"pid": 510, "fd": inode, "inode": inode, "local": "192.0.2.1:80", "movable": True, **fields}


# ---------------------------------------------------------------- documentation and code


def documented(load: Callable[[str], Any], name: str) -> dict[str, Any]:
    """The options of a module's documentation, fragments included."""
    fragments = load("doc_fragments.common").ModuleDocFragment
    text = yaml.safe_load(load(f"modules.{name}").DOCUMENTATION)
    options: dict[str, Any] = dict(text["options"])
    for fragment in text.get("extends_documentation_fragment", []):
        assert fragment.startswith("sockmi.appliance.common")
        attribute = fragment.removeprefix("sockmi.appliance.common").lstrip(".").upper() or "DOCUMENTATION"
        options |= yaml.safe_load(getattr(fragments, attribute))["options"]
    return options


@pytest.mark.parametrize("name", MODULES)
def test_options_are_documented_as_they_are(load: Callable[[str], Any], name: str) -> None:
    spec = load(f"modules.{name}").argument_spec()
    options = documented(load, name)
    assert set(spec) == set(options)
    for option, real in spec.items():
        said = options[option]
        assert {key: said.get(key) for key in CHECKED} == {key: real.get(key) for key in CHECKED}, option
        assert all(said["description"]), option


@pytest.mark.parametrize("name", MODULES)
def test_attributes_are_declared(load: Callable[[str], Any], name: str) -> None:
    attributes = yaml.safe_load(load(f"modules.{name}").DOCUMENTATION)["attributes"]
    assert {"check_mode", "diff_mode", "idempotent"} <= set(attributes)
    assert attributes["check_mode"]["support"] == "full"


def test_action_group_names_every_module() -> None:
    runtime = yaml.safe_load((PROJECT / "meta/runtime.yml").read_text())
    assert sorted(runtime["action_groups"]["sockmi"]) == sorted(OF_THE_DAEMON)


def test_returned_fields_are_those_of_the_daemon(load: Callable[[str], Any]) -> None:
    def said(module: str, value: str) -> set[str]:
        return set(yaml.safe_load(load(f"modules.{module}").RETURN)[value]["contains"])

    def real(model: type[Any]) -> set[str]:
        return {field.alias or name for name, field in model.model_fields.items()}

    def nullable(module: str, value: str) -> set[str]:
        fields = returned.documentation(module)[value]["contains"]
        return {name for name, entry in fields.items() if returned.may_be_null(entry)}

    def optional(model: type[Any]) -> set[str]:
        return {
            field.alias or name
            for name, field in model.model_fields.items()
            if type(None) in get_args(field.annotation)
        }

    for module, value, model in (
        ("export", "migrations", api.MigrationRecord),
        ("drain", "migrations", api.MigrationRecord),
        ("info", "history", api.MigrationRecord),
        ("info", "sockets", api.SocketRow),
        ("info", "imports", api.ImportRow),
        ("info", "redirects", api.RedirectRow),
        ("info", "groups", api.GroupRow),
        ("group", "group", api.GroupRow),
    ):
        assert nullable(module, value) == optional(model), value
    assert said("export", "migrations") == real(api.MigrationRecord)
    records = {
        (module, value): json.dumps(returned.documentation(module)[value]["contains"])
        for module, value in (("export", "migrations"), ("drain", "migrations"), ("info", "history"))
    }
    assert records["drain", "migrations"] == records["export", "migrations"]
    assert records["info", "history"] == records["export", "migrations"].replace(
        "RV(migrations[]", "RV(history[]"
    ).replace("Always V(export)", "V(export) or V(import)")
    assert said("info", "daemon") == real(api.StatusResponse) - {"ok", "id", "more", "fds"}
    assert said("info", "sockets") == real(api.SocketRow)
    assert said("info", "imports") == real(api.ImportRow)
    assert said("info", "redirects") == real(api.RedirectRow)
    members = returned.documentation("group")["group"]["contains"]["members"]["contains"]
    assert members == returned.documentation("info")["groups"]["contains"]["members"]["contains"]
    assert set(members) == real(api.Member)
    assert said("info", "groups") == said("group", "group") == real(api.GroupRow)


def test_choices_are_those_of_the_daemon(load: Callable[[str], Any]) -> None:
    shared = load("module_utils._module")
    assert set(shared.KINDS) == {kind.value for kind in Kind}
    assert set(load("modules.info").OUTCOMES) == {outcome.value for outcome in api.Outcome}
    assert set(shared.FILTER_SPEC) | {"fd", "kinds"} == set(api.SocketFilter.model_fields)
    from sockmi.engine.preflight import STATES

    # TIME-WAIT and SYN-RECEIVED have no descriptor.
    names = set(STATES.values()) if isinstance(STATES, dict) else set(get_args(STATES))
    assert set(shared.STATES) == names - {"TIME-WAIT", "SYN-RECEIVED", "NEW-SYN-RECEIVED"}


class _RunTime(ast.NodeVisitor):
    """Finds what Python 3.8 parses but cannot evaluate; annotations are not evaluated."""

    BUILTINS = frozenset({"dict", "list", "set", "frozenset", "tuple", "type"})

    def __init__(self) -> None:
        self.found: list[int] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for child in [*node.body, *node.decorator_list, *node.args.defaults]:
            self.visit(child)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in self.BUILTINS:
            self.found.append(node.lineno)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in ("removeprefix", "removesuffix", "pidfd_open", "bit_count"):
            self.found.append(node.lineno)
        self.generic_visit(node)


@pytest.mark.parametrize("path", TARGET_SIDE, ids=lambda path: path.stem)
def test_runs_on_python_3_8(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    finder = _RunTime()
    finder.visit(tree)
    assert not finder.found, f"lines {finder.found}"
    assert not any(isinstance(node, ast.Match) for node in ast.walk(tree))


@pytest.mark.parametrize("path", TARGET_SIDE, ids=lambda path: path.stem)
def test_imports_only_the_standard_library(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            first = name.split(".")[0]
            assert first in sys.stdlib_module_names or first in ("ansible", "ansible_collections"), name


@pytest.mark.usefixtures("core")
def test_ansible_doc(collections: Path) -> None:
    names = [f"sockmi.appliance.{name}" for name in MODULES]
    result = subprocess.run(
        [collection.program("ansible-doc"), "--json", *names],
        env=os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        cwd=PROJECT,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert set(shown) == set(names)
    for name, page in shown.items():
        if name.rpartition(".")[2] in OF_THE_DAEMON:
            assert {"control", "action_group"} <= {*page["doc"]["options"], *page["doc"]["attributes"]}
        assert page["examples"]
        assert page["return"]


# ---------------------------------------------------------------- wrong options


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("kmod", {"kernel": "../x"}, "give a release as `uname -r` says it"),
        ("kmod", {"source": "/nowhere"}, "give the module's source tree"),
        ("kmod", {"source": "/etc"}, "has no dkms.conf of SockMi"),
        ("kmod", {"source": "/etc/hostname"}, "give the module's source tree"),
        ("kmod", {"state": "unloaded", "parameters": {"a b": 1}}, "is no parameter"),
        ("export", {}, "Nothing says which sockets"),
        ("export", {"fd": 5}, "required by 'fd': pid"),
        ("export", {"pid": 1, "fd": 5, "unit": "x"}, "leave out unit"),
        ("export", {"pid": 1, "fd": -1}, "fd is -1"),
        ("export", {"pid": 0, "fd": 1}, "pid is 0"),
        ("export", {"pid": 1, "migration_id": ID}, "required by 'migration_id': fd"),
        ("export", {"pid": 1, "fd": 5, "migration_id": "seven"}, "give a UUID"),
        ("export", {"local_port": 70000}, "local_port is 70000"),
        ("export", {"local_port": "http"}, "local_port"),
        ("export", {"remote_address": "10.0.0.0/33"}, "give an IP address"),
        ("export", {"states": ["TIME-WAIT"]}, "value of states must be"),
        ("export", {"all": True, "kinds": []}, "kinds is empty"),
        ("export", {"all": True, "count": 0}, "count is 0"),
        ("export", {"all": True, "timeout": 0}, "timeout is 0"),
        ("export", {"process": ""}, "process is empty"),
        ("export", {"proces": "x"}, "Unsupported parameters"),
        ("drain", {}, "Nothing says which sockets"),
        ("drain", {"all": True, "kinds": []}, "kinds is empty"),
        ("drain", {"all": True, "to": []}, "to is empty"),
        ("drain", {"all": True, "rate": 0}, "rate is 0"),
        ("drain", {"all": True, "count": 0}, "count is 0"),
        ("drain", {"all": True, "stop_after": -1}, "stop_after is -1"),
        ("drain", {"all": True, "timeout": 0}, "timeout is 0"),
        ("drain", {"all": True, "so_far": {"refused": ["x"]}}, "refused"),
        ("info", {"gather_subset": ["everything"]}, "value of gather_subset must be"),
        ("info", {"history_limit": 0}, "history_limit is 0"),
        ("info", {"local_address": "here"}, "give an IP address"),
        ("group", {}, "missing required arguments: name"),
        ("group", {"name": "Web_"}, "name is 'Web_'"),
        ("group", {"name": "w", "address": "10.0.0.1"}, "no multicast address"),
        ("group", {"name": "w", "address": "nine"}, "give an IPv4 or IPv6 address"),
        ("group", {"name": "w", "address": "239.1.1.1", "peers": ["10.0.0.1"]}, "mutually exclusive"),
        ("group", {"name": "w", "peers": []}, "peers is empty"),
        ("group", {"name": "w", "peers": ["10.0.0.1:0"]}, "give a port"),
        ("group", {"name": "w", "peers": ["host:1"]}, "give an IPv4 or IPv6 address"),
        ("group", {"name": "w", "port": 0}, "port is 0"),
        ("group", {"name": "w", "members_min": -1}, "members_min is -1"),
        ("group", {"name": "w", "key": KEY}, "required by 'key': key_file"),
        ("group", {"name": "w", "key": "secret", "key_file": "/nowhere/k"}, "line 1: not a key"),
        ("group", {"name": "w", "key": "# none", "key_file": "/nowhere/k"}, "key is empty"),
        ("group", {"name": "w", "key": KEY, "key_file": "/nowhere/k"}, "there is no folder /nowhere"),
        ("group", {"name": "w", "state": "query"}, "value of state must be"),
    ],
)
def test_wrong_options(collections: Path, module: str, options: dict[str, Any], message: str) -> None:
    if module in OF_THE_DAEMON:
        options = {**options, "control": "/nowhere/control.sock"}
    result = run(collections, module, **options)
    assert result["failed"] is True
    assert message in result["msg"]
    assert options.get("key", "no key") not in json.dumps(result)


@pytest.mark.parametrize(
    ("module", "options"),
    [("drain", {"all": True}), ("export", {"all": True}), ("info", {}), ("group", {"name": "web"})],
)
def test_no_daemon(collections: Path, module: str, options: dict[str, Any]) -> None:
    result = run(collections, module, env={"SOCKMI_CONTROL": "/nowhere/control.sock"}, **options)
    assert result["failed"] is True
    for word in ("/nowhere/control.sock: No such file", "Start it", "become"):
        assert word in result["msg"]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"not json", "no JSON object"),
        (b"[1]", "no JSON object"),
        ({"ok": False}, "neither ok nor an error"),
        ({"ok": False, "error": {"code": "internal", "message": "It broke."}}, "It broke."),
        (None, "closed the connection"),
        ({"sockets": [{"odd": 1}]}, "something unforeseen"),
    ],
)
def test_odd_answers(collections: Path, odd: Callable[..., OddDaemon], answer: Any, message: str) -> None:
    daemon = odd(answer)
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert result["failed"] is True
    assert message in result["msg"]


def test_export_by_filter(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    """One move a socket, movable ones first; the request is what the options say."""
    why = {"code": "urgent-data", "message": "Read it.", "errno": "ENOTSUP"}
    rows = [row(7, movable=False), row(8, received_bytes=5), row(8, fd=9), row(10)]
    answer = [record(), record(migration_id=ID[:-1] + "2", outcome="refused", refusal=why, to=None)]
    daemon = odd({"sockets": rows}, {"migrations": answer})
    options = {"unit": "web.service", "local_port": 80, "count": 2, "to": "b", "timeout": 7}
    result = run(collections, "export", control=str(daemon.path), **options)
    listing, export = daemon.requests
    assert listing["filter"] == {"unit": "web.service", "local_port": 80, "kinds": ["connected"]}
    # Each is the one that was listed, whatever has its number by then.
    named = [(one["fd"], one["inode"], one.get("received_bytes")) for one in export["sockets"]]
    assert named == [(8, 8, 5), (10, 10, None)]
    assert {name: export[name] for name in ("to", "timeout_s", "dry_run")} == {
        "to": "b",
        "timeout_s": 7.0,
        "dry_run": False,
    }
    for request in daemon.requests:
        api.parse_request(json.dumps(request).encode())
    assert (result["failed"], result["changed"], result["moved"], result["refused"]) == (True, True, 1, 1)
    assert "1 of 2 sockets did not move. urgent-data (1): Read it." in result["msg"]
    assert [one["outcome"] for one in result["migrations"]] == ["moved", "refused"]
    assert result["diff"]["before"].count(": a\n") == 2
    assert result["diff"]["after"].count(": b\n") == 1


def test_empty_selection_changes_nothing(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd({"sockets": []})
    result = run(collections, "export", control=str(daemon.path), process="none")
    assert (result["rc"], result["changed"], result["migrations"]) == (0, False, [])


def test_sockets_of_the_session_are_spared(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    """Those of the module's ancestors (this process is one), and the one that SSH_CONNECTION names."""
    with socket.create_server(("127.0.0.1", 0)) as ours:
        inode = os.fstat(ours.fileno()).st_ino
        login = row(5, local="192.0.2.1:22", remote="192.0.2.7:999")
        daemon = odd({"sockets": [row(inode), login]})
        environment = {"SSH_CONNECTION": "192.0.2.7 999 192.0.2.1 22"}
        result = run(collections, "export", env=environment, control=str(daemon.path), all=True)
    assert (result["rc"], result["migrations"], result["spared"]) == (0, [], 2)


def test_what_has_ended_is_passed_over(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd({"sockets": [row(7, movable=False, refusal={"code": "ended", "message": "It has."})]})
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert (result["rc"], result["changed"], result["migrations"]) == (0, False, [])


def test_sockets_that_end_meanwhile(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    refused = {"ok": False, "error": {"code": "no-such-socket", "message": "No.", "errno": "EBADF"}}
    daemon = odd({"sockets": [row(7), row(8)]}, refused, {"sockets": [row(8)]}, {"migrations": [record()]})
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert (result["rc"], result["moved"], result["refused"]) == (0, 1, 0)
    assert [one["fd"] for one in daemon.requests[-1]["sockets"]] == [8]
    assert result["closed"] == 1


def test_sockets_that_were_not_found(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    """One has ended; one is still there, under another descriptor: that one was refused, and this is told."""

    def refused(fd: int, code: str) -> dict[str, Any]:
        why = {"code": code, "message": "No.", "errno": "EIO"}
        return record(outcome="refused", kind=None, state=None, pid=510, fd=fd, refusal=why)

    records = [refused(7, "no-such-socket"), refused(8, "no-such-socket"), refused(9, "no-descriptors")]
    daemon = odd(
        {"sockets": [row(7), row(8), row(9)]}, {"migrations": records}, {"sockets": [row(8), row(9)]}
    )
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert (result["failed"], result["moved"], result["refused"], result["closed"]) == (True, 0, 2, 1)
    assert [one["fd"] for one in result["migrations"]] == [8, 9]


def waiting(number: int) -> dict[str, Any]:
    """A row of the import lists."""
    ends = {"local": "192.0.2.1:80", "remote": f"192.0.2.9:{number}"}
    return {"migration_id": f"7f0c0f0e-3f0b-4d0f-9f3d-{number:012}", **ends}


@pytest.mark.parametrize("whole", [True, False], ids=["the request", "each"])
def test_listed_ones_that_were_not_found(
    collections: Path, odd: Callable[..., OddDaemon], whole: bool
) -> None:
    """One has ended; one has been taken by an application, and is not closed; one waits still."""
    why = {"code": "no-such-socket", "message": "No.", "errno": "EBADF"}
    lost = record(outcome="refused", kind=None, state=None, local=None, remote=None, refusal=why)
    taken = row(77, remote="192.0.2.9:2")
    first = {"ok": False, "error": why} if whole else {"migrations": [lost, lost, record()]}
    daemon = odd({"sockets": []}, first, {"sockets": [taken]}, {"migrations": [record(), record()]})
    daemon.imports = [[waiting(1), waiting(2), waiting(3)], [waiting(3)]]
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert result["closed"] == 1
    assert (result["moved"], result["refused"]) == ((2, 0) if whole else (1, 1))
    named = [one.get("listed", one.get("fd")) for one in daemon.requests[-1].get("sockets", [])]
    assert named == ([77, waiting(3)["migration_id"]] if whole else [])


def test_the_history_has_what_is_documented(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    """`run` compares each record with the description."""
    told = [record(), record(direction="import"), record(outcome="refused", local=None, blackout_us=None)]
    daemon = odd({"migrations": told})
    result = run(collections, "info", control=str(daemon.path), gather_subset=["history"])
    assert [one["direction"] for one in result["history"]] == ["export", "import", "export"]
    [first, *_others] = result["history"]
    assert list(returned.differences("info", {"history": [first | {"other": 1}]}))


def test_many_go_in_batches(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    rows = [row(number) for number in range(1, 702)]
    daemon = odd(
        {"sockets": rows}, {"migrations": [record()] * 500}, {"ok": False, "error": {"code": "shutting-down"}}
    )
    result = run(collections, "export", control=str(daemon.path), all=True)
    assert [len(request["sockets"]) for request in daemon.requests[1:]] == [500, 201]
    # The second batch failed as a whole; what the first one did is not forgotten.
    assert (result["failed"], result["changed"], result["moved"]) == (True, True, 500)
    assert result["code"] == "shutting-down"


def test_daemon_that_goes_away_is_asked_again(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd({"migrations": []}, None, {"migrations": [record(), record(direction="import")]})
    result = run(collections, "export", control=str(daemon.path), pid=510, fd=5, migration_id=ID)
    assert [request["op"] for request in daemon.requests] == ["info", "export", "info"]
    assert (result["rc"], result["changed"], result["moved"]) == (0, True, 1)


def test_daemon_that_goes_away_before_it_began(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd(None, {"migrations": []})
    result = run(collections, "export", control=str(daemon.path), pid=510, fd=5)
    assert (result["failed"], result["changed"]) == (True, False)
    assert "1 of 1 migrations were not begun; run it again" in result["msg"]


@pytest.mark.parametrize("check", [False, True])
def test_done_before(collections: Path, odd: Callable[..., OddDaemon], check: bool) -> None:
    daemon = odd({"migrations": [record(direction="import"), record()]})
    result = run(collections, "export", check=check, control=str(daemon.path), pid=1, fd=5, migration_id=ID)
    assert (result["rc"], result["changed"], result["moved"]) == (0, False, 1)
    assert result["diff"]["before"] == result["diff"]["after"]
    assert [request["op"] for request in daemon.requests] == ["info"]


def test_check_mode_is_a_dry_run(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd({"sockets": [row(7)]}, {"migrations": [record(outcome="planned", to=None)]})
    result = run(collections, "export", check=True, control=str(daemon.path), all=True, to="b")
    assert daemon.requests[1]["dry_run"] is True
    assert (result["rc"], result["changed"], result["moved"]) == (0, True, 1)
    assert result["diff"]["after"].endswith(": b\n")


# ---------------------------------------------------------------- groups

WEB = {
    "name": "web",
    "address": "239.7.7.7",
    "port": 7007,
    "interface": "eth0",
    "peers": [],
    "configured": False,
    "members": [],
}
HEARD = {
    "host": "b",
    "host_id": "6fa459eaee8a3ca4894edb77e160355e",
    "address": "10.7.0.2:7008",
    "last_heard_s": 0.1,
    "connected": True,
    "load": None,
}
STATUS = {"migrations_under_way": 0}


def key_file(path: Path, content: str = KEY) -> Path:
    """A file as the daemon takes it."""
    path.touch(mode=0o600)
    path.write_text(content)
    return path


def test_group_key_is_written_once_and_never_shown(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path
) -> None:
    file = tmp_path / "web.key"
    options = {"name": "web", "address": "239.7.7.7", "port": 7007, "key": KEY, "key_file": str(file)}
    options["interface"] = "lo"
    web = {**WEB, "interface": "lo"}
    none, joined = {"groups": []}, {"groups": [web]}
    daemon = odd(
        none, none, none, none, joined, joined, joined, joined, joined, STATUS, joined, joined, joined
    )
    options["control"] = str(daemon.path)

    predicted = run(collections, "group", check=True, **options)
    assert not file.exists()
    done = run(collections, "group", **options)
    assert (file.read_text(), file.stat().st_mode & 0o777) == (KEY + "\n", 0o600)
    assert (predicted["changed"], predicted["diff"], predicted["group"]) == (
        done["changed"],
        done["diff"],
        done["group"],
    )
    assert (done["changed"], done["key_changed"]) == (True, True)

    again = run(collections, "group", **options)
    assert (again["changed"], again["key_changed"]) == (False, False)
    assert again["diff"]["before"] == again["diff"]["after"]

    file.write_text("# another\n" + KEY[::-1] + "\n")
    other = run(collections, "group", **options)
    assert (other["changed"], other["key_changed"], file.read_text()) == (True, True, KEY + "\n")
    operations = [(request["op"], request.get("action")) for request in daemon.requests]
    assert operations[-4:] == [("status", None), ("groups", "leave"), ("groups", "join"), ("groups", "list")]
    for result in (predicted, done, again, other):
        assert KEY not in json.dumps(result)
        assert KEY[::-1] not in json.dumps(result)
    for request in daemon.requests:
        api.parse_request(json.dumps(request).encode())


def test_group_mode_of_the_key_file(collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path) -> None:
    file = tmp_path / "web.key"
    file.write_text(KEY)
    file.chmod(0o644)
    daemon = odd({"groups": [WEB]})
    result = run(collections, "group", control=str(daemon.path), name="web", key=KEY, key_file=str(file))
    assert (result["changed"], file.stat().st_mode & 0o777) == (True, 0o600)
    assert len(daemon.requests) == 1  # the contents are the same: no need to join again


def test_group_members(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    silent = {**HEARD, "host": "c", "last_heard_s": None}
    rows = [{"groups": [{**WEB, "members": members}]} for members in ([], [silent], [HEARD])]
    daemon = odd(*rows)
    result = run(collections, "group", control=str(daemon.path), name="web", members_min=1, wait_s=20)
    assert (result["rc"], result["changed"], len(daemon.requests)) == (0, False, 3)


def test_group_members_missing(collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path) -> None:
    found = {"groups": [{**WEB, "interface": "lo", "members": [HEARD]}]}
    daemon = odd({"groups": []}, {"groups": []}, found, *[found] * 10)
    key_file(tmp_path / "k")
    result = run(
        collections, "group", control=str(daemon.path), name="web", address="239.7.7.7", port=7007,
        interface="lo", key_file=str(tmp_path / "k"), members_min=2, wait_s=0.3,
    )  # fmt: skip
    assert (result["failed"], result["changed"]) == (True, True)
    assert "1 of 2 other members heard within 0.3 s (b)" in result["msg"]


def test_group_settings_change(collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path) -> None:
    """What is not given stays; if the new settings do not work, the old ones are back."""
    refused = {"ok": False, "error": {"code": "bad-request", "message": "Not joined.", "errno": "EINVAL"}}
    web = {"groups": [{**WEB, "interface": "lo"}]}
    daemon = odd(web, web, STATUS, {"groups": []}, refused, web)
    key_file(tmp_path / "k")
    options = {"name": "web", "port": 7008, "key_file": str(tmp_path / "k"), "control": str(daemon.path)}
    result = run(collections, "group", **options)
    joins = [request for request in daemon.requests if request.get("action") == "join"]
    assert [one["port"] for one in joins] == [7008, 7007]
    assert {one["address"] for one in joins} == {"239.7.7.7"}
    assert result["failed"] is True
    assert "with the former settings again" in result["msg"]


NOT_JOINED = {"ok": False, "error": {"code": "bad-request", "message": "Not joined.", "errno": "EINVAL"}}


@pytest.mark.parametrize("rejoined", [True, False])
def test_group_has_the_former_key_if_it_cannot_be_joined(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path, rejoined: bool
) -> None:
    """It is there when the daemon reads it again: with another it would be cut off from everybody."""
    file = key_file(tmp_path / "k", f"# ours\n{KEY}")
    web = {"groups": [{**WEB, "interface": "lo"}]}
    read: list[str] = []

    def join(answer: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        return lambda: read.append(file.read_text()) or answer  # type: ignore[func-returns-value]

    again = join(web if rejoined else NOT_JOINED)
    daemon = odd(web, web, STATUS, {"groups": []}, join(NOT_JOINED), again)
    options = {"name": "web", "key": KEY[::-1], "key_file": str(file), "control": str(daemon.path)}
    result = run(collections, "group", **options)
    assert read == [f"{KEY[::-1]}\n", f"# ours\n{KEY}"]
    assert (file.read_text(), file.stat().st_mode & 0o777) == (f"# ours\n{KEY}", 0o600)
    assert (result["failed"], result["changed"], result["key_changed"]) == (True, not rejoined, False)
    assert ("with the former settings again" in result["msg"]) == rejoined
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("joined", [True, False])
def test_group_key_file_that_was_not_there(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path, joined: bool
) -> None:
    """It is gone again, but where the daemon was in the group: by a key that is in no file that is known."""
    file = tmp_path / "k"
    web = {"groups": [{**WEB, "interface": "lo"}] if joined else []}
    leaving = [STATUS, {"groups": []}] if joined else []
    daemon = odd(web, web, *leaving, NOT_JOINED, web)
    options = {"name": "web", "address": "239.7.7.7", "port": 7007, "interface": "lo", "key": KEY}
    result = run(collections, "group", key_file=str(file), control=str(daemon.path), **options)
    assert result["failed"] is True
    assert (file.exists(), result["changed"], result["key_changed"]) == (joined, joined, joined)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to somebody")
@pytest.mark.parametrize("key", [KEY, KEY[::-1]], ids=["the same", "another"])
@pytest.mark.parametrize("fails", [True, False])
def test_group_key_file_of_another_user(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path, key: str, fails: bool
) -> None:
    """Of whom the daemon takes none: it is root's then, as check mode has said, and though joining fails."""
    web = {"groups": [{**WEB, "interface": "lo"}]}
    leaving = [STATUS, {"groups": []}, *([NOT_JOINED, web] if fails else [web, web])]
    told = []
    for check in (True, False):
        file = key_file(tmp_path / "k")
        os.chown(file, 1000, 1000)
        daemon = odd(web, web, *([STATUS] if check else leaving))
        options = {"name": "web", "key": key, "key_file": str(file), "control": str(daemon.path)}
        told.append(run(collections, "group", check=check, **options))
        daemon.close()
        daemon.path.unlink()
    predicted, done = told
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o600)
    assert (done["changed"], done["key_changed"]) == (True, True)
    assert "of user 1000" in predicted["diff"]["before"]
    if fails and key != KEY:
        assert "with the former settings again" in done["msg"]
        assert file.read_text() == KEY
    else:
        assert predicted["diff"] == done["diff"]
        assert file.read_text() == f"{key}\n"


def test_group_is_not_left_under_migrations(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path
) -> None:
    daemon = odd({"groups": [WEB]}, {"migrations_under_way": 3})
    result = run(collections, "group", control=str(daemon.path), name="web", state="absent")
    assert result["failed"] is True
    assert "3 migrations are under way" in result["msg"]


def test_group_peers_are_compared_as_addresses(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    listed = {**WEB, "address": None, "peers": ["10.0.0.2:7007", "[2001:db8::1]:7009"]}
    daemon = odd({"groups": [listed]})
    peers = ["[2001:DB8:0::1]:7009", "10.0.0.2"]
    result = run(collections, "group", control=str(daemon.path), name="web", port=7007, peers=peers)
    assert (result["rc"], result["changed"]) == (0, False)


def test_group_peers_have_the_port_that_the_group_has(
    collections: Path, odd: Callable[..., OddDaemon]
) -> None:
    """Also where a task that names another member leaves it as it is."""
    listed = {**WEB, "address": None, "port": 7007, "peers": ["10.0.0.2:7007"]}
    daemon = odd({"groups": [listed]})
    result = run(collections, "group", control=str(daemon.path), name="web", peers=["10.0.0.2"])
    assert (result["rc"], result["changed"]) == (0, False), result


def test_group_that_cannot_be_joined(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    daemon = odd({"groups": []}, {"groups": []})
    result = run(collections, "group", control=str(daemon.path), name="web", members_min=1)
    assert "give address (multicast) or peers" in result["msg"]
    result = run(collections, "group", control=str(daemon.path), name="web", address="239.1.1.1")
    assert "give key_file" in result["msg"]


def test_group_absent(collections: Path, odd: Callable[..., OddDaemon]) -> None:
    configured = {"groups": [{**WEB, "configured": True}]}
    daemon = odd(configured, STATUS, configured, STATUS, {"groups": []}, {"groups": []})
    options = {"control": str(daemon.path), "name": "web", "state": "absent"}
    predicted = run(collections, "group", check=True, **options)
    done = run(collections, "group", **options)
    again = run(collections, "group", **options)
    assert [one["changed"] for one in (predicted, done, again)] == [True, True, False]
    assert predicted["diff"] == done["diff"]
    assert predicted["warnings"] == done["warnings"]
    assert "is back as it stands there" in str(done["warnings"])


OTHER = {**WEB, "name": "other", "address": "239.1.1.1", "interface": "lo"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "absent", "key": None, "key_file": None}, "3 migrations are under way"),
        ({"port": 7009}, "3 migrations are under way"),
        ({"key": KEY[::-1]}, "3 migrations are under way"),
        ({"key": None, "key_file": "/nowhere/web.key", "port": 7009}, "give key, or copy the file"),
        ({"key": None, "port": 7009, "mode": 0o640}, "with mode 0600"),
        ({"key": None, "port": 7009, "owner": 1000}, "make it root's"),
        ({"key": None, "port": 7009, "content": "no key"}, "line 1: not a key"),
        ({"key": "00" * 32}, "line 1: a key is not random"),
        ({"key": f"{KEY}\n{KEY}"}, "has 2 keys; give 1 to 8, each once"),
        ({"interface": "nowhere0"}, "interface is 'nowhere0', which this host has not"),
        ({"port": 7010}, "which group 'other' of this host has"),
        ({"port": "taken"}, "which another socket of this host has (ss -ulpn)"),
        ({"port": 7009, "without": "addresses"}, "joined on lo: Cannot assign requested address; is the"),
        ({"key": KEY[::-1], "without": "addresses"}, "has it an IPv4 address (ip address)?"),
        ({"address": "ff15::7", "without": "addresses"}, "has it an IPv6 address (ip address)?"),
    ],
)
def test_group_check_mode_refuses_as_a_run_does(
    collections: Path, odd: Callable[..., OddDaemon], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """In the same words, and neither has left the group or written the key."""
    rows = {"groups": [{**WEB, "interface": "lo"}, {**OTHER, "port": 7010}]}
    file = key_file(tmp_path / "web.key", change.get("content", KEY))
    file.chmod(change.get("mode", 0o600))
    if "owner" in change:
        if os.geteuid():
            pytest.skip("gives a file to somebody")
        os.chown(file, change["owner"], -1)
    within = ["unshare", "-rn"] if "without" in change else []  # where `lo` is down
    before = file.read_text()
    taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    taken.bind(("127.0.0.1", 0))
    options = {"name": "web", "key": KEY, "key_file": str(file), **change}
    if change.get("port") == "taken":
        options["port"] = taken.getsockname()[1]
    options = {
        name: one
        for name, one in options.items()
        if name not in ("content", "mode", "owner", "without") and one is not None
    }
    told = []
    for check in (True, False):
        joins = "state" not in change
        daemon = odd(*[rows] * (1 + joins), {"migrations_under_way": 3}, None, None)
        result = run(collections, "group", check=check, within=within, control=str(daemon.path), **options)
        daemon.close()
        daemon.path.unlink()
        told.append(result["msg"])
        assert result["failed"] is True
        assert file.read_text() == before
        assert not {one.get("action") for one in daemon.requests} & {"join", "leave"}
    taken.close()
    assert told[0] == told[1]
    assert message in told[0]


EVERY = "0.0.0.0"  # noqa: S104


@pytest.mark.parametrize("holder", [EVERY, "127.0.0.1", "127.0.0.2", "239.7.7.7", "239.7.7.8", "::", None])
@pytest.mark.parametrize("other", ["239.7.7.7", "ff15::7", "127.0.0.1", "::1"])
@pytest.mark.parametrize("interface", ["lo", None])
def test_group_sees_a_port_that_is_taken_as_the_daemon_does(
    load: Callable[[str], Any], tmp_path: Path, holder: str | None, other: str, interface: str | None
) -> None:
    """The group is one of multicast, or lists another member."""
    address = other if ipaddress.ip_address(other).is_multicast else None
    peers = [] if address else [f"[{other}]:7" if ":" in other else f"{other}:7"]
    if address and not interface and not routed_address(ipaddress.ip_address(address)):
        pytest.skip("no route to a multicast group")
    taken = socket.socket(socket.AF_INET6 if holder == "::" else socket.AF_INET, socket.SOCK_DGRAM)
    if holder == "::":
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    with taken:
        taken.bind((holder or "127.0.0.1", 0))
        port = taken.getsockname()[1]
        if holder is None:
            taken.close()
        settings = GroupSettings(
            port=port,
            multicast=ipaddress.ip_address(address) if address else None,
            members=tuple(Endpoint.parse(one) for one in peers),
            interface=interface,
        )
        loop = asyncio.new_event_loop()
        group = Group(
            loop,
            settings,
            Keyring.load(key_file(tmp_path / "key")),
            Identity.load_or_create(tmp_path),
            Introduction(b"certificate", 7781),
            on_message=lambda *_unused: None,
        )
        module = load("modules.group")
        wanted = {"address": address, "port": port, "interface": interface, "peers": peers}
        seen = real = ""
        try:
            [version] = module._versions(wanted)
            module._bind(version, wanted)
        except OSError as error:
            seen = str(error.strerror)
        try:
            group.start()
        except GroupError as error:
            real = str(error)
        finally:
            group.close()
            loop.close()
        assert bool(seen) == bool(real)
        assert ("already in use" in seen) == ("already in use" in real)
        if holder is None:
            assert not seen
        elif holder == ("::" if ":" in other else EVERY):
            assert seen


@pytest.mark.parametrize(
    "lines",
    [
        [KEY],
        [f"# ours\n{KEY} # new"],
        [KEY.upper(), KEY],
        [KEY, KEY[::-1]],
        ["00" * 32],
        ["0123" * 16],
        ["01234567" * 8],
        [KEY + "00"],
        [base64.b64encode(bytes(range(32))).decode()],
        [base64.b64encode(bytes(range(31))).decode()],
        [f"{number:02x}" + KEY[2:] for number in range(8)],
        [f"{number:02x}" + KEY[2:] for number in range(9)],
        ["# nothing"],
    ],
)
def test_group_takes_the_keys_that_the_daemon_takes(
    load: Callable[[str], Any], tmp_path: Path, lines: list[str]
) -> None:
    file = key_file(tmp_path / "key", "\n".join(lines))
    try:
        Keyring.load(file)
    except KeyFileError:
        with pytest.raises(load("module_utils._module").WrongValue):
            load("modules.group")._checked_key(file.read_text())
    else:
        assert load("modules.group")._checked_key(file.read_text())


def test_kmod_speaks_the_ioctls_of_the_header(load: Callable[[str], Any]) -> None:
    header = (PROJECT / "kmod/uapi/sockmi.h").read_text()
    loaded = load("module_utils._loaded")
    sizes = {"__u16": 2, "__u32": 4, "__aligned_u64": 8}
    for name, form in (("hello", loaded.HELLO), ("nat_flush", loaded.FLUSH), ("forget", loaded.FORGET)):
        body = re.search(rf"struct sockmi_ioc_{name} \{{(.*?)\}};", header, re.DOTALL)
        assert body
        assert sum(sizes[word] for word in re.findall(r"(__\w+) \w+;", body[1])) == form.size
    assert f"SOCKMI_DEV_ABI_MAJOR {loaded.ABI[0]}" in header
    assert "SOCKMI_IOC_HELLO _IOWR(SOCKMI_IOC_MAGIC, 0x00," in header
    assert "SOCKMI_IOC_NAT_FLUSH _IOWR(SOCKMI_IOC_MAGIC, 0x43," in header
    assert "SOCKMI_IOC_FORGET _IOWR(SOCKMI_IOC_MAGIC, 0x04," in header
    assert "SOCKMI_IOC_MAGIC 0xB9" in header


def test_kmod_needs_root(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    params = {"kernel": None, "state": "unloaded", "parameters": None, "stop_unit": None}
    one = load("modules.kmod").Kmod(SimpleNamespace(params=params, check_mode=False))
    with pytest.raises(load("module_utils._module").WrongValue, match="use become"):
        one.run()


@pytest.mark.parametrize("kernels", [["6.12.1"], ["6.1.9", "6.12.1"], []])
@pytest.mark.parametrize("full", [False, True], ids=["bad sources", "a full disk"])
def test_kmod_puts_back_what_it_could_not_replace(
    load: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kernels: list[str],
    full: bool,
) -> None:
    dkms = load("module_utils._dkms")
    monkeypatch.setattr(dkms, "SOURCES", tmp_path / "src")
    folder = tmp_path / "src/sockmi-1.0"
    folder.mkdir(parents=True)
    (folder / "main.c").write_text("good")

    class Other:
        version, digest = "1.0", "another"

        def write(self, into: Path) -> None:
            (into / "main.c").write_text("bad")
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")

    done: list[str] = []

    class Target:
        check_mode = False

        def get_bin_path(self, name: str) -> str:
            return name

        def run_command(self, words: list[str]) -> tuple[int, str, str]:
            if words[1] == "status":
                lines = [f"sockmi/1.0, {kernel}, x86_64: installed\n" for kernel in kernels]
                return 0, "".join(lines) or "sockmi/1.0, 6.12.1, x86_64: built\n", ""
            done.append(words[1] if words[1] in ("add", "remove") else f"{words[1]} {words[7]}")
            bad = (folder / "main.c").read_text() == "bad"
            return int(words[1] == "build" and bad), "", "error: bad"

    one = dkms.Dkms(Target(), "6.12.1", [])
    monkeypatch.setattr(one, "_examine", lambda: None)
    with pytest.raises(OSError if full else dkms.Obstacle):
        one.build(Other())
    assert (folder / "main.c").read_text() == "good"
    again = [f"{verb} {kernel}" for kernel in kernels for verb in ("build", "install")]
    assert done == ["remove", *([] if full else ["add", "build 6.12.1"]), "remove", "add", *again]


class Kernels:
    """A module's view of DKMS, which knows ``rows`` of version, kernel; builds fail for ``bad`` kernels."""

    check_mode = False

    def __init__(self, rows: list[tuple[str, str]], bad: str = "") -> None:
        self.rows = rows
        self.bad = bad
        self.warned: list[str] = []
        self.done: list[str] = []

    def get_bin_path(self, name: str) -> str:
        return name

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        if words[1] == "status":
            return 0, "".join(f"sockmi/{one}, {kernel}, x86_64: installed\n" for one, kernel in self.rows), ""
        kernel = words[words.index("-k") + 1] if "-k" in words else ""
        self.done.append(" ".join([words[1], words[5], kernel]).strip())
        return int(words[1] == "build" and kernel == self.bad), "", "error: bad"


@pytest.mark.parametrize(
    ("bad", "removed"), [("", ["remove 1.0"]), ("6.1.9", ["remove 1.0 6.12.1"])], ids=["all", "but one"]
)
def test_kmod_leaves_no_kernel_without_a_module(
    load: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bad: str,
    removed: list[str],
) -> None:
    """An upgrade is for the running kernel, and for those that the host may boot next."""
    dkms = load("module_utils._dkms")
    monkeypatch.setattr(dkms, "SOURCES", tmp_path / "src")
    monkeypatch.setattr(dkms, "MODULES", tmp_path / "modules")
    for kernel in ("6.1.9", "6.12.1"):
        (tmp_path / "modules" / kernel).mkdir(parents=True)
    monkeypatch.setattr(dkms.Dkms, "_examine", lambda _self: None)

    class Later:
        version, digest = "1.1", "later"

        def write(self, _into: Path) -> None:
            pass

    module = Kernels([("1.0", "6.1.9"), ("1.0", "6.12.1"), ("1.0", "5.10.3-gone")], bad)
    dkms.Dkms(module, "6.12.1", []).build(Later())
    built = ["add 1.1", "build 1.1 6.12.1", "install 1.1 6.12.1", "build 1.1 6.1.9"]
    built += [] if bad else ["install 1.1 6.1.9"]
    gone = ["remove 1.0 5.10.3-gone"] if bad else []
    assert module.done == [*built, *gone, *removed]
    assert ["6.1.9" in said for said in module.warned] == ([True] if bad else [])


def test_kmod_takes_the_latest_version_that_dkms_has(load: Callable[[str], Any]) -> None:
    dkms = load("module_utils._dkms")
    versions = ["1.9", "1.10", "1.10.1", "1.2", "99.0.0"]
    assert sorted(versions, key=dkms.in_order) == ["1.2", "1.9", "1.10", "1.10.1", "99.0.0"]
    assert max(versions[:2], key=dkms.in_order) == "1.10"


def test_kmod_tells_the_latest_version(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_command(words: list[str]) -> tuple[int, str, str]:
        rows = "".join(f"sockmi/{one}, {os.uname().release}, x86_64: installed\n" for one in ("1.9", "1.10"))
        return 0, rows if words[1] == "status" else "", ""

    monkeypatch.setattr(host, "run_command", run_command)
    assert host.run(state="unloaded")["version"] == "1.10"


def test_kmod_tells_what_dkms_said(load: Callable[[str], Any]) -> None:
    dkms = load("module_utils._dkms")

    class Target:
        check_mode = False

        def run_command(self, _words: list[str]) -> tuple[int, str, str]:
            return 6, "", "\nError! Missing module sockmi.\n"

    with pytest.raises(dkms.Obstacle) as caught:
        dkms.Dkms(Target(), "6.12.1", []).run("install", "1.0", "-k", "6.12.1")
    assert str(caught.value) == (
        "dkms install of sockmi 1.0 for Linux 6.12.1 ended with 6: Error! Missing module sockmi."
    )
    assert "dkms status" in caught.value.row["mend"]
    assert "newer" not in caught.value.row["mend"]


class Host:
    """A managed host's folders, and commands that do what they are asked, but for those in ``fails``."""

    check_mode = False
    _diff = False
    tmpdir = None

    def __init__(self, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.fails: set[str] = set()
        self.refuses = "nothing"  # of modprobe.d
        self.lacks: set[str] = set()  # programs
        self.enrolled = "is not enrolled"
        self.has: dict[str, str] = {}  # of modinfo, by the field's name
        self.asked: list[list[str]] = []
        self.kmod, self.loaded, self.dkms = (
            load(name) for name in ("modules.kmod", "module_utils._loaded", "module_utils._dkms")
        )
        monkeypatch.setattr(self.kmod, "MODPROBE", folder / "modprobe.conf")
        monkeypatch.setattr(self.kmod, "AT_BOOT", folder / "load.conf")
        monkeypatch.setattr(self.loaded, "LOADED", folder / "module")
        monkeypatch.setattr(self.loaded.Loaded, "holders", lambda _self: {})
        monkeypatch.setattr(self.dkms, "SOURCES", folder / "src")
        for name in ("SIGNED_ONLY", "LOCKDOWN", "FRAMEWORK", "MOK", "MOK_UBUNTU"):
            monkeypatch.setattr(self.loaded, name, folder.with_name(f"{folder.name}-secure") / name)
        monkeypatch.setattr("os.geteuid", lambda: 0)
        self.folder = folder

    def load(self, users: int) -> None:
        """The module is loaded, with so many users, and loaded at boot with parameters."""
        (self.folder / "module").mkdir()
        (self.folder / "module/refcnt").write_text(f"{users}\n")
        (self.folder / "modprobe.conf").write_text("options sockmi list_max=1,2,3\n")
        (self.folder / "load.conf").write_text("sockmi\n")

    def secure(self, name: str, text: str = "") -> Path:
        """One of the files by which Secure Boot is known, made."""
        file: Path = getattr(self.loaded, name)
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    def parameter(self, name: str, value: str, mode: int = 0o444) -> Path:
        """One of the loaded module."""
        file = self.folder / "module/parameters" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{value}\n")
        file.chmod(mode)
        return file

    def get_bin_path(self, name: str) -> str | None:
        return None if name in self.lacks else name

    def warn(self, _text: str) -> None:
        pass

    def run_command(self, words: list[str]) -> tuple[int, str, str]:
        self.asked.append(words)
        if words[1] == "status":
            return 0, f"sockmi/1.0, {os.uname().release}, x86_64: installed\n", ""
        if words[0] == "modinfo":
            return 0, self.has.get(words[-2], ""), ""
        if words[0] == "mokutil":
            return 0, f"{words[2]} {self.enrolled}\n", ""
        conf = self.folder / "modprobe.conf"
        loading = words[:2] == ["modprobe", "sockmi"]
        if words[1] in self.fails or (loading and conf.exists() and self.refuses in conf.read_text()):
            return 1, "", "No."
        if loading:
            (self.folder / "module").mkdir()
            (self.folder / "module/refcnt").write_text("0\n")
        elif words[0] in ("modprobe", "rmmod"):
            shutil.rmtree(self.folder / "module")
        return 0, "", ""

    def fail_json(self, **result: Any) -> None:
        raise Told({"failed": True, **result})

    def exit_json(self, **result: Any) -> None:
        raise Told(result)

    def run(self, **options: Any) -> dict[str, Any]:
        self.params = {name: entry.get("default") for name, entry in self.kmod.argument_spec().items()}
        self.params |= options
        with pytest.raises(Told) as told:
            self.kmod.Kmod(self).run()
        assert not returned.differences("kmod", told.value.result)
        return told.value.result


class Told(Exception):
    """What a module returned."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result


@pytest.fixture
def host(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(load, monkeypatch, tmp_path)


@pytest.mark.parametrize("check", [False, True])
def test_kmod_in_use_keeps_all_of_it(host: Host, check: bool) -> None:
    host.load(users=1)
    host.check_mode = check
    told = host.run(state="absent")
    assert [row["code"] for row in told["obstacles"]] == ["in-use"]
    assert (told["failed"], told["changed"], told["actions"]) == (True, False, [])
    assert {path.name for path in host.folder.iterdir()} == {"module", "modprobe.conf", "load.conf"}


def test_kmod_tells_what_was_done_before_it_failed(host: Host) -> None:
    host.load(users=0)
    host.fails = {"remove"}
    told = host.run(state="absent")
    assert (told["failed"], told["changed"]) == (True, True)
    assert told["actions"] == ["unload", "parameters", "not at boot"]


@pytest.mark.parametrize("at_boot", [True, False, None])
def test_kmod_absent_is_not_loaded_at_boot(host: Host, at_boot: bool | None) -> None:
    told = host.run(state="absent", at_boot=at_boot)
    assert told["actions"] == ["remove 1.0"]
    assert not list(host.folder.iterdir())


@pytest.mark.parametrize("linked", [True, False])
def test_kmod_finds_headers_where_packages_put_them(
    host: Host, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    """Debian's, and the RHEL family's kernel-devel, whose folder is there before the kernel's link to it."""
    monkeypatch.setattr(host.dkms, "MODULES", host.folder / "modules")
    release = "6.12.0-55.el10.x86_64"
    one = host.dkms.Dkms(host, release, [])
    with pytest.raises(host.dkms.Obstacle):
        one._examine()
    devel = host.folder / "src/kernels" / release
    devel.mkdir(parents=True)
    (devel / "Makefile").touch()
    if linked:
        (host.folder / "modules" / release).mkdir(parents=True)
        (host.folder / "modules" / release / "build").symlink_to(devel)
    one._examine()
    assert one._headers_named() == ([] if linked else ["--kernelsourcedir", str(devel)])


HAS = {
    "parmtype": "freeze_max_ms:uint\nlist_max:array of uint\nslots_max:uint\n",
    "parm": "freeze_max_ms:Longest (5000)\nlist_max:Entries (64,64,1024); later\nslots_max:(64, most)\n",
}


def test_kmod_knows_the_parameters_of_its_sources(load: Callable[[str], Any]) -> None:
    """Each with its default, and of a type of which it can tell the values."""
    parameters = load("module_utils._parameters")
    files = {str(path): path.read_bytes() for path in (PROJECT / "kmod").glob("*.c")}
    found = parameters.of_sources(files)
    assert found["list_max"] == ("array of uint", "64,64,1024")
    assert found["slots_max"] == ("uint", "64")
    assert len(found) == sum(text.count(b"\nmodule_param") for text in files.values()) > 10
    assert all(one.default and one.type.rpartition(" ")[2] in parameters.LARGEST for one in found.values())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"freeze_max_ms": 100, "list_max": "1,0x20,033"}, ""),
        ({"list_max": 5}, ""),
        ({"freeze_max_ms": (1 << 32) - 1}, ""),
        ({"freez_max_ms": 100}, "has no freez_max_ms; it has freeze_max_ms, list_max, slots_max."),
        ({"list_max": "abc"}, "list_max is 'abc'; give a whole number up to 4294967295, or several"),
        ({"list_max": "1,,3"}, "list_max is '1,,3'; give"),
        ({"freeze_max_ms": "1,2"}, "freeze_max_ms is '1,2'; give a whole number up to 4294967295."),
        ({"freeze_max_ms": 1 << 32}, "freeze_max_ms is '4294967296'; give"),
        ({"freeze_max_ms": -1}, "freeze_max_ms is '-1'; give"),
        ({"freeze_max_ms": "08"}, "freeze_max_ms is '08'; give"),
    ],
)
@pytest.mark.parametrize("mode", ["modinfo", "sources", "check by modinfo", "check by sources"])
@pytest.mark.parametrize("loaded", [False, True])
def test_kmod_takes_the_parameters_that_the_module_takes(
    host: Host, given: dict[str, Any], taken: str, mode: str, loaded: bool
) -> None:
    """Before anything is built, set or written."""
    host.check_mode = mode.startswith("check")
    told_by = mode.rpartition(" ")[2]
    if loaded:
        host.load(users=1)
        host.parameter("list_max", "1,2,3")
        host.parameter("freeze_max_ms", "5000", 0o644)
    before = {path: path.read_text() for path in host.folder.rglob("*") if path.is_file()}
    source = host.folder.with_name(f"{host.folder.name}-source")
    if told_by == "modinfo":
        host.has = HAS
    else:
        source.mkdir()
        (source / "dkms.conf").write_text('PACKAGE_NAME="sockmi"\nPACKAGE_VERSION="1.1"\n')
        shutil.copy(PROJECT / "kmod/main.c", source)
        taken = taken.partition(" it has")[0]
    source_given = {"source": str(source)} if told_by == "sources" else {}
    told = host.run(
        state="unloaded" if taken == "" and not loaded else "loaded", parameters=given, **source_given
    )
    if taken:
        assert told["failed"] is True
        assert f"parameters: {taken}" in told["msg"].replace("parameters: the module", "parameters:")
        assert (told["changed"], told["actions"]) == (False, [])
        assert {path: path.read_text() for path in host.folder.rglob("*") if path.is_file()} == before
    elif told_by == "modinfo":
        assert "failed" not in told
        assert "parameters" in told["actions"]


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize("users", [0, 1])
def test_kmod_without_parameters_has_the_defaults(host: Host, again: int, users: int) -> None:
    """Those that only loading sets: it is loaded again, or that is told for as long as it is in use."""
    host.has = HAS
    host.load(users)
    host.parameter("list_max", "5,5,5")
    writable = host.parameter("freeze_max_ms", "100", 0o644)
    other = host.parameter("slots_max", "64")
    (host.folder / "modprobe.conf").write_text("options sockmi list_max=5,5,5 freeze_max_ms=100\n")
    for turn in range(again):
        told = host.run(parameters={})
        assert told["reload_needed"] is bool(users)
        if users:
            done = [] if turn else ["set freeze_max_ms=5000", "parameters"]
            assert told["actions"] == done
            assert (writable.read_text(), other.read_text()) == ("5000", "64\n")
        else:
            assert told["actions"][-2:] == ([] if turn else ["unload", "load"])


@pytest.mark.parametrize(
    ("loaded", "wanted"), [("5,64,1024", "5"), ("64,64,1024", "0x40,0100"), ("1,2,3", "1,2,3")]
)
def test_kmod_knows_a_value_that_is_written_otherwise(host: Host, loaded: str, wanted: str) -> None:
    host.has = HAS
    host.load(users=1)
    host.parameter("list_max", loaded)
    assert host.run(parameters={"list_max": wanted})["reload_needed"] is False


def test_kmod_sets_all_that_can_be_set_or_none(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has the last word."""
    host.has = {**HAS, "parmtype": HAS["parmtype"] + "special:uint\n"}
    host.load(users=1)
    first, second = host.parameter("freeze_max_ms", "5000", 0o644), host.parameter("special", "1", 0o644)
    before = (host.folder / "modprobe.conf").read_text()
    write = Path.write_text

    def refuse(path: Path, text: str, *more: Any) -> int:
        if path == second:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(path, text, *more)

    monkeypatch.setattr(Path, "write_text", refuse)
    told = host.run(parameters={"freeze_max_ms": 7, "special": 8})
    assert "parameters: special=8: Invalid argument" in told["msg"]
    assert (told["changed"], told["actions"], first.read_text()) == (False, [], "5000")
    assert (host.folder / "modprobe.conf").read_text() == before


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("former", [True, False])
def test_kmod_is_as_before_if_it_cannot_be_loaded_with_other_parameters(
    host: Host, loaded: bool, former: bool
) -> None:
    host.has = HAS
    host.load(users=0)
    host.parameter("list_max", "1,2,3")
    if not loaded:
        shutil.rmtree(host.folder / "module")
    conf = host.folder / "modprobe.conf"
    if not former:
        conf.unlink()
    before = conf.read_text() if former else None
    host.refuses = "1,2,3,4"
    told = host.run(parameters={"list_max": "1,2,3,4"})
    assert (told["failed"], told["obstacles"][0]["code"]) == (True, "load-failed")
    assert (told["changed"], told["actions"]) == (loaded, ["unload", "load"] if loaded else [])
    assert (host.folder / "module").is_dir() == loaded
    assert (conf.read_text() if conf.exists() else None) == before


def test_kmod_absent_has_no_parameters(host: Host) -> None:
    """As check mode predicts."""
    shown = []
    host._diff = True
    for check in (True, False):
        host.load(users=0)
        host.check_mode = check
        told = host.run(state="absent", parameters={"list_max": "1,2,3"})
        shown.append(json.loads(told["diff"]["after"])["parameters"])
        shutil.rmtree(host.folder / "module", ignore_errors=True)
    assert shown == [{}, {}]


# ---------------------------------------------------------------- Secure Boot


@pytest.mark.parametrize("by", [("SIGNED_ONLY", "Y\n"), ("LOCKDOWN", "none [integrity] confidentiality\n")])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    "key",
    [
        ("is already enrolled", True, True),
        ("is not enrolled", True, False),
        ("is already in the enrollment request", True, False),
        ("is not enrolled", False, False),
        ("EFI variables are not supported", True, True),
        (None, True, True),
        (None, False, False),
    ],
)
def test_kmod_tries_what_may_be_signed(
    host: Host, by: tuple[str, str], check: bool, key: tuple[str | None, bool, bool]
) -> None:
    """Where it is not known that the key is not enrolled, by mokutil's words and whether there is one."""
    enrolled, certificate, tried = key
    host.check_mode = check
    host.secure(*by)
    if certificate:
        host.secure("MOK")
    host.lacks = {"mokutil"} if enrolled is None else set()
    host.enrolled = enrolled or ""
    told = host.run()
    if tried:
        assert told["actions"] == ["at boot", "load"]
        return
    [row] = told["obstacles"]
    assert (row["code"], told["changed"]) == ("secure-boot", False)
    assert "and DKMS's is not." in row["message"]
    assert ("dkms generate_mok" in row["mend"]) == (not certificate)
    assert ("Install the package mokutil" in row["mend"]) == (enrolled is None)


@pytest.mark.parametrize("lacking", [True, False])
def test_kmod_says_that_the_key_may_be_it(host: Host, lacking: bool) -> None:
    """If the kernel does not take it, and nobody knows whose keys are enrolled."""
    host.secure("SIGNED_ONLY", "Y\n")
    host.secure("MOK")
    host.lacks = {"mokutil"} if lacking else set()
    host.enrolled = "cannot be tested"
    host.fails = {"sockmi"}
    [row] = host.run()["obstacles"]
    assert row["code"] == "secure-boot"
    assert "it cannot be told whether DKMS's is; modprobe sockmi ended with 1: No." in row["message"]
    assert ("Install the package mokutil." in row["mend"]) == lacking
    host.enrolled, host.lacks = "is already enrolled", set()
    assert [row["code"] for row in host.run()["obstacles"]] == ["load-failed"]


@pytest.mark.parametrize(
    ("files", "signer"),
    [
        ({}, "MOK"),
        ({"MOK_UBUNTU": ""}, "MOK_UBUNTU"),
        ({"MOK_UBUNTU": "", "MOK": ""}, "MOK"),
        (
            {"FRAMEWORK": "# mok_certificate=/no\nmok_certificate='/own/$kernelver/mok.der'\n"},
            "/own/{}/mok.der",
        ),
    ],
)
def test_kmod_asks_for_the_key_that_dkms_signs_with(host: Host, files: dict[str, str], signer: str) -> None:
    for name, text in files.items():
        host.secure(name, text)
    certificate = getattr(host.loaded, signer, Path(signer.format(os.uname().release)))
    host.secure("SIGNED_ONLY", "Y\n")
    [row] = host.run()["obstacles"]
    assert f"mokutil --import {certificate}" in row["mend"]
    assert all(words[2] == str(certificate) for words in host.asked if words[0] == "mokutil")


def test_kmod_asks_for_the_key_of_a_later_file_of_dkms(host: Host) -> None:
    later = host.secure("FRAMEWORK", "mok_certificate=/first\n").with_name("FRAMEWORK.d") / "own.conf"
    later.parent.mkdir()
    later.write_text('mok_certificate="/second"\n')
    host.secure("SIGNED_ONLY", "Y\n")
    assert "mokutil --import /second" in host.run()["obstacles"][0]["mend"]
