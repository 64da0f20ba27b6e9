# SPDX-License-Identifier: MIT
"""sockmi(7) tells what the built module has: parameters and their defaults, sysctls, tracepoints."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from guests.kernels import DEBIAN_KERNELS
from guests.paths import PROJECT
from tests import collection

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


def test_the_parameters_that_ansible_reads_are_those_of_the_build(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sources, of which it has not always a build yet."""
    link = tmp_path / "ansible_collections/sockmi/appliance"
    link.parent.mkdir(parents=True)
    link.symlink_to(collection.root(None))
    monkeypatch.syspath_prepend(tmp_path)
    parameters = importlib.import_module(
        "ansible_collections.sockmi.appliance.plugins.module_utils._parameters"
    )
    module = DEBIAN_KERNELS[kernel].module()

    class Target:
        def get_bin_path(self, _name: str) -> str:
            return "/sbin/modinfo"

        def run_command(self, words: list[str]) -> tuple[int, str, str]:
            assert words[1:4] == ["-k", "6.1.0", "-F"]
            told = subprocess.run([words[0], *words[3:5], module], check=True, capture_output=True, text=True)
            return 0, told.stdout, ""

    built = parameters.installed(Target(), "6.1.0")
    assert len(built) > 5
    assert all(one.default for one in built.values())
    files = {str(path): path.read_bytes() for path in (PROJECT / "kmod").glob("*.c")}
    assert parameters.of_sources(files) == built


def test_every_sysctl_is_in_the_manual() -> None:
    there = set(re.findall(r'\.procname = "(\w+)"', (PROJECT / "kmod/sysctl.c").read_text()))
    assert set(re.findall(r"sockmi\.(\w+)", section("SYSCTLS"))) == there


def test_every_tracepoint_is_in_the_manual() -> None:
    there = set(re.findall(r"^SOCKMI_STEP\((\w+)\)", (PROJECT / "kmod/trace.h").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bsockmi_\w+", section("TRACEPOINTS"))) - {"sockmi_refusal"} == there


def sysctl_errors() -> list[str]:
    """What a write to the sysctl may give; the last three come from the claim."""
    source = (PROJECT / "kmod/sysctl.c").read_text().partition("/* ---- ioctls ---- */")[0]
    refusals = re.findall(r"\bERR_PTR\(-(E\w+)\)", (PROJECT / "kmod/preflight.c").read_text())
    given = {*re.findall(r"-(E[A-Z]+)\b", source), *refusals, "ECONNRESET"}
    return sorted(given | {"ENOTSOCK", "EOPNOTSUPP", "EMFILE"})


@pytest.mark.parametrize("name", sysctl_errors())
def test_the_errors_are_those_of_the_sysctl(name: str) -> None:
    assert re.search(rf"\bEr {name}\b", section("ERRORS"))


def test_no_error_is_told_that_the_sysctl_does_not_give() -> None:
    """But for those of the daemon."""
    told = set(re.findall(r"^\.It Bq (.*)$", section("ERRORS"), re.MULTILINE))
    names = {name for line in told for name in re.findall(r"Er (E[A-Z]+)", line)}
    assert names == set(sysctl_errors())


def test_the_sysctls_are_in_modinfo(kernel: str) -> None:
    """With the parameters that set what they begin with."""
    module = DEBIAN_KERNELS[kernel].module()
    told = subprocess.run(
        ["/sbin/modinfo", "-F", "parm", module], check=True, capture_output=True, text=True
    ).stdout
    there = re.findall(r'\.procname = "(\w+)"', (PROJECT / "kmod/sysctl.c").read_text())
    assert {re.sub("^max_.*", "max_", name) for name in there} == set(re.findall(r"sockmi\.(\w+)", told))


def test_the_bounds_are_those_of_the_source() -> None:
    most = re.search(r"#define SOCKMI_LIST_MOST (\d+)", (PROJECT / "kmod/internal.h").read_text())
    assert most and f"{most[1]} at most" in section("SYSCTLS")
    buffers = re.search(r"sockmi_slots_max = (\d+);\n\t/\*", (PROJECT / "kmod/main.c").read_text())
    assert buffers and f"at most {buffers[1]}" in section("PARAMETERS")
    claims = re.search(r"#define SOCKMI_EXPORTS_MAX (\d+)", (PROJECT / "kmod/internal.h").read_text())
    assert claims and f"{claims[1]} claims" in section("ERRORS")
