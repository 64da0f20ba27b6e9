# SPDX-License-Identifier: MIT
"""sockmi(7) tells what the built module has: parameters and their defaults, sysctls, tracepoints."""

from __future__ import annotations

import re
import subprocess

import pytest

from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT

PAGE = PROJECT / "docs/man/sockmi.7"


def section(name: str) -> str:
    """The text of one section of the page."""
    found = re.search(rf'^\.Sh "?{name}"?\n(.*?)(?=^\.Sh )', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{PAGE} has no section {name}"
    return found[1]


def test_every_parameter_is_in_the_manual(kernel: str) -> None:
    module = DEBIAN_KERNELS[kernel].module()
    told = subprocess.run(
        ["/sbin/modinfo", "-F", "parm", module], check=True, capture_output=True, text=True
    ).stdout
    built = dict(re.findall(r"^(\w+):(.*)$", told, re.MULTILINE))
    written = dict(re.findall(r"^\.It Cm (\w+) Pq (.*)$", section("PARAMETERS"), re.MULTILINE))
    assert set(written) == set(built)
    assert len(built) > 5
    for name, text in built.items():
        default = re.search(r"\((\d[\d,]*)", text)
        assert default, f"modinfo tells no default of {name}"
        assert written[name].startswith(f"default {default[1].rstrip(',')}"), name
        # A parameter that can be written is said to be.
        source = "".join(file.read_text() for file in (PROJECT / "kmod").glob("*.c"))
        mode = re.search(rf"module_param\w*\({name},.*?(0\d+)\)", source)
        assert mode
        assert ("writable" in written[name]) == (mode[1] == "0644"), name


def test_every_sysctl_is_in_the_manual() -> None:
    there = set(re.findall(r'\.procname = "(\w+)"', (PROJECT / "kmod/sysctl.c").read_text()))
    assert set(re.findall(r"sockmi\.(\w+)", section("SYSCTLS"))) == there


def test_every_tracepoint_is_in_the_manual() -> None:
    there = set(re.findall(r"^SOCKMI_STEP\((\w+)\)", (PROJECT / "kmod/trace.h").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bsockmi_\w+", section("TRACEPOINTS"))) - {"sockmi_refusal"} == there


@pytest.mark.parametrize(
    "name",
    [
        "EINVAL",
        "ENOTCONN",
        "ESRCH",
        "EBADF",
        "EBUSY",
        "EPERM",
        "ETIMEDOUT",
        "EINPROGRESS",
        "EXDEV",
        "EOPNOTSUPP",
    ],
)
def test_the_errors_are_those_of_the_sysctl(name: str) -> None:
    assert f"-{name}" in "".join(
        (PROJECT / "kmod" / file).read_text() for file in ("sysctl.c", "preflight.c")
    )
    assert re.search(rf"\bEr {name}\b", section("ERRORS"))
