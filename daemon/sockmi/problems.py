# SPDX-License-Identifier: MIT
"""What is wrong with a configuration, in the words of those who write it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

_SHOWN_MAX = 60  # characters of a wrong value
_WANTED = {
    "bool_parsing": "give true or false",
    "bool_type": "give true or false",
    "dict_type": "give options with values, as `port: 7781`",
    "enum": "give {expected}",
    "extra_forbidden": "unknown option; see sockmi.yml(5)",
    "finite_number": "give a number",
    "float_parsing": "give a number",
    "float_type": "give a number",
    "greater_than": "it must be more than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "int_from_float": "give a whole number",
    "int_parsing": "give a whole number",
    "int_type": "give a whole number",
    "invalid_key": "unknown option; see sockmi.yml(5)",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "give {expected}",
    "model_type": "give options with values, as `port: 7781`",
    "path_type": "give a path",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} character(s)",
    "string_type": "give a text; in quotes, if it looks like a number",
    "tuple_type": "give a list",
}
"""What pydantic's types of errors want; others tell it themselves."""


def problems(error: ValidationError) -> list[str]:
    """What is wrong and where, a sentence each."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        found.setdefault(".".join(map(str, problem["loc"])), _sentence(dict(problem)))
    return [f"{where}: {text}" if where else text for where, text in found.items()]


def _sentence(problem: dict[str, Any]) -> str:
    wanted = _WANTED.get(problem["type"])
    if wanted is None:
        text: str = problem["msg"]
        return text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    wanted = wanted.format(**problem.get("ctx", {}))
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        return wanted
    shown = repr(problem["input"])
    if len(shown) > _SHOWN_MAX:
        shown = shown[:_SHOWN_MAX] + " ..."
    return f"{shown}: {wanted}"
