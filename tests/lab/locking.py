# SPDX-License-Identifier: MIT
"""A server whose calls keep its connections locked: each waits for memory that is not served (userfaultfd).

So does one that sends from a file of a FUSE file system that does not answer. Nobody else gets the lock
meanwhile, and who waits for it cannot be killed.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lab.host import Host

PAGE = 4096

SERVER = """
import ctypes, fcntl, mmap, os, socket, struct, sys, threading
port, count, uid = map(int, sys.argv[1:])
PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.send.restype = ctypes.c_ssize_t
faults = libc.syscall(323, os.O_CLOEXEC)  # userfaultfd(2), of x86-64
assert faults >= 0, os.strerror(ctypes.get_errno())
fcntl.ioctl(faults, 0xC018AA3F, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))  # UFFDIO_API
memory = mmap.mmap(-1, count * PAGE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(faults, 0xC020AA00, bytearray(struct.pack("=QQQQ", start, count * PAGE, 1, 0)))  # UFFDIO_REGISTER
os.setuid(uid)
with socket.create_server(("", port), backlog=512) as listener:
    print("ready", flush=True)
    own = [listener.accept()[0] for _ in range(count)]
threads = [
    threading.Thread(target=libc.send, args=(one.fileno(), start + at * PAGE, PAGE, 0), daemon=True)
    for at, one in enumerate(own)
]
for each in threads:
    each.start()
wanted = set()
while len(wanted) < count:
    wanted.add(os.read(faults, 32)[16:24])  # struct uffd_msg: the address of a page fault
print("locked", flush=True)
sys.stdin.readline()
fcntl.ioctl(faults, 0xC020AA04, bytearray(struct.pack("=QQQq", start, count * PAGE, 0, 0)))  # UFFDIO_ZEROPAGE
for each in threads:
    each.join()
print("free", flush=True)
while True:  # what has come is answered
    for one in own:
        one.settimeout(0.005)
        try:
            one.sendall(one.recv(1))
        except OSError:
            pass
"""


@dataclass
class Locking:
    """The server: ``locked`` waits until its connections are, ``free`` ends that."""

    process: subprocess.Popen[str]

    def _said(self, word: str) -> None:
        assert self.process.stdout and self.process.stdout.readline() == f"{word}\n"

    def locked(self) -> None:
        """When ``count`` connections have come."""
        self._said("locked")

    def free(self) -> None:
        """From now on each octet is answered; a page of zeros comes before that."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        self._said("free")


@contextmanager
def locking(host: Host, port: int, count: int, uid: int = 0) -> Iterator[Locking]:
    """Of ``uid``'s."""
    command = [sys.executable, "-c", SERVER, *map(str, (port, count, uid))]
    with host.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        server = Locking(process)
        try:
            server._said("ready")
            yield server
        finally:
            process.kill()  # which ends its calls
