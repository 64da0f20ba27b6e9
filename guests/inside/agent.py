# SPDX-License-Identifier: MIT
"""Inside a guest: names it, gives it its addresses, and runs what the harness asks for.

Speaks over a virtio console. A frame is a line of JSON; ``size`` in it says how many bytes follow the line.
From the harness: ``run`` (id, command, cwd, env), ``input`` (id, bytes; no bytes close it), ``kill`` (id,
signal).
To it: ``hello``, ``output`` (id, stream, bytes), ``exit`` (id, code), ``error`` (id, text).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

PORT = Path("/dev/virtio-ports/org.sockmi.agent")
CHUNK = 1 << 16


class Agent:
    """The one connection to the harness."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writing = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._buffer = b""

    def send(self, kind: str, data: bytes = b"", **fields: object) -> None:
        """One frame to the harness."""
        frame = json.dumps({"kind": kind, "size": len(data), **fields}).encode() + b"\n" + data
        with self._writing:
            while frame:
                frame = frame[os.write(self._port, frame) :]

    def _more(self) -> None:
        chunk = os.read(self._port, CHUNK)
        if not chunk:  # nobody at the other end
            time.sleep(0.2)
        self._buffer += chunk

    def _frame(self) -> tuple[dict[str, Any], bytes]:
        while b"\n" not in self._buffer:
            self._more()
        line, self._buffer = self._buffer.split(b"\n", 1)
        header = json.loads(line)
        while len(self._buffer) < header["size"]:
            self._more()
        data, self._buffer = self._buffer[: header["size"]], self._buffer[header["size"] :]
        return header, data

    def serve(self) -> None:
        """Do what is asked, for ever."""
        self.send("hello", release=os.uname().release)
        while True:
            header, data = self._frame()
            try:
                self._do(header, data)
            except (OSError, KeyError, ValueError) as error:
                self.send("error", id=header.get("id", 0), text=f"{type(error).__name__}: {error}")

    def _do(self, header: dict[str, Any], data: bytes) -> None:
        number = header["id"]
        if header["kind"] == "run":
            child = subprocess.Popen(
                header["command"], cwd=header["cwd"], env=header["env"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0,
            )  # fmt: skip
            self._running[number] = child
            threading.Thread(target=self._watch, args=(number, child), daemon=True).start()
        elif number in self._running:
            child = self._running[number]
            if header["kind"] == "kill":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, header["signal"])
            elif header["kind"] == "input":
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    if data:
                        child.stdin.write(data)
                    else:
                        child.stdin.close()

    def _watch(self, number: int, child: subprocess.Popen[bytes]) -> None:
        streams = [
            threading.Thread(target=self._pump, args=(number, name, pipe), daemon=True)
            for name, pipe in (("stdout", child.stdout), ("stderr", child.stderr))
            if pipe is not None
        ]
        for stream in streams:
            stream.start()
        code = child.wait()
        for stream in streams:
            stream.join(timeout=1)  # a child of the child may hold the pipe for ever
        del self._running[number]
        self.send("exit", id=number, code=code if code >= 0 else 128 - code)

    def _pump(self, number: int, name: str, pipe: IO[bytes]) -> None:
        while chunk := pipe.read(CHUNK):
            self.send("output", chunk, id=number, stream=name)


def words() -> dict[str, str]:
    """What the kernel's command line tells us."""
    given = (word.partition("=") for word in Path("/proc/cmdline").read_text().split())
    return {name: value for name, found, value in given if found and name.startswith("sockmi.")}


def settle() -> None:
    """Take name and addresses as the command line says."""
    told = words()
    name = told.get("sockmi.name", "guest")
    Path("/proc/sys/kernel/hostname").write_text(name)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    for word, value in told.items():
        if word.startswith("sockmi.net."):
            device = word.removeprefix("sockmi.net.")
            for address in value.split(","):
                subprocess.run(["ip", "address", "add", address, "dev", device, *nodad(address)], check=False)
            subprocess.run(["ip", "link", "set", device, "up"], check=False)


def nodad(address: str) -> list[str]:
    """What makes an IPv6 address usable at once: nobody else of the segment has it."""
    return ["nodad"] if ":" in address else []


def main() -> None:
    settle()
    while not PORT.exists():
        ports = Path("/sys/class/virtio-ports")
        for entry in ports.iterdir() if ports.exists() else ():
            if (entry / "name").read_text().strip() == PORT.name:
                PORT.parent.mkdir(exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    PORT.symlink_to(f"/dev/{entry.name}")
        time.sleep(0.02)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    Agent(os.open(PORT, os.O_RDWR | os.O_CLOEXEC)).serve()


main()
