# SPDX-License-Identifier: MIT
"""What the role learns of a host, as to the kernel module, and what it says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml

from sockmi import doctor

ROLE = Path(__file__).resolve().parents[2] / "roles/sockmi"
RELEASE = "5.14.0-503.11.1.el9_5.x86_64"
# As rpm(8) answers for one package of a host of the RHEL family.
RPM = """#!/bin/sh
[ "$1 $2" = "-qa --qf" ] || exit 1
printf '%s' "$3" |
	sed 's/%{NAME}/kernel-devel/g; s/%{VERSION}/5.14.0/g; s/%{RELEASE}/503.11.1.el9_5/g; s/%{ARCH}/x86_64/g'
"""


def test_headers_of_the_rhel_family_are_known_by_their_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several kernel-devel may be installed: the role asks for that of a release."""
    (tmp_path / "rpm").write_text(RPM)
    (tmp_path / "rpm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    source = (ROLE / "files/probe.py").read_text().rpartition("\nmain()")[0]
    script = f"{source}\nprint(*packages('redhat'), sep='\\n')\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    headers = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__sockmi_headers"]["redhat"]
    assert {"kernel-devel", headers + RELEASE} <= set(done.stdout.split())


@pytest.mark.parametrize("there", [True, False])
def test_a_module_that_is_there_is_not_denied(there: bool) -> None:
    [task] = [
        one
        for one in yaml.safe_load((ROLE / "tasks/preflight_module.yml").read_text())
        if one["name"] == "Say that no kernel module will be built"
    ]
    environment = jinja2.Environment()  # noqa: S701 - no HTML
    values = {
        "inventory_hostname": "a",
        "__sockmi_probe": {"module_there": there},
        "__sockmi_lacking": ["dkms"],
    }
    values["__sockmi_otherwise"] = environment.from_string(task["vars"]["__sockmi_otherwise"]).render(values)
    said = environment.from_string(task["ansible.builtin.debug"]["msg"]).render(values)
    assert said.startswith("a: without dkms the kernel module is not built")
    assert ("engine repair" in said) != there
    assert ("stays as it is" in said) == there


def test_it_looks_for_the_units_capabilities() -> None:
    """Where not even root may have them it would not start. The doctor has them from the unit."""
    source = (ROLE / "files/probe.py").read_text().rpartition("\nmain()")[0]
    script = f"{source}\nprint(json.dumps(CAPABILITIES))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {name: bit for bit, (name, _why) in doctor._CAPABILITIES.items()}
