# SPDX-License-Identifier: MIT
"""Builds the engine's C library into the wheel; everything else is in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent


class BuildWithLibrary(build_py):
    """Runs make and puts libsockmi-engine.so beside the Python files."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            subprocess.run(["make", "-C", str(HERE / "libsockmi"), "engine"], check=True)
            built = HERE / "libsockmi" / "build" / "libsockmi-engine.so"
            shutil.copy2(built, Path(self.build_lib) / "sockmi" / built.name)


class AnyPython(bdist_wheel):
    """The library is loaded with ctypes, so the wheel is for one machine, but for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class Binary(Distribution):
    """The wheel is for one platform, though no CPython extension is in it."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPython}, distclass=Binary)
