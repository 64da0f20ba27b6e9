# SPDX-License-Identifier: MIT
"""One host of a lab: run programs, functions and sockets in its namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from lab import namespaces
from lab.plan import HostPlan, namespace_of
from lab.record import ROOT

P = ParamSpec("P")
R = TypeVar("R")

PROJECT = Path(__file__).resolve().parent.parent


class Host:
    """A host; see `Lab.host`."""

    def __init__(self, lab: str, plan: HostPlan) -> None:
        self.lab = lab
        self.plan = plan
        self.name = plan.name
        self.namespace = namespace_of(lab, plan.name)
        self.directory = ROOT / lab / plan.name

    @property
    def address4(self) -> IPv4Address:
        """The host's IPv4 address (of eth0)."""
        return self.plan.links[0].address4.ip

    @property
    def address6(self) -> IPv6Address:
        """The host's IPv6 address (of eth0)."""
        return self.plan.links[0].address6.ip

    def address(self, version: int) -> str:
        """The host's address of IP ``version`` 4 or 6, as text."""
        return str(self.address4 if version == 4 else self.address6)

    @property
    def etc_dir(self) -> Path:
        """Configuration of programs on this host."""
        return self.directory / "etc"

    @property
    def state_dir(self) -> Path:
        """State that outlives a restart of the host's programs."""
        return self.directory / "state"

    @property
    def run_dir(self) -> Path:
        """Sockets, pids, logs."""
        return self.directory / "run"

    @property
    def control_socket(self) -> Path:
        """The control socket of the host's daemon."""
        return self.run_dir / "control.sock"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of programs on this host: ours, and which daemon is theirs."""
        environment = dict(os.environ)
        roots = [str(PROJECT), str(PROJECT / "daemon"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
        environment["SOCKMI_CONTROL"] = str(self.control_socket)
        return environment

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is on this host inside the ``with`` block."""
        return namespaces.entered(self.namespace)

    def popen(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program here; ``options`` as for `subprocess.Popen`. It ends with the lab at the latest."""
        options.setdefault("env", self.environment)
        with self.entered():
            return subprocess.Popen([str(word) for word in command], **options)

    def run(
        self, command: Sequence[str | Path], *, check: bool = True, timeout_s: float = 30, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program here to its end; its output is in the result, and in the error if it fails."""
        options.setdefault("env", self.environment)
        words = [str(word) for word in command]
        with self.entered():
            result = subprocess.run(
                words, check=False, timeout=timeout_s, text=True, capture_output=True, **options
            )
        if check and result.returncode:
            error = subprocess.CalledProcessError(result.returncode, words, result.stdout, result.stderr)
            error.add_note(f"on {self.namespace}; it wrote:\n{result.stdout}{result.stderr}")
            raise error
        return result

    def python_popen(self, module: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[Any]:
        """Start ``python -m module arguments`` here, with this interpreter."""
        return self.popen([sys.executable, "-m", module, *arguments], **options)

    def python(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``function`` in a thread of ours that is on this host; its result or its exception."""
        box: list[R] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                with self.entered():
                    box.append(function(*args, **kwargs))
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=body, name=f"{self.namespace}", daemon=True)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return box[0]

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A new socket that belongs to this host; use it from any thread."""
        with self.entered():
            return socket.socket(family, kind)
