# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Parameters of the SockMi kernel module, as a build or its sources have them; private to this collection."""

from __future__ import annotations

import re
from typing import NamedTuple

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sockmi.appliance.plugins.module_utils._module import WrongValue

NAME = "sockmi"
ARRAY = "array of "
LARGEST = {"uint": (1 << 32) - 1}  # of other types the kernel judges


class Parameter(NamedTuple):
    """One of them. ``default``: as its description tells it; "" if it does not."""

    type: str
    default: str


def installed(module: AnsibleModule, kernel: str) -> dict[str, Parameter]:
    """Of the module that is installed for a kernel; empty if none is."""
    tool = module.get_bin_path("modinfo")
    told = {}
    for field in ("parm", "parmtype") if tool else ():
        _code, out, _err = module.run_command([tool, "-k", kernel, "-F", field, NAME])
        told[field] = dict(re.findall(r"^(\w+):(.*)$", out, re.MULTILINE))
    types, texts = told.get("parmtype", {}), told.get("parm", {})
    return {name: Parameter(kind.strip(), _default(texts.get(name, ""))) for name, kind in types.items()}


def of_sources(files: dict[str, bytes]) -> dict[str, Parameter]:
    """Of a source tree, by its contents; empty if it tells none."""
    found = {}
    text = "\n".join(
        content.decode("utf-8", "replace") for name, content in files.items() if name[-2:] == ".c"
    )
    texts = dict(re.findall(r'MODULE_PARM_DESC\((\w+),\s*"([^"]*)', text))
    for array, words in re.findall(r"^module_param(_array)?(?:_named)?\(([^)]*)\)", text, re.MULTILINE):
        name, *rest = [word.strip() for word in words.split(",")]
        kind = rest[-3] if array else rest[-2]
        found[name] = Parameter(ARRAY + kind if array else kind, _default(texts.get(name, "")))
    return found


def check(wanted: dict[str, str], known: dict[str, Parameter]) -> None:
    """Raise WrongValue if the module would not take one of ``wanted``, as far as that can be known before."""
    for name, value in sorted(wanted.items()):
        if name not in known:
            raise WrongValue(f"parameters: the module has no {name}; it has {', '.join(sorted(known))}.")
        kind = known[name].type
        one = kind[len(ARRAY) :] if kind.startswith(ARRAY) else kind
        most = LARGEST.get(one)
        numbers = _numbers(value) if kind.startswith(ARRAY) or "," not in value else ()
        if most is not None and (not numbers or max(numbers) > most):
            several = ", or several with commas" if one != kind else ""
            raise WrongValue(f"parameters: {name} is {value!r}; give a whole number up to {most}{several}.")


def same(wanted: str, loaded: str, default: str) -> bool:
    """Whether a loaded value is the wanted one; elements that are not given have their default."""
    if wanted == loaded or loaded == {"1": "Y", "0": "N"}.get(wanted):
        return True
    given, there, others = _numbers(wanted), _numbers(loaded), _numbers(default)
    return bool(given) and given + (others or there)[len(given) :] == there


def _default(text: str) -> str:
    """As the description of a parameter has it in brackets; a test holds the module to that."""
    found = re.search(r"\((\d+(?:,\d+)*)", text)
    return found[1] if found else ""


def _numbers(text: str) -> tuple[int, ...]:
    """Of one or more with commas, as the kernel reads them; empty if one is none."""
    numbers = []
    for word in text.split(","):
        if not re.fullmatch(r"0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*", word):
            return ()
        octal = word.startswith("0") and word.isdigit()
        numbers.append(int(word, 8 if octal else 0))
    return tuple(numbers)
