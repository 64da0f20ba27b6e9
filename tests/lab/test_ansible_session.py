# SPDX-License-Identifier: MIT
"""The sockets of the Ansible session that moves others: known also to an async task."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.lab.cgroup import unit

UTILS = Path(__file__).parents[2] / "plugins/module_utils"
# As an async task is: its parents have ended, nothing of their environment is left.
ASYNC = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[2]).write_text("0")
if os.fork():
    os._exit(0)
os.setsid()
first = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == first:
    pass
sys.path.insert(0, sys.argv[1])
from _sessions import own_inodes
print(json.dumps(sorted(own_inodes())), flush=True)
"""


def test_an_async_task_knows_the_sockets_of_its_login() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as login,
        socket.create_server(("127.0.0.1", 0)) as other,
        subprocess.Popen(["sleep", "60"], pass_fds=[login.fileno()]) as holder,
        unit("session-smt{}.scope") as session,
    ):
        members = session / "cgroup.procs"
        try:
            members.write_text(str(holder.pid))
            task = [sys.executable, "-I", "-c", ASYNC, UTILS, members]
            said = subprocess.run(task, capture_output=True, text=True, check=True, env={}, timeout=30)
        finally:
            holder.kill()
        found = json.loads(said.stdout)
        assert os.fstat(login.fileno()).st_ino in found
        assert os.fstat(other.fileno()).st_ino not in found
