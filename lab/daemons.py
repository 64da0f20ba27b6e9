# SPDX-License-Identifier: MIT
"""The daemon on each host of a lab: its configuration, start, stop, kill and restart."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from lab.host import Host
from lab.labs import Lab
from lab.plan import DAEMON_HOSTS, PATIENCE, LabError

GROUP4 = "239.77.83.1"
GROUP6 = "ff05::7783:1"
GROUP_PORT = 7780
STREAM_PORT = 7781
METRICS_PORT = 9780


def daemon_config(host: Host, members: Iterable[Host] = (), version: int = 4) -> dict[str, Any]:
    """The configuration of the daemon on ``host``, as a document of plain values.

    With ``members`` the group is that list of hosts (for ``d``, which multicast does not
    reach), else multicast of IP ``version``.
    """
    group: dict[str, Any] = {
        "name": "lab",
        "address": GROUP4 if version == 4 else GROUP6,
        "port": GROUP_PORT,
        "interface": "eth0",
        "key_file": str(key_file(host)),
        "members": [member.address(version) for member in members if member.name != host.name],
    }
    return {
        "state_dir": str(host.state_dir),
        "run_dir": str(host.run_dir),
        "host_name": host.name,
        "groups": [group],
        "stream": {"address": host.address(version), "port": STREAM_PORT},
        "redirect": {"devices": ["eth0"], "table": "sockmi"},
        "metrics_port": METRICS_PORT,
        "log_level": "debug",
    }


def key_file(host: Host) -> Path:
    """Where ``host`` has the group's key."""
    return host.etc_dir / "group.key"


class Daemon:
    """The daemon of one host, as a child process."""

    def __init__(self, host: Host, config: Mapping[str, Any]) -> None:
        self.host = host
        self.config = dict(config)
        self.config_file = host.etc_dir / "sockmi.yml"
        self.log_file = host.run_dir / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 60.0 * PATIENCE, *, detached: bool = False) -> None:
        """Write the configuration, start, and return when the control socket accepts connections.

        A ``detached`` one has a session of its own, and outlives this process and its terminal.
        """
        if self.process is not None and self.process.poll() is None:
            raise LabError(f"the daemon on {self.host.name} runs already (pid {self.process.pid})")
        self._await_silence()
        self.config_file.write_text(yaml.safe_dump(self.config, sort_keys=False))
        with self.log_file.open("ab") as log:
            self.process = self.host.popen(
                [sys.executable, "-m", "sockmi.service", "--config", self.config_file],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=detached,
            )
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            if self.process.poll() is not None:
                code = self.process.returncode
                raise LabError(f"the daemon on {self.host.name} ended at once (code {code}):\n{self.log()}")
            if time.monotonic() > deadline:
                self.kill()
                raise LabError(
                    f"the daemon on {self.host.name} is not ready after {timeout_s:.0f} s:\n{self.log()}"
                )
            time.sleep(0.01)

    def _await_silence(self, timeout_s: float = 5.0 * PATIENCE) -> None:
        """One that was killed, also by others, has its descriptors until its `sockmi-stop` has ended, too."""
        deadline = time.monotonic() + timeout_s
        while self.answers() and time.monotonic() < deadline:
            time.sleep(0.01)

    def answers(self) -> bool:
        """True if something accepts connections on the control socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.host.control_socket))
            except OSError:
                return False
            return True

    def stop(self, timeout_s: float = 10.0 * PATIENCE) -> int:
        """SIGTERM; the daemon's exit code. It is killed, and LabError raised, if it does not end."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise LabError(
                f"the daemon on {self.host.name} did not stop within {timeout_s:.0f} s:\n{self.log()}"
            ) from None

    def kill(self) -> None:
        """SIGKILL, as in a crash: nothing is cleaned up."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        """Stop it if it runs, and start it with the present configuration."""
        if self.process is not None and self.process.poll() is None:
            self.stop()
        self.start()

    @property
    def pid(self) -> int:
        """Process id of the running daemon."""
        if self.process is None:
            raise LabError(f"the daemon on {self.host.name} was not started")
        return self.process.pid

    def children(self) -> dict[int, str]:
        """The command lines of its processes, by process id."""
        found = {}
        for thread in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for pid in thread.read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                    if line := Path(f"/proc/{pid}/cmdline").read_text():  # none: it is about to
                        found[int(pid)] = line.replace("\0", " ")
        return found

    def log(self, lines: int = 40) -> str:
        """The end of what the daemon wrote."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        return ""


class Daemons:
    """Daemons on some hosts of a lab, in one group: ``with Daemons(lab, "ab") as daemons``."""

    def __init__(
        self,
        lab: Lab,
        hosts: Iterable[str] = DAEMON_HOSTS[:3],
        overrides: Mapping[str, Any] | None = None,
        *,
        unicast: bool = False,
        version: int = 4,
    ) -> None:
        chosen = [lab.host(name) for name in hosts]
        key = secrets.token_hex(32)
        self.by_host: dict[str, Daemon] = {}
        for host in chosen:
            write_secret(key_file(host), key)
            config = daemon_config(host, chosen if unicast else (), version) | dict(overrides or {})
            self.by_host[host.name] = Daemon(host, config)

    def __getitem__(self, name: str) -> Daemon:
        return self.by_host[name]

    def __enter__(self) -> Self:
        try:
            for daemon in self.by_host.values():
                daemon.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for name, daemon in self.by_host.items():
                error.add_note(f"--- daemon on {name}:\n{daemon.log()}")
            self.kill()
            return
        try:
            for daemon in self.by_host.values():
                if daemon.process is not None and daemon.process.poll() is None:
                    daemon.stop()
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL all that still run."""
        for daemon in self.by_host.values():
            if daemon.process is not None and daemon.process.poll() is None:
                daemon.kill()


def write_secret(path: Path, text: str) -> None:
    """Write ``text`` and a newline to a new file that only its owner can read; an old one is replaced."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text + "\n")
