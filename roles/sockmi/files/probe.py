# SPDX-License-Identifier: GPL-3.0-or-later
"""What the host is like, as JSON: all that the role must know before it touches anything.

The argument is JSON too: `pythons` (candidates for the daemon's), `sysctls` (names), `prefix`, `units`, the
file `before`.
Python 3.8 and later.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TAG = "import sys; print('cp%d%d' % sys.version_info[:2])"
QUERIES = (
    ("debian", ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"]),
    (
        "redhat",
        ["rpm", "-qa", "--qf", "%{NAME} installed\n%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH} installed\n"],
    ),
)


def text(path):
    """The contents of a small file, stripped; None if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def said(*words):
    """What a command prints, "" if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def system():
    """Family, distribution and version, from os-release(5)."""
    fields = {}
    for line in (text("/etc/os-release") or "").splitlines():
        name, _unused, value = line.partition("=")
        fields[name] = value.strip("\"'")
    kin = {fields.get("ID", ""), *fields.get("ID_LIKE", "").split()}
    family = "debian" if "debian" in kin else "redhat" if kin & {"rhel", "fedora", "centos"} else "other"
    return {
        "family": family,
        "distribution": fields.get("ID", ""),
        "version": fields.get("VERSION_ID", ""),
        "name": fields.get("PRETTY_NAME", "this system"),
    }


def packages(family):
    """Names of those that are installed, as far as the role may ask for them."""
    found = set()
    for name, query in QUERIES:
        if name == family:
            for line in said(*query).splitlines():
                package, _unused, state = line.partition(" ")
                if state == "installed":
                    found.add(package)
    return sorted(found)


def python(candidates):
    """The first of them that the daemon can run with, else the last that is there: path and tag."""
    found = None
    for name in candidates:
        path = shutil.which(name)
        tag = said(path, "-I", "-c", TAG) if path else ""
        if tag.startswith("cp3"):
            found = {"path": path, "tag": tag}
            if int(tag[3:]) >= 11:
                break
    return found


def capabilities():
    """The effective ones, as a number."""
    for line in (text("/proc/self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def before(path):
    """What settings were before the installation; None if it has not been done."""
    try:
        return json.loads(text(path) or "null")
    except ValueError as error:
        sys.exit(
            f"{path} is damaged ({error}); it has the kernel settings of before the installation: restore "
            "it, or remove it, and they stay as they are now when SockMi is removed"
        )


def free_mib(folder):
    """Room where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def process(unit, prefix):
    """Of a unit's main process: when it was started (seconds since 1970), and which release it runs."""
    pid = said("systemctl", "show", "--property=MainPID", "--value", unit)
    try:
        ticks = int(text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
        uptime_s = float(text("/proc/uptime").split()[0])
    except (AttributeError, IndexError, ValueError):
        return {"started": None, "release": None}
    # Of its libraries: the kernel names them as they are, without the link.
    maps = text(f"/proc/{pid}/maps") or ""
    mapped = re.search(re.escape(str(prefix.resolve())) + r"/releases/([^/\s]+)/", maps)
    return {
        "started": time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK"),
        "release": mapped.group(1) if mapped else None,
    }


def written(path):
    """When a file was changed, seconds since 1970; None if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def main():
    """Print it."""
    asked = json.loads(sys.argv[1])
    prefix = Path(asked["prefix"])
    found = system()
    family = found["family"]
    candidates = asked["pythons"].get(family) or ["python3"]
    found.update(
        {
            "interpreter": sys.executable,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "root": os.geteuid() == 0,
            "capabilities": capabilities(),
            "systemd": Path("/run/systemd/system").is_dir(),
            "python": python(candidates),
            "packages": packages(family),
            "release": text(prefix / "current/release"),
            "releases": sorted(path.parent.name for path in prefix.glob("releases/*/complete")),
            "free_mib": free_mib(prefix),
            "sysctls": {name: text("/proc/sys/" + name.replace(".", "/")) for name in asked["sysctls"]},
            "ptrace_scope": text("/proc/sys/kernel/yama/ptrace_scope"),
            "mtu": {path.parent.name: int(text(path) or 0) for path in Path("/sys/class/net").glob("*/mtu")},
            "module_there": Path("/sys/module/sockmi").is_dir() or any(Path("/usr/src").glob("sockmi-*")),
            "units": {
                name: {
                    "active": said("systemctl", "is-active", name) == "active",
                    "enabled": said("systemctl", "is-enabled", name) == "enabled",
                    "there": Path("/etc/systemd/system", name).exists(),
                    "written": written(Path("/etc/systemd/system", name)),
                    "process": process(name, prefix),
                }
                for name in asked["units"]
            },
            "configured": Path("/etc/sockmi/sockmi.yml").exists(),
            "firewalld": said("firewall-cmd", "--state") == "running",
            "ufw": "ENABLED=yes" in (text("/etc/ufw/ufw.conf") or ""),
            "before": before(asked["before"]),
        }
    )
    print(json.dumps(found))


main()
