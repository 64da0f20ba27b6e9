# SPDX-License-Identifier: MIT
"""The command line for tests: run it in this process, as another user, or as a program of a lab host."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.host import Host
from lab.labs import Lab
from sockmi.cli.main import main
from tests.lab.scenario import until

# A line server: echoes, holds every connection, and can be told apart by its name.
ECHO = """
import selectors, socket, sys
name, address, ports = sys.argv[1], sys.argv[2], sys.argv[3:]
open("/proc/self/comm", "w").write(name)
chooser = selectors.DefaultSelector()
for port in ports:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, int(port)), family=family)
    chooser.register(listener, selectors.EVENT_READ, True)
print("ready", flush=True)
while True:
    for key, _ in chooser.select():
        if key.data:
            chooser.register(key.fileobj.accept()[0], selectors.EVENT_READ, False)
            continue
        try:
            content = key.fileobj.recv(65536)
        except OSError:
            content = b""
        if content:
            key.fileobj.sendall(content)
        else:
            chooser.unregister(key.fileobj)
            key.fileobj.close()
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


def run(*words: object, host: Host | None = None) -> Result:
    """``sockmi WORDS`` in this process, with the control socket of ``host``; exceptions are the test's."""
    texts = [str(word) for word in words]
    if host is not None:
        texts[1:1] = ["--control", str(host.control_socket)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = main(texts)
        except SystemExit as exit_:
            status = exit_.code
    assert "Traceback" not in err.getvalue()
    return Result(int(status or 0), out.getvalue(), err.getvalue())


def run_as(user_id: int, *words: object, host: Host) -> Result:
    """The same by another user, without groups and capabilities: in a forked child, so no file is read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.setgroups([])
            os.setresgid(user_id, user_id, user_id)
            os.setresuid(user_id, user_id, user_id)
            result = run(*words, host=host)
            content = json.dumps([result.status, result.out, result.err])
        except BaseException as error:
            content = json.dumps([-1, "", repr(error)])
        with os.fdopen(writer, "w") as file:
            file.write(content)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        status, out, err = json.loads(file.read())
    os.waitpid(child, 0)
    return Result(status, out, err)


def program(host: Host, *words: object, **options: Any) -> subprocess.Popen[str]:
    """``sockmi WORDS`` as a program on ``host``."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    texts = [str(word) for word in words]
    return host.python_popen("sockmi.cli.main", *texts, text=True, **options)


@dataclass(slots=True)
class Client:
    """A line session at the peer."""

    connection: socket.socket
    port: int

    def say(self, text: str) -> str:
        """Send a line; the line that comes back."""
        self.connection.sendall(text.encode() + b"\n")
        return self.hear()

    def hear(self) -> str:
        """The next line that comes."""
        line = b""
        while not line.endswith(b"\n"):
            got = self.connection.recv(1)
            assert got, f"the connection ended after {line!r}"
            line += got
        return line[:-1].decode()

    @property
    def local(self) -> str:
        """This end."""
        address, port = self.connection.getsockname()[:2]
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Scene:
    """Echo servers on hosts, clients at the peer, commands; all ended by ``close``."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._processes: list[subprocess.Popen[str]] = []
        self._clients: list[Client] = []

    def server(
        self, host: str, *ports: int, name: str = "echo", version: int = 4, user: int | None = None
    ) -> subprocess.Popen[str]:
        """An echo server that listens; of another user it needs nothing but the system's Python."""
        address = "0.0.0.0" if version == 4 else "::"  # noqa: S104 - a lab host's
        python = sys.executable if user is None else shutil.which("python3", path="/usr/bin:/bin")
        command = [str(python), "-c", ECHO, name, address, *map(str, ports)]
        options: dict[str, Any] = {} if user is None else {"user": user, "cwd": "/", "env": {}}
        process = self.lab.host(host).popen(command, stdout=subprocess.PIPE, text=True, **options)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def client(self, host: str, port: int, version: int = 4) -> Client:
        """A client that has spoken with the server on ``host`` once."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        connection = self.lab.host("peer").socket(family)
        connection.settimeout(20)
        connection.connect((self.lab.host(host).address(version), port))
        one = Client(connection, port)
        self._clients.append(one)
        assert one.say("first") == "first"
        return one

    def program(self, host: str, *words: object, **options: Any) -> subprocess.Popen[str]:
        """A running command."""
        process = program(self.lab.host(host), *words, **options)
        self._processes.append(process)
        return process

    def rows(self, host: str, *words: object) -> list[dict[str, Any]]:
        """``sockmi list``'s rows, which may be none."""
        rows: list[dict[str, Any]] = run("list", *words, "--json", host=self.lab.host(host)).json
        return rows

    def descriptor_of(self, client: Client, host: str = "a") -> tuple[int, int]:
        """Process and descriptor that serve ``client``."""
        rows = [row for row in self.rows(host, "--kind", "connected") if row["remote"] == client.local]
        row = rows[0]  # `cat` has it twice, as its input and its output
        return row["pid"], row["fd"]

    def waiting(self, host: str, count: int = 1) -> None:
        """Until so many import requests for connections wait."""

        def there() -> bool:
            answer = run("status", "--json", host=self.lab.host(host)).json
            return bool(answer["import_lists"]["connected"]["waiting"] >= count)

        until(there)

    def close(self) -> None:
        """End everything."""
        for client in self._clients:
            client.connection.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr, process.stdin):
                if stream is not None:
                    stream.close()


def ended(process: subprocess.Popen[str], timeout_s: float = 20) -> Result:
    """Wait for a command."""
    out, err = process.communicate(timeout=timeout_s)
    assert "Traceback" not in err, err
    return Result(process.returncode, out, err)


@contextlib.contextmanager
def listener(path: Path) -> Iterator[None]:
    """A unix socket that accepts and never answers."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        stop = threading.Event()
        accepted: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    accepted.append(one.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            for connection in accepted:
                connection.close()
            with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
                last.connect(str(path))
            thread.join(5)


def elapsed(since: float) -> float:
    """Seconds since a time.monotonic()."""
    return time.monotonic() - since
