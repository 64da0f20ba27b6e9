# SPDX-License-Identifier: MIT
"""A virtual machine with one of Debian's kernels: started, asked to run commands, watched, ended."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guests.accelerator import TCG, accelerator
from guests.child import bound
from guests.chroot import host_suite
from guests.console import Report, reports
from guests.errors import HarnessError
from guests.image import PACKAGES, Image, checkout_tar, environment_disk
from guests.kernels import DEBIAN_KERNELS, DebianKernel
from guests.monitor import ask
from guests.packages import need
from guests.paths import CACHE, LOGS, PROJECT, room
from guests.segment import Segment
from guests.wire import Command, GuestGoneError, Line

BOOT_LIMIT = 180.0  # seconds: an idle machine needs 5, a very busy one 60
KEPT_LOGS = 40


@dataclass
class Plan:
    """What a guest is to be like."""

    kernel: DebianKernel = DEBIAN_KERNELS["6.1"]
    suite: str = ""  # of the root file system; this machine's if empty
    packages: Sequence[str] = ()  # in it, besides guests.image.PACKAGES
    name: str = "vm1"
    number: int = 1  # makes the addresses
    segments: Sequence[Segment] = ()  # eth0, eth1, ...
    memory: int = 384  # MiB
    processors: int = 1
    systemd: bool = False  # a whole system rather than the quick init
    checkout: bool = True  # this checkout, and with the host's suite its .venv, at the same path
    ssh: bool = False  # a network card for ssh from this machine, after the segments' cards
    boot: Sequence[str] = ()  # more words for the kernel's command line
    allowed: list[str] = field(default_factory=list)  # kernel complaints that are expected


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str


class Guest:
    """A running virtual machine. Use it as a context manager, or call close()."""

    def __init__(self, plan: Plan) -> None:
        need(("qemu-system-x86",))
        self.plan = plan
        self.ssh_port = 0
        self.emulated = True
        self._folder = Path(tempfile.mkdtemp(prefix="sockmi-guest-"))
        self.console = _console_file(plan.name)
        self._line: Line | None = None
        try:
            self._process = self._start()
            self._line = Line(self._folder / "agent", 20)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_unused: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        plan = self.plan
        kernel = plan.kernel.prepare()
        initrd = plan.kernel.initrd()
        suite = plan.suite or host_suite()
        disks = [
            ("root", Image(suite, (*PACKAGES, *plan.packages)).make(), "snapshot=on,cache=unsafe"),
            ("modules", kernel / "modules.img", "snapshot=on,cache=unsafe"),
        ]
        words = [
            "console=ttyS0", "loglevel=6", "panic=-1", "oops=panic", "net.ifnames=0", "mitigations=off",
            "tsc=reliable", "no_timer_check", "random.trust_cpu=on", f"sockmi.name={plan.name}", *plan.boot,
        ]  # fmt: skip
        if plan.systemd:
            words += ["sockmi.init=/lib/systemd/systemd", "quiet", "systemd.show_status=no"]
        network: list[str] = []
        for order, segment in enumerate(plan.segments):
            network += segment.qemu(plan.number, f"n{order}")
            both = f"{segment.ipv4(plan.number)}/24,{segment.ipv6(plan.number)}/64"
            words.append(f"sockmi.net.eth{order}={both}")
        if plan.ssh:
            self.ssh_port = _free_port()
            # The guest reaches nothing through this card, but answers at it.
            backend = f"user,id=ssh,restrict=on,hostfwd=tcp:127.0.0.1:{self.ssh_port}-:22"
            network += ["-netdev", backend, "-device", "virtio-net-pci,netdev=ssh,romfile="]
            words.append(f"sockmi.net.eth{len(plan.segments)}=10.0.2.15/24")
            words.append(f"sockmi.key={','.join(public_key().split())}")
        if plan.checkout:
            checkout_tar(self._folder / "tree.tar")
            disks.append(("tree", self._folder / "tree.tar", "readonly=on"))
            words.append(f"sockmi.tree={PROJECT}")
            if suite == host_suite() and (PROJECT / ".venv/.stamp").exists():
                disks.append(("venv", environment_disk(), "readonly=on"))
                words.append(f"sockmi.venv={PROJECT}/.venv")
        accelerated = accelerator(kernel / "vmlinuz", initrd)
        self.emulated = accelerated == TCG
        storage: list[str] = []
        for name, file, options in disks:
            storage += ["-drive", f"file={file},if=none,id={name},format=raw,{options}"]
            storage += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        command = [
            *bound(), "qemu-system-x86_64", *accelerated,
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-name", plan.name,
            "-smp", str(plan.processors), "-m", str(plan.memory),
            "-kernel", kernel / "vmlinuz", "-initrd", initrd, "-append", " ".join(words),
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-qmp", f"unix:{self.monitor},server=on,wait=off",
            "-chardev", f"socket,id=agent,path={self._folder / 'agent'},server=on,wait=off",
            "-device", "virtio-serial-pci",
            "-device", "virtserialport,chardev=agent,name=org.sockmi.agent",
            "-device", "virtio-rng-pci", *storage, *network,
        ]  # fmt: skip
        with (self._folder / "qemu.log").open("wb") as log:
            return subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, cwd=self._folder,
            )  # fmt: skip

    def wait(self, limit: float = BOOT_LIMIT) -> Guest:
        """Until it runs commands, and answers ssh if it shall; for at most ``limit`` seconds.

        Raises HarnessError with the end of its console if it does not.
        """
        assert self._line is not None
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if self._line.hello.get(timeout=0.5) and self._answers_ssh(deadline):
                    return self
                break
        said = (self._folder / "qemu.log").read_text(errors="replace").strip()
        raise HarnessError(
            f"{self.plan.name} ({self.plan.kernel.name}) did not boot in {limit:.0f} s; {said}; "
            f"the end of {self.console}:\n" + "\n".join(self.log().splitlines()[-25:])
        )

    def _answers_ssh(self, deadline: float) -> bool:
        while self.plan.ssh and self.alive:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.ssh_port), 5) as made,
            ):
                if made.recv(4) == b"SSH-":
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return not self.plan.ssh

    def start(
        self,
        command: str | Sequence[str | Path],
        *,
        cwd: str | Path = "/",
        env: Mapping[str, str] | None = None,
    ) -> Command:
        """Start a command (a string is for sh) that runs on while others do."""
        assert self._line is not None
        words = ["sh", "-c", command] if isinstance(command, str) else list(map(str, command))
        return self._line.start(words, str(cwd), env or {})

    def run(
        self,
        command: str | Sequence[str | Path],
        *,
        check: bool = True,
        data: bytes = b"",
        limit: float = 60,
        cwd: str | Path = "/",
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a command (a string is for sh) to its end. With ``check``, raises HarnessError if it fails."""
        started = self.start(command, cwd=cwd, env=env)
        try:
            started.feed(data)
            started.close_input()
            code = started.wait(limit)
        except TimeoutError:
            started.signal(signal.SIGKILL)
            raise
        except GuestGoneError as gone:
            raise GuestGoneError(f"{self.plan.name}: {gone}{self._last_words()}") from None
        done = Done(code, started.stdout.decode(errors="replace"), started.stderr.decode(errors="replace"))
        if check and code:
            shown = command if isinstance(command, str) else shlex.join(map(str, command))
            raise HarnessError(f"{self.plan.name}: {shown} ended with {code}: {done.stderr or done.stdout}")
        return done

    def put(self, path: str | Path, data: bytes, mode: int = 0o644) -> None:
        """Make a file there."""
        quoted = shlex.quote(str(path))
        self.run(f"mkdir -p $(dirname {quoted}) && cat >{quoted} && chmod {mode:o} {quoted}", data=data)

    def get(self, path: str | Path) -> bytes:
        """A file's bytes."""
        started = self.start(["cat", str(path)])
        if started.wait(60):
            raise HarnessError(f"{self.plan.name}: {started.tail()}")
        return bytes(started.stdout)

    def load(self, module: Path, *parameters: str, name: str = "") -> None:
        """Load a ``.ko`` of this machine."""
        there = f"/run/{name or module.name}"
        self.put(there, module.read_bytes())
        self.run(["insmod", there, *parameters])

    def log(self) -> str:
        """What the kernel said on its console."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def complaints(self) -> list[Report]:
        """What it said of bugs, but for what is allowed."""
        return reports(self.log(), self.plan.allowed)

    def _last_words(self) -> str:
        deadline = time.monotonic() + 3  # the connection may end before the console's last line is written
        while time.monotonic() < deadline and not self.complaints():
            time.sleep(0.1)
        found = self.complaints()
        return f"\n{found[0].text}\nconsole: {self.console}" if found else f"; console: {self.console}"

    @property
    def alive(self) -> bool:
        """Whether its QEMU still runs: a panic ends it."""
        return self._process.poll() is None

    @property
    def process(self) -> int:
        """The number of its QEMU process."""
        return self._process.pid

    @property
    def monitor(self) -> Path:
        """The socket of QEMU's monitor (see guests.monitor)."""
        return self._folder / "qmp"

    def qmp(self, command: str, **arguments: object) -> object:
        """Ask QEMU's monitor; its answer. Raises HarnessError if it refuses."""
        return ask(self.monitor, command, **arguments)

    def plug(self, segment: int = 0, *, connected: bool = True) -> None:
        """Connect or disconnect the cable of one segment's card."""
        self.qmp("set_link", name=f"n{segment}", up=connected)

    def freeze(self) -> None:
        """Stop it between two instructions; thaw() lets it go on."""
        self.qmp("stop")

    def thaw(self) -> None:
        """Let it go on after freeze()."""
        self.qmp("cont")

    def ssh(self, *command: str) -> list[str]:
        """The words that run ``command`` in it by ssh, with the harness's key."""
        return [
            "ssh", "-p", str(self.ssh_port), "-i", str(private_key()), "-o", "StrictHostKeyChecking=no",
            "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=60",
            "root@127.0.0.1", *command,
        ]  # fmt: skip

    def close(self) -> None:
        """End it, without ceremony: its disk is thrown away anyway."""
        if self._line is not None:
            self._line.close()
        process = getattr(self, "_process", None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _console_file(name: str) -> Path:
    folder = room(LOGS / "guests")
    for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return folder / f"{time.strftime('%m%d-%H%M%S')}-{os.getpid()}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"


def private_key() -> Path:
    """The harness's ssh key, made at first use; good for guests only, whose images anyone here can read."""
    need(("openssh-client",))
    file = room(CACHE / "ssh") / "key"
    if not file.exists():
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "sockmi-guests", "-f", str(file)]
        subprocess.run(words, check=True, capture_output=True)
    return file


def public_key() -> str:
    """Its public half."""
    return Path(f"{private_key()}.pub").read_text().strip()
