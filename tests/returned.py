# SPDX-License-Identifier: MIT
"""Whether what a module returns is what its RETURN says: no key more, none missing, each of its type."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import yaml

MODULES = Path(__file__).resolve().parents[1] / "plugins/modules"
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "list": (list,),
    "dict": (dict,),
}
# Of Ansible itself: in every result, or put there by the tool that ran the module.
ANSIBLES = {"changed", "failed", "msg", "diff", "warnings", "deprecations", "invocation", "exception"}


@cache
def documentation(module: str) -> dict[str, Any]:
    """A module's RETURN."""
    for node in ast.parse((MODULES / f"{module}.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "RETURN":
            found: dict[str, Any] = yaml.safe_load(ast.literal_eval(node.value))
            return found
    raise AssertionError(f"{module} has no RETURN")


def differences(module: str, result: dict[str, Any]) -> list[str]:
    """What is not as documented, as sentences; ``result`` without what the caller has added."""
    content = {name: value for name, value in result.items() if name not in ANSIBLES}
    failed = bool(result.get("failed"))
    return list(_dict(documentation(module), content, module, failed=failed))


def _dict(said: dict[str, Any], content: dict[str, Any], where: str, *, failed: bool = False) -> Any:
    for name in content.keys() - said.keys():
        yield f"{where} returned {name}, which is not documented"
    for name, entry in said.items():
        if name in content:
            yield from _value(entry, content[name], f"{where}.{name}")
        elif entry["returned"] == "always" or (entry["returned"].startswith("success") and not failed):
            yield f"{where} did not return {name}"


def _value(entry: dict[str, Any], value: Any, where: str) -> Any:
    if value is None:
        if not may_be_null(entry):
            yield f"{where} is null, and the description does not say that it may be"
        return
    if not isinstance(value, TYPES[entry["type"]]) or (entry["type"] != "bool" and isinstance(value, bool)):
        yield f"{where} is {value!r}, not of type {entry['type']}"
        return
    if "contains" in entry:
        for item in value if entry["type"] == "list" else [value]:
            yield from _dict(entry["contains"], item, where)
    elif entry["type"] == "list":
        for item in value:
            if not isinstance(item, TYPES[entry["elements"]]):
                yield f"{where} has {item!r}, not of type {entry['elements']}"


def may_be_null(entry: dict[str, Any]) -> bool:
    """Whether the description of a value says so."""
    text = entry["description"]
    text = text if isinstance(text, str) else " ".join(text)
    return "null" in text.lower()
