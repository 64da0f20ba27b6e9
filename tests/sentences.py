# SPDX-License-Identifier: MIT
"""The sentences with which the daemon, its clients, the Ansible modules, the role, its programs and
the playbooks fail.

Read from the sources: what is put into a sentence when it is said is an ellipsis here. Sentences that only
pass another's on have no words of their own, and are left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[1]
ELLIPSIS = "…"
# Exceptions whose text somebody reads, and the place of the text among their arguments.
DAEMON = {
    "ConfigError": 0,
    "DaemonFailed": 0,
    "GroupError": 0,
    "IdentityError": 0,
    "JournalError": 0,
    "KeyFileError": 0,
    "ModuleMissing": 0,
    "Needed": 0,
    "SpoolError": 0,
    "StartError": 0,
}
CLIENTS = {"BrokenLink": 0, "SockMiError": 1, "Unanswered": 1}
MODULES = {"ControlError": 0, "WrongValue": 0, "_add": 0, "_fail": 0}
TOOLS = {"Failed": 0, "WheelhouseError": 0, "exit": 0}


def of_daemon() -> set[str]:
    """Why `sockmid` does not start, or ends."""
    found = set(_of_python(PROJECT / "daemon/sockmi", DAEMON))
    for name in ("config.py", "transport/keyring.py"):  # become parts of a ConfigError or KeyFileError
        found |= set(_of_python(PROJECT / "daemon/sockmi" / name, {"ValueError": 0}))
    return found | set(_returned(PROJECT / "daemon/sockmi/redirect/iptables.py", {"unloaded", "unusable"}))


def of_clients() -> set[str]:
    """What `sockmi` and programs that use the Python API are told, apart from refusals."""
    return set(_of_python(PROJECT / "daemon/sockmi", CLIENTS))


def of_modules() -> set[str]:
    """With what the Ansible modules fail, apart from refusals and obstacles."""
    found = set(_of_python(PROJECT / "plugins", MODULES))
    for name in ("drain", "export"):  # with what did not move
        found |= set(_returned(PROJECT / f"plugins/modules/{name}.py", {"_complaint"}))
    return found


def of_plays() -> set[str]:
    """With what the role and the playbooks fail."""
    found: set[str] = set()
    for folder in ("roles/sockmi/tasks", "playbooks"):
        for path in sorted((PROJECT / folder).rglob("*.yml")):
            found |= set(_of_tasks(yaml.safe_load(path.read_text())))
    return {sentence for sentence in found if _own_words(sentence)}


def of_tools() -> set[str]:
    """With what the programs fail that the role runs on hosts, and the one that builds what it carries."""
    found = set(_of_python(PROJECT / "scripts/wheelhouse", TOOLS))
    for path in sorted((PROJECT / "roles/sockmi/files").glob("*.py")):
        found |= set(_of_python(path, TOOLS))
        for node in ast.walk(ast.parse(path.read_text())):  # programs that it has as text
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "sys.exit(f" in node.value:
                found |= set(_of_source(node.value, TOOLS))
    return found


def _own_words(sentence: str) -> bool:
    return sum(letter.isalpha() for letter in sentence) >= 6


def _of_python(where: Path, exceptions: dict[str, int]) -> Iterator[str]:
    for path in sorted(where.rglob("*.py")) if where.is_dir() else [where]:
        yield from _of_source(path.read_text(), exceptions)


def _of_source(source: str, exceptions: dict[str, int]) -> Iterator[str]:
    tree = ast.parse(source)
    named = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        for said in _said(node, exceptions):
            sentence = _text(named.get(said.id, said) if isinstance(said, ast.Name) else said)
            if _own_words(sentence):
                yield sentence


def _returned(file: Path, functions: set[str]) -> Iterator[str]:
    """What ``functions`` say by their value."""
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value and _own_words(sentence := _text(node.value)):
                    yield sentence


def _said(node: ast.AST, exceptions: dict[str, int]) -> Iterator[ast.expr]:
    """The expressions of the texts with which ``node`` fails."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        if name in exceptions and len(node.args) > exceptions[name]:
            yield node.args[exceptions[name]]
        elif name == "fail_json":
            yield from (word.value for word in node.keywords if word.arg == "msg")
    elif isinstance(node, ast.Dict):  # a result that is printed without an AnsibleModule
        keys = [getattr(key, "value", None) for key in node.keys]
        yield from (value for key, value in zip(keys, node.values, strict=True) if key == "msg")
    elif isinstance(node, ast.ClassDef) and node.name in exceptions:  # a text that is always the same
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                yield from method.args.defaults


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "rstrip":
        return _text(node.func.value)  # type: ignore[attr-defined]
    return ELLIPSIS


def _of_tasks(content: Any) -> Iterator[str]:
    if isinstance(content, list):
        for one in content:
            yield from _of_tasks(one)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name == "ansible.builtin.fail":
                yield _template(value["msg"])
            elif name in ("fail_msg", "why"):
                yield _template(value)
            else:
                yield from _of_tasks(value)
    elif isinstance(content, str):  # a variable that fails when it is asked for
        for hint in re.findall(r'undef\(hint="(.*?)"\)', content, re.DOTALL):
            yield re.sub(r'" ~ .*? ~ "', ELLIPSIS, hint)


def _template(text: str) -> str:
    return re.sub(r"\{\{.*?\}\}", ELLIPSIS, text.strip(), flags=re.DOTALL)
