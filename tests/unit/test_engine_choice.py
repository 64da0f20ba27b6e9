# SPDX-License-Identifier: MIT
"""Which engine a host gets that has no module; for one that has, tests/kmod/inside/test_daemons.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from sockmi.config import Config, ConfigError
from sockmi.engine import kernel
from sockmi.engine.choice import choose
from sockmi.engine.kernel import KernelEngine, ModuleMissing

pytestmark = pytest.mark.skipif(Path(kernel.DEVICE).exists(), reason="the module is loaded here")


def test_auto_takes_what_is_there() -> None:
    engine, why = choose("auto", 0x50C1)
    assert engine.name == "repair"
    assert why == "/dev/sockmi does not exist; load the module (modprobe sockmi)"


def test_what_is_asked_for_needs_no_reason() -> None:
    engine, why = choose("repair", 0x50C1)
    assert (engine.name, why) == ("repair", "")


def test_kernel_is_asked_for_and_absent() -> None:
    """An error that says what to do; not the other engine in silence."""
    with pytest.raises(ModuleMissing, match="load the module"):
        choose("kernel", 0x50C1)
    with pytest.raises(ModuleMissing):
        KernelEngine()


def test_configured(tmp_path: Path) -> None:
    file = tmp_path / "sockmi.yml"
    file.write_text("engine: kernel\n")
    assert Config.load(file).engine == "kernel"
    file.write_text("engine: module\n")
    with pytest.raises(ConfigError, match=r"engine.*'auto', 'kernel' or 'repair'"):
        Config.load(file)
