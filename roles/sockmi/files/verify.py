# SPDX-License-Identifier: GPL-3.0-or-later
"""Proves a release on this host: moves a live connection between two daemons, in namespaces made for it.

    peer ---+
    a    ---+--- a bridge, in a namespace of its own
    b    ---+

Runs with the Python of the release, as root; the arguments are how many seconds it may take, and those of
the host's settings, as JSON, on which it depends whether it works: ``engine``, ``redirect``, ``timing``;
and the kernel settings that the host will have, of which those of IPv4's devices are set there, too.
Prints what happened as JSON; ends with 1, and why on standard error, if anything was not as it must be.
Leaves nothing behind.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
HOSTS = {"a": 1, "b": 2, "peer": 9}
PORT = 5000
FIRST, REST = 1 << 16, 1 << 20
# Others may be the whole machine's, or name devices that are not there.
OF_DEVICES = re.compile(r"net[./]ipv4[./](ip_forward$|conf[./](all|default)[./])")

# Echoes FIRST bytes, then reads no more: what the peer sends next must travel in the socket.
SERVER = """
import socket, sys, time
first = int(sys.argv[2])
connection, _ = socket.create_server((sys.argv[1], int(sys.argv[3]))).accept()
while first:
    data = connection.recv(min(first, 65536))
    connection.sendall(data)
    first -= len(data)
print(connection.fileno(), flush=True)
time.sleep(1000)
"""

# Knows nothing of SockMi: standard input and output are the connection.
HANDLER = """
import os
while data := os.read(0, 65536):
    while data:
        data = data[os.write(1, data):]
"""

# Sends a pattern and checks that it comes back, byte for byte; then says so.
PEER = """
import random, socket, sys, threading
connection = socket.create_connection((sys.argv[1], int(sys.argv[3])))
def exchange(size, seed):
    sent = random.Random(seed).randbytes(size)
    sender = threading.Thread(target=connection.sendall, args=(sent,))
    sender.start()
    came = b""
    while len(came) < size:
        data = connection.recv(65536)
        if not data:
            sys.exit(f"the connection ended after {len(came)} of {size} bytes")
        came += data
    sender.join()
    if came != sent:
        sys.exit("other bytes came back than were sent")
exchange(int(sys.argv[2]), 1)
print("first", flush=True)
sys.stdin.readline()
exchange(int(sys.argv[4]), 2)
print("rest", flush=True)
"""


class Failed(Exception):
    """It does not work; the text says what."""


class Trial:
    """The namespaces, the processes and their ends."""

    def __init__(self, limit: float, settings: "dict[str, object]", sysctls: "dict[str, object]") -> None:
        self.deadline = time.monotonic() + limit
        self.settings = settings
        self.sysctls = [f"{name}={value}" for name, value in sysctls.items() if OF_DEVICES.match(name)]
        self.mark = f"sockmi-{secrets.token_hex(3)}"
        # Not where TMPDIR says: the path of a socket has 107 bytes at most (unix(7)).
        self.folder = Path(tempfile.mkdtemp(prefix="sockmi-verify-", dir="/run"))
        self.stack = contextlib.ExitStack()
        self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.key = secrets.token_hex(32)

    # -- the hosts

    def namespace(self, name: str) -> str:
        """The namespace of a host."""
        return f"{self.mark}-{name}"

    def make_hosts(self) -> None:
        """The bridge and what hangs on it."""
        bridge = self.namespace("net")
        for name in ("net", *HOSTS):
            self.ip("netns", "add", self.namespace(name))
            self.stack.callback(self.ip, "netns", "delete", self.namespace(name), check=False)
            if self.sysctls:
                self.ip("netns", "exec", self.namespace(name), "sysctl", "-q", "-w", *self.sysctls)
        self.ip("-n", bridge, "link", "add", "name", "br0", "type", "bridge")
        self.ip("-n", bridge, "link", "set", "br0", "up")
        for name, number in HOSTS.items():
            inside = self.namespace(name)
            self.ip(
                "-n",
                bridge,
                "link",
                "add",
                "name",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                inside,
            )
            self.ip("-n", bridge, "link", "set", f"to-{name}", "master", "br0", "up")
            self.ip("-n", inside, "address", "add", f"10.77.83.{number}/24", "dev", "eth0")
            self.ip("-n", inside, "link", "set", "lo", "up")
            self.ip("-n", inside, "link", "set", "eth0", "up")
            self.ip("-n", inside, "route", "add", "default", "via", "10.77.83.254")

    def ip(self, *words: str, check: bool = True) -> None:
        """Run ip(8)."""
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise Failed(f"ip {' '.join(words)}: {done.stderr.strip()}")

    # -- the processes

    def start(self, host: str, *words: object, log: str) -> "subprocess.Popen[str]":
        """Start a program on a host; its errors go to a file."""
        with (self.folder / log).open("w") as errors:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(host), *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.stack.callback(end, process)
        return process

    def python(self, host: str, program: str, *words: object, log: str) -> "subprocess.Popen[str]":
        """Start a Python program on a host."""
        return self.start(host, sys.executable, "-I", "-c", program, *words, log=log)

    def daemon(self, host: str) -> None:
        """Start the daemon of a host."""
        folder = self.folder / host
        folder.mkdir()
        (folder / "key").write_text(f"{self.key}\n")
        (folder / "key").chmod(0o600)
        config = {
            **self.settings,
            "state_dir": str(folder / "state"),
            "run_dir": str(folder / "run"),
            "host_name": f"verify-{host}",
            "groups": [
                {
                    "name": "verify",
                    "interface": "eth0",
                    "key_file": str(folder / "key"),
                    # A busy machine may be still for seconds, and who is not heard 3.5 times is gone.
                    "announce_interval_s": 3.0,
                }
            ],
        }
        for name in ("state", "run"):
            (folder / name).mkdir(mode=0o700)
        (folder / "sockmi.yml").write_text(json.dumps(config))
        self.start(host, BIN / "sockmid", "--config", folder / "sockmi.yml", log=f"sockmid-{host}.log")

    def ask(self, host: str, *words: object) -> "subprocess.CompletedProcess[str]":
        """Run a command of sockmi(1) with a host's daemon."""
        return subprocess.run(
            [
                str(BIN / "sockmi"),
                *map(str, words),
                "--json",
                "--control",
                str(self.folder / host / "run/control.sock"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, self.deadline - time.monotonic()),
        )

    def until(self, what: str, ready: object) -> object:
        """What ``ready`` returns, once it is something."""
        while time.monotonic() < self.deadline:
            found = ready()
            if found:
                return found
            time.sleep(0.1)
        raise Failed(f"{what} did not happen in time")

    def line(self, process: "subprocess.Popen[str]", what: str) -> str:
        """The next line that a program prints."""
        read: list[str] = []

        def alarm(*_unused: object) -> None:
            raise Failed(f"{what} did not happen in time")

        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.deadline - time.monotonic()))
        try:
            read.append(process.stdout.readline().strip())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not read[0]:
            raise Failed(f"{what} did not happen: the program ended")
        return read[0]

    def logs(self) -> str:
        """The last lines that each program wrote."""
        told = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").strip().splitlines()[-3:]
            if lines:
                told.append(f"{log.stem}: {' | '.join(lines)}")
        return "; ".join(told)

    # -- the migration

    def run(self) -> "dict[str, object]":
        """Do it; what happened."""
        self.make_hosts()
        for host in ("a", "b"):
            self.daemon(host)
        for host in ("a", "b"):
            self.until(f"the start of the daemon on {host}", lambda host=host: self.heard(host))
        server = self.python("a", SERVER, "10.77.83.1", FIRST, PORT, log="server.log")
        listening = f":{PORT:04X} 00000000:0000 0A"
        self.until("listening", lambda: listening in Path(f"/proc/{server.pid}/net/tcp").read_text())
        peer = self.python("peer", PEER, "10.77.83.1", FIRST, PORT, REST, log="peer.log")
        self.line(peer, "the exchange before the migration")
        descriptor = self.line(server, "the server's part of it")
        importer = self.start(
            "b", BIN / "sockmi", "import", "--control", self.folder / "b/run/control.sock",
            "--local-port", PORT, "--exec", sys.executable, "-I", "-c", HANDLER, log="import.log",
        )  # fmt: skip
        self.until("an import request", lambda: self.waiting("b"))
        peer.stdin.write("go on\n")
        peer.stdin.flush()
        status = json.loads(self.ask("a", "status").stdout)
        moved = self.ask("a", "export", "--pid", server.pid, "--fd", descriptor, "--to", "verify-b")
        try:
            [record] = json.loads(moved.stdout)
        except ValueError:
            raise Failed(f"sockmi export: {moved.stdout or moved.stderr}") from None
        if record["outcome"] != "moved":
            raise Failed(
                f"the connection did not move: {(record['refusal'] or {}).get('message', record['outcome'])}"
            )
        self.line(peer, "the exchange after the migration")
        if importer.poll() not in (None, 0):
            raise Failed("the importing program failed")
        return {
            "outcome": record["outcome"],
            "engine": status["engine"],
            "mode": record["mode"],
            "blackout_us": record["blackout_us"],
            "bytes": FIRST + REST,
        }

    def heard(self, host: str) -> bool:
        """Whether the daemon of a host hears another."""
        said = self.ask(host, "groups")
        return said.returncode == 0 and any(group["members"] for group in json.loads(said.stdout)["groups"])

    def waiting(self, host: str) -> bool:
        """Whether a program waits for a connection."""
        return json.loads(self.ask(host, "status").stdout)["import_lists"]["connected"]["waiting"] > 0


def end(process: "subprocess.Popen[str]") -> None:
    """End a program and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    """The command."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # the latter: Ansible's own end
        signal.signal(number, lambda *_unused: sys.exit(1))
    trial = Trial(float(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
    with trial.stack:
        try:
            print(json.dumps(trial.run()))
        except (Failed, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            print(f"{error} [{trial.logs()}]", file=sys.stderr)
            return 1
    return 0


sys.exit(main())
