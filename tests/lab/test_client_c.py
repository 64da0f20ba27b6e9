# SPDX-License-Identifier: MIT
"""The C library as a library: header, symbols, ABI, bad arguments, memory, threads, signals, ptrace."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.client_callers import (
    ROOT,
    C,
    Context,
    Endpoint,
    ExportOptions,
    ImportOptions,
    ImportReq,
    Result,
    build,
)
from tests.lab.client_daemon import FakeDaemon, connection

INCLUDE = ROOT / "daemon/libsockmi/include"
EXAMPLE = ROOT / "docs/examples/handover.c"
EXERCISE = Path(__file__).with_name("client_exercise.c")
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "control"))
    with FakeDaemon(tmp_path / "control") as fake:
        yield fake


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client part, installed as `make install` would, with its pkg-config file."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run(
        [
            "make",
            "-s",
            "-C",
            ROOT / "daemon/libsockmi",
            f"B={root}/build",
            f"PREFIX={root}/usr",
            "install-client",
        ],
        check=True,
        timeout=120,
    )
    return root / "usr"


def compiled(installed: Path, source: Path, out: Path, *flags: str, compiler: str = "cc") -> Path:
    environment = {**os.environ, "PKG_CONFIG_PATH": str(installed / "lib/pkgconfig")}
    found = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "sockmi"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    command = [compiler, *STRICT, *flags, str(source), "-o", str(out), *found.stdout.split()]
    subprocess.run([*command, f"-Wl,-rpath,{installed}/lib"], check=True, timeout=60)
    return out


@pytest.mark.parametrize(
    ("compiler", "standard"), [("gcc", "c99"), ("clang", "c99"), ("g++", "c++11"), ("g++", "c++20")]
)
def test_header_compiles_alone(tmp_path: Path, compiler: str, standard: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    source = tmp_path / ("use.cc" if "++" in compiler else "use.c")
    source.write_text(
        "#include <sockmi.h>\n"
        "int main(void) { struct import_req irq = SOCKMI_IMPORT(3, SOCKMI_ANY_STATE);\n"
        "irq.local.port = 80; return irq.fd - 3 + (int)irq.remote.port; }\n"
    )
    subprocess.run(
        [compiler, f"-std={standard}", *STRICT, f"-I{INCLUDE}", "-c", source, "-o", tmp_path / "use.o"],
        check=True,
        timeout=60,
    )


def test_only_the_interface_is_exported() -> None:
    found = subprocess.run(
        ["nm", "-D", "--defined-only", build() / "libsockmi.so"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[2] for line in found.splitlines() if " T " in line} == {
        f"{name}@@SOCKMI_0"
        for name in (
            "import_socket",
            "import_socket_ex",
            "export_socket",
            "export_listed",
            "export_socket_ex",
            "sockmi_last_error",
            "sockmi_version",
        )
    }
    assert all(line.split()[1] in "TA" for line in found.splitlines())


def test_layout_is_what_it_was_published_as(tmp_path: Path) -> None:
    """Sizes are the ABI: a change needs a new version of the library."""
    source = tmp_path / "sizes.c"
    kinds = (
        "sockmi_endpoint",
        "import_req",
        "sockmi_context",
        "sockmi_import_options",
        "sockmi_export_options",
        "sockmi_result",
    )
    body = "".join(f'printf("%zu ", sizeof(struct {kind}));' for kind in kinds)
    source.write_text(f"#include <sockmi.h>\n#include <stdio.h>\nint main(void) {{ {body} return 0; }}\n")
    subprocess.run(["cc", f"-I{INCLUDE}", source, "-o", tmp_path / "sizes"], check=True, timeout=60)
    sizes = list(map(int, subprocess.check_output([tmp_path / "sizes"], text=True).split()))
    mirrors = (Endpoint, ImportReq, Context, ImportOptions, ExportOptions, Result)
    assert sizes == [ctypes.sizeof(mirror) for mirror in mirrors]
    assert sizes == [24, 216, 16, 24, 64, 336]


def test_plain_calls(daemon: FakeDaemon) -> None:
    library = C().library
    daemon.put(context=b"nobody wants it")
    with socket.socket() as target:
        irq = ImportReq(fd=target.fileno(), states=7)
        assert library.import_socket(ctypes.byref(irq), 1, 1000) == 1
        assert library.import_socket(ctypes.byref(ImportReq(fd=-1)), 1, 0) == -1
        assert irq.returned == 4
        assert library.export_socket(-5, target.fileno(), 99, None) == 0
    assert library.import_socket(None, 1, 0) == -1
    assert ctypes.get_errno() == errno.EINVAL


def test_bad_structs(daemon: FakeDaemon) -> None:
    library, with_text = C().library, C()
    target = socket.socket()
    good = ImportReq(fd=target.fileno(), states=4)

    def fails(expected: int, irq: ImportReq, n: int = 1, options: ImportOptions | None = None) -> None:
        assert library.import_socket_ex(ctypes.byref(irq), n, 0, options and ctypes.byref(options)) == -1
        assert with_text.fail().errno == expected

    fails(errno.EINVAL, good, 0)
    fails(errno.EINVAL, good, 5000)
    fails(errno.EINVAL, ImportReq(fd=target.fileno(), states=0))
    fails(errno.EINVAL, ImportReq(fd=target.fileno(), states=8))
    fails(errno.EINVAL, ImportReq(fd=target.fileno(), states=1, preferred=2))
    fails(errno.EINVAL, ImportReq(fd=target.fileno(), states=1, remote=Endpoint(port=1)))
    fails(errno.EINVAL, ImportReq(fd=target.fileno(), states=4, local=Endpoint(port=65536)))
    fails(errno.EAFNOSUPPORT, ImportReq(fd=target.fileno(), states=4, local=Endpoint(af=1)))
    odd = ImportReq(fd=target.fileno(), states=4)
    odd.reserved[31] = 1
    fails(errno.EINVAL, odd)
    fails(errno.EINVAL, good, options=ImportOptions(size=3))
    fails(errno.ENAMETOOLONG, good, options=ImportOptions(size=24, control=b"x" * 200))
    grown = (ctypes.c_size_t * 8)(64, 0, 0, 0, 0, 0, 0, 1)
    as_options = ctypes.cast(grown, ctypes.POINTER(ImportOptions)).contents
    fails(errno.E2BIG, good, options=as_options)
    grown[7] = 0
    assert library.import_socket_ex(ctypes.byref(good), 1, 0, ctypes.byref(as_options)) == 0
    assert library.import_socket_ex(ctypes.byref(good), 1, 0, ctypes.byref(ImportOptions(size=8))) == 0

    fd = target.fileno()
    for options, expected in (
        (ExportOptions(size=64, flags=2), errno.EINVAL),
        (ExportOptions(size=64, timeout=-1), errno.EINVAL),
        (ExportOptions(size=64, context_bytes=1), errno.EINVAL),
        (ExportOptions(size=64, host=b""), errno.EINVAL),
        (ExportOptions(size=0), errno.EINVAL),
    ):
        assert library.export_socket_ex(-1, fd, 0, None, ctypes.byref(options), None) == -1
        assert with_text.fail().errno == expected
    assert library.export_socket(-1, fd, 99, b"\0" * 16) == -1
    assert with_text.fail().errno == errno.EAFNOSUPPORT
    assert library.export_socket_ex(-1, fd, 0, None, None, ctypes.byref(Result(size=1))) == -1
    assert with_text.fail().errno == errno.EINVAL
    assert library.export_listed(None, 0, None, None, None) == -1
    assert with_text.fail().errno == errno.EINVAL
    small = Result(size=24, host=b"untouched")
    assert library.export_socket_ex(-1, fd, 0, None, None, ctypes.byref(small)) == 0
    assert small.host == b"untouched"
    assert any(small.migration)
    target.close()


@pytest.mark.parametrize("standard", ["c99", "gnu11"])
def test_the_example_hands_over(daemon: FakeDaemon, installed: Path, tmp_path: Path, standard: str) -> None:
    program = compiled(
        installed, EXAMPLE, tmp_path / "handover", f"-std={standard}", "-D_POSIX_C_SOURCE=200809L"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen([program, "serve", str(port), "b"]) as serving:
        deadline = time.monotonic() + 10
        while True:
            try:
                peer = socket.create_connection(("127.0.0.1", port), timeout=5)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        peer.sendall(b"hello")
        assert peer.recv(9) == b"hello"
        assert serving.wait(10) == 0
    peer.close()
    assert daemon.contexts == [(5).to_bytes(8, sys.byteorder)]
    dormant = daemon.put(context=daemon.contexts[0])
    assert dormant.peer
    with subprocess.Popen([program, "resume"], stdout=subprocess.PIPE, text=True) as resumed:
        dormant.peer.sendall(b"world")
        assert dormant.peer.recv(9) == b"world"
        dormant.peer.close()
        out, _unused = resumed.communicate(timeout=10)
    assert out == "10 bytes echoed, here and before\n"


def exercise(daemon: FakeDaemon, command: list[str], imports: int, threads: int, **environment: str) -> None:
    total = imports * threads

    def feed() -> None:
        for _turn in range(total):
            daemon.put(context=b"context")

    feeder = threading.Thread(target=feed)
    feeder.start()
    done = subprocess.run(
        [*command, str(imports), str(threads)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    feeder.join()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"imported {total} exported {total} failed {total}\n", done.stderr


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(daemon: FakeDaemon, tmp_path: Path, sanitizer: str) -> None:
    """Sources of library and program in one program; threads, signals, leaks."""
    sources = sorted((ROOT / "daemon/libsockmi/client").glob("*.c"))
    program = tmp_path / "exercise"
    subprocess.run(
        [
            "cc",
            "-std=gnu11",
            "-D_GNU_SOURCE",
            "-g",
            "-O1",
            f"-fsanitize={sanitizer}",
            "-fno-sanitize-recover=all",
            '-DSOCKMI_VERSION="test"',
            f"-I{INCLUDE}",
            *sources,
            EXERCISE,
            "-o",
            program,
            "-ljansson",
            "-lpthread",
        ],
        check=True,
        timeout=120,
    )
    exercise(daemon, [str(program)], 10, 8)


def test_valgrind_finds_nothing(daemon: FakeDaemon, installed: Path, tmp_path: Path) -> None:
    if not shutil.which("valgrind"):
        pytest.skip("no valgrind here")
    program = compiled(installed, EXERCISE, tmp_path / "exercise", "-std=gnu11", "-pthread", "-g")
    valgrind = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--track-fds=yes"]
    exercise(daemon, [*valgrind, str(program)], 3, 2)


def test_a_waiting_caller_is_stopped_and_goes_on(daemon: FakeDaemon) -> None:
    """What the daemon does to the caller of export_socket: PTRACE_SEIZE, INTERRUPT, DETACH; also a signal."""
    library = C().library
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGUSR1, lambda *_unused: None)
            signal.siginterrupt(signal.SIGUSR1, True)
            irq = ImportReq(fd=socket.socket().detach(), states=4)
            os.write(ready_write, b"x")
            n = library.import_socket(ctypes.byref(irq), 1, -1)
            os._exit(0 if n == 1 else 1)
        finally:
            os._exit(2)
    try:
        os.read(ready_read, 1)
        deadline = time.monotonic() + 10
        while "poll" not in Path(f"/proc/{child}/wchan").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        libc = ctypes.CDLL(None, use_errno=True)
        seize, interrupt, detach = 0x4206, 0x4207, 17
        for _turn in range(5):
            assert libc.ptrace(seize, child, None, None) == 0
            assert libc.ptrace(interrupt, child, None, None) == 0
            os.waitpid(child, 0)
            assert libc.ptrace(detach, child, None, None) == 0
            os.kill(child, signal.SIGUSR1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        daemon.put()
        assert os.waitpid(child, 0)[1] == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(ready_read)
        os.close(ready_write)


def test_set_user_id_programs_ignore_the_environment(
    daemon: FakeDaemon, installed: Path, tmp_path: Path, enterable: Callable[[Path], None]
) -> None:
    source = tmp_path / "suid.c"
    source.write_text(
        "#include <sockmi.h>\n#include <stdio.h>\n#include <sys/socket.h>\nint main(void)\n{\n"
        "\tstruct import_req irq = SOCKMI_IMPORT(socket(AF_INET, SOCK_STREAM, 0), 4);\n"
        '\tprintf("%d %s", import_socket(&irq, 1, 0), sockmi_last_error()->message);\n\treturn 0;\n}\n'
    )
    program = compiled(installed, source, tmp_path / "suid")
    assert subprocess.check_output([program], text=True) == "0 "
    enterable(tmp_path)
    enterable(installed)
    program.chmod(0o4755)
    mounted = os.statvfs(program).f_flag & os.ST_NOSUID
    if mounted:
        pytest.skip("this file system ignores set-user-id")
    out = subprocess.check_output([program], text=True, user=65534)
    assert str(daemon.path) not in out
    assert len(daemon.requests) == 1


def test_a_full_backlog_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOCKMI_CONTROL", str(tmp_path / "busy"))
    with socket.socket(socket.AF_UNIX) as listener, socket.socket() as target:
        listener.bind(str(tmp_path / "busy"))
        listener.listen(0)
        fillers = [socket.socket(socket.AF_UNIX) for _turn in range(2)]
        for one in fillers:
            one.setblocking(False)
            one.connect_ex(str(tmp_path / "busy"))
        with pytest.raises(OSError, match="accepts no connection") as caught:
            C().take([{"fd": target.fileno(), "states": ["connected"]}], 0)
        assert caught.value.errno == errno.ETIMEDOUT
        for one in fillers:
            one.close()


def test_no_descriptors_left(daemon: FakeDaemon) -> None:
    """EMFILE before and while descriptors arrive; the socket stays in the list."""
    import resource

    daemon.put()
    with socket.socket() as target:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        here, peer = connection()
        top = max(int(one.name) for one in Path("/proc/self/fd").iterdir())
        caller = C()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (top + 1, limits[1]))
            fillers = []
            while True:
                try:
                    fillers.append(os.dup(0))
                except OSError:
                    break
            with pytest.raises(OSError) as caught:
                caller.take([{"fd": target.fileno(), "states": ["connected"]}], 0)
            assert caught.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in fillers:
                os.close(fd)
        assert len(caller.take([{"fd": target.fileno(), "states": ["connected"]}], 5)) == 1
        here.close()
        peer.close()
