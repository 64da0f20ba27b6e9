# SPDX-License-Identifier: GPL-3.0-or-later
"""What the host is like, as JSON: all that the role must know before it touches anything.

The argument is JSON too: `pythons` (candidates for the daemon's), `sysctls` (wanted), `prefix`, `units`, the
files `before` and `firewall`, `groups` (none: to remove all), `ports` (as udp/7780) of the daemon, `headers`
(how a family's package of the kernel's headers begins), `xtables` (the kernel's modules of legacy iptables,
where that is to be used); with `by_unit` the prefix is the installed unit's, if any.
Python 3.8 and later.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

TAG = "import sys; print('cp%d%d' % sys.version_info[:2], sys.base_prefix)"
QUERIES = (
    ("debian", ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"]),
    (
        "redhat",
        ["rpm", "-qa", "--qf", "%{NAME} installed\n%{NAME}-%{VERSION}-%{RELEASE}.%{ARCH} installed\n"],
    ),
)
UNITS = Path("/etc/systemd/system")
OWN = ("current", "dkms", "releases")  # what is SockMi's in its prefix
# Folders that are the system's, hier(7) and file-hierarchy(7), or the daemon's own for other things.
SYSTEM = {
    *("/", "/bin", "/boot", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/media", "/mnt", "/opt"),
    *("/root", "/sbin", "/srv", "/usr", "/usr/bin", "/usr/games", "/usr/include", "/usr/lib", "/usr/lib32"),
    *("/usr/lib64", "/usr/libexec", "/usr/libx32", "/usr/local", "/usr/local/bin", "/usr/local/etc"),
    *("/usr/local/games", "/usr/local/include", "/usr/local/lib", "/usr/local/man", "/usr/local/sbin"),
    *("/usr/local/share", "/usr/local/src", "/usr/sbin", "/usr/share", "/usr/src", "/var", "/var/backups"),
    *("/var/cache", "/var/lib", "/var/local", "/var/log", "/var/mail", "/var/opt", "/var/spool"),
    *("/etc/sockmi", "/var/lib/sockmi"),
}
# By these all of a family is forwarded. With them the kernel sets each device's, and IPv4's accept_redirects.
SWITCHES = {
    "ipv4": ("/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/all/forwarding"),
    "ipv6": ("/proc/sys/net/ipv6/conf/all/forwarding",),
}
RTF_ADVERTISED = 0x50000  # RTF_DEFAULT and RTF_ADDRCONF of linux/ipv6_route.h
# Of the Ansible module kmod: they outlive the module that somebody has removed by hand.
MODULE_FILES = ("/etc/modprobe.d/sockmi.conf", "/etc/modules-load.d/sockmi.conf")
ADDRESS = "239.77.83.1"  # of a group that names none
FIREWALLD_PRIORITY = 7780  # by which the role's rules there are told from the operator's
UFW_MARK = " comment 'sockmi'"
# Numbers of linux/capability.h; a test compares the names with the unit's.
CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}
SBIN = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
PASSING = {"dev", "proc", "run", "sys", "tmp"}  # what is there is gone after a boot


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
    """The first of them that the daemon can run with, else the last that is there: path, tag, prefix."""
    found = None
    for name in candidates:
        path = shutil.which(name)
        tag, _unused, place = (said(path, "-I", "-c", TAG) if path else "").partition(" ")
        if tag.startswith("cp3"):
            found = {"path": path, "tag": tag, "place": place}
            if int(tag[3:]) >= 11:
                break
    return found


def lacking():
    """Those of the unit's capabilities that not even root may have here: names."""
    for line in (text("/proc/self/status") or "").splitlines():
        if line.startswith("CapBnd:"):
            bounding = int(line.split()[1], 16)
            return [name for name, number in CAPABILITIES.items() if not bounding >> number & 1]
    return []


def headers_known(package):
    """Whether the archive has the package; None where nobody is asked for it."""
    if not shutil.which("apt-cache"):
        return None
    return bool(said("apt-cache", "--quiet", "show", package))


def xtables(names):
    """Those that the kernel has not loaded, and of these those that it has not at all; what `iptables` is."""
    unloaded = [name for name in names if not Path("/proc/net", name + "_names").exists()]
    program = shutil.which("modprobe", path=SBIN)
    absent = []
    for name in unloaded if program else []:
        if subprocess.run([program, "--dry-run", "--quiet", name], check=False).returncode:
            absent.append(name)
    version = said(shutil.which("iptables", path=SBIN) or "iptables", "-V") if names else ""
    return {"unloaded": unloaded, "absent": absent, "version": version}


def apparmor():
    """Whether the kernel confines by it, what loads profiles, and what is there of the daemon's."""
    place = Path("/sys/kernel/security/apparmor")
    loads = os.access(place / ".replace", os.W_OK)  # in a container it may be there, and be the host's
    caches = sorted(Path("/var/cache/apparmor").glob("*/sockmid"))
    return {
        "enabled": text("/sys/module/apparmor/parameters/enabled") == "Y" and loads,
        "parser": shutil.which("apparmor_parser", path=SBIN),
        "loaded": any(line.startswith("sockmid (") for line in (text(place / "profiles") or "").splitlines()),
        "files": [str(path) for path in [Path("/etc/apparmor.d/sockmid"), *caches] if path.exists()],
    }


def before(path):
    """What settings were before the installation; None if it has not been done."""
    try:
        return json.loads(text(path) or "null")
    except ValueError as error:
        sys.exit(
            f"{path} is damaged ({error}); it has the kernel settings of before the installation: restore "
            "it, or remove it, and they stay as they are now when SockMi is removed"
        )


def zones(group):
    """Those of firewalld in which a group is: of its interface, or the routes to its address or members."""
    hosts = [re.sub(r"^\[(.+)\](:\d+)?$|^([^:]+):\d+$", r"\1\3", one) for one in group.get("members") or []]
    routes = [said("ip", "-o", "route", "get", one) for one in hosts or [group.get("address") or ADDRESS]]
    devices = [group["interface"]] if group.get("interface") else re.findall(r" dev (\S+)", " ".join(routes))
    found = {said("firewall-cmd", f"--get-zone-of-interface={one}") for one in devices} or {""}
    return sorted(zone or said("firewall-cmd", "--get-default-zone") for zone in found)


def firewalld(groups):
    """The zones of each group, and the role's rules in all, now and after a restart; None: it does not run.

    Without groups also of one that does not run: what it would open.
    """
    running = said("firewall-cmd", "--state") == "running"
    if not running and (groups or not shutil.which("firewall-offline-cmd")):
        return None
    found = {"running": running, "zones": [zones(one) for one in groups]}
    later = ["firewall-cmd", "--permanent"] if running else ["firewall-offline-cmd"]
    for name, words in [("now", ["firewall-cmd"]), ("later", later)]:
        zone, rules = "", []
        for line in said(*words, "--list-all-zones").splitlines():
            if line[:1].strip():
                zone = line.split()[0]
            elif line.strip().startswith(f'rule priority="{FIREWALLD_PRIORITY}" '):
                rules.append({"zone": zone, "rule": line.strip()})
        found[name] = rules
    return found


def ufw():
    """Whether it is there, and in use; the role's rules in it, which outlive that it is not."""
    lines = said("ufw", "show", "added").splitlines()
    return {
        "there": shutil.which("ufw") is not None,
        "enabled": "ENABLED=yes" in (text("/etc/ufw/ufw.conf") or ""),
        "rules": [line[: -len(UFW_MARK)] for line in lines if line.endswith(UFW_MARK)],
    }


def advertised(known):
    """What has the kernel hear router advertisements though it forwards, where a default route came by them.

    It forgets that route, perhaps the way that Ansible has come, when it begins to forward.
    ``known``: settings that the role has changed before.
    """
    devices = set()
    for line in (text("/proc/net/ipv6_route") or "").splitlines():
        fields = line.split()
        flags = int(fields[8], 16)
        if (fields[0], fields[1]) == ("0" * 32, "00") and flags & RTF_ADVERTISED == RTF_ADVERTISED:
            devices.add(fields[9])
    names = {f"net/ipv6/conf/{one}/accept_ra" for one in devices}
    found = {name for name in names if text(setting(name)) == "1"}
    return sorted(found | {name for name in known if name.endswith("/accept_ra") and text(setting(name))})


def switches(names, family):
    """Those of settings by which all of a family is forwarded."""
    return [name for name in names if setting(name) in SWITCHES[family]]


def devices(family, name, value):
    """Whose setting has a value; `all` and `default` are among them."""
    found = Path(f"/proc/sys/net/{family}/conf").glob(f"*/{name}")
    return sorted(path.parent.name for path in found if text(path) == value)


def rewritten(wanted, known):
    """What the kernel will change unasked as the role switches forwarding for the first time: its values."""
    found = {}
    for family, same in SWITCHES.items():
        for switch in switches(wanted, family):
            now = text(setting(switch))
            if known.get(switch, now) == now != str(wanted[switch]):
                paths = list(Path(f"/proc/sys/net/{family}/conf").glob("*/forwarding"))
                paths += [Path("/proc/sys/net/ipv4/conf/all/accept_redirects")] if family == "ipv4" else []
                found.update(
                    {"/".join(path.parts[3:]): text(path) for path in paths if str(path) not in same}
                )
    return {name: value for name, value in found.items() if value is not None}


def guarded(sysctls):
    """The families that forwarded nothing before, or only what came in by some devices: those.

    IPv4 asks each device, IPv6 only where that is forced.
    """
    kept = (re.fullmatch("net/ipv4/conf/([^/]+)/forwarding", name) for name in sysctls)
    by = {
        "ipv4": sorted(one.group(1) for one in kept if one and sysctls[one.group()] == "1"),
        "ipv6": devices("ipv6", "force_forwarding", "1"),
    }
    off = [name for name in by if "0" in [sysctls[one] for one in switches(sysctls, name)]]
    return {name: by[name] for name in off if not {"all", "default"} & set(by[name])}


def restored(known):
    """What was before, for sysctl(8). The switches first: they change others.

    And `accept_ra` behind them, or the routes of router advertisements would go.
    """
    of_all = {name for family in SWITCHES for name in switches(known, family)}
    order = sorted(known, key=lambda name: (name not in of_all, not name.endswith("forwarding"), name))
    return [f"{name}={known[name]}" for name in order if known[name] is not None]


def setting(name):
    """Where the kernel has it; sysctl(8) writes a dot in a name as a slash, or has slashes only."""
    slashes = re.match("[^.]*/", name)
    return "/proc/sys/" + (name if slashes else name.translate(str.maketrans("./", "/.")))


def free_mib(folder):
    """Room where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def place(prefix):
    """A prefix, and whose it is: the system's, SockMi's, or with what else in it."""
    prefix = Path(prefix)
    true = prefix.resolve()
    try:
        names = sorted(path.name for path in true.iterdir())
    except NotADirectoryError:
        names = [true.name]
    except OSError:
        names = []
    return {
        "path": str(prefix),
        "resolved": str(true),
        "there": prefix.exists(),
        "system": str(true) in SYSTEM
        or bool(PASSING & set(true.parts[1:2]))
        or true.parts[1:3] == ("var", "tmp"),
        "own": any(name in OWN for name in names),
        "foreign": [name for name in names if name not in (*OWN, "lost+found")],
    }


def installed():
    """The prefix that the installed unit starts the daemon from; None: there is none."""
    found = re.search(r"^ExecStart=(/.+)/current/bin/sockmid ", text(UNITS / "sockmid.service") or "", re.M)
    return found.group(1) if found else None


def key_files():
    """Key files that the configuration of an earlier run names, but not those of groups joined by hand."""
    config = text("/etc/sockmi/sockmi.yml") or ""
    named = set(re.findall(r"^[ -]*key_file: (/etc/sockmi/[^/\s]+\.key)$", config, re.M))
    joined = text("/var/lib/sockmi/groups.json") or ""
    return sorted(name for name in named if "Managed by Ansible" in config and f'"{name}"' not in joined)


def main_process(unit):
    """Id of a unit's main process, as text; "0" or "": it does not run."""
    return said("systemctl", "show", "--property=MainPID", "--value", unit)


def taken(ports):
    """Those that another than the daemon has at all addresses: {"udp/7780": "named (812)"}."""
    sockets = {}
    for port in ports:
        proto, _unused, number = port.partition("/")
        for table in (proto, proto + "6"):
            for line in (text(f"/proc/net/{table}") or "").splitlines()[1:]:
                fields = line.split()
                address, _unused, local = fields[1].rpartition(":")
                listens = proto == "udp" or fields[3] == "0A"
                if listens and int(local, 16) == int(number) and not address.strip("0"):
                    sockets[f"socket:[{fields[9]}]"] = port
    holders = {}
    for link in Path("/proc").glob("[0-9]*/fd/*") if sockets else ():
        with contextlib.suppress(OSError):  # it has ended
            port = sockets.get(os.readlink(str(link)))  # noqa: PTH115 - Python 3.8
            if port:
                holders.setdefault(port, []).append(link.parts[2])
    own = main_process("sockmid.service")
    named = {port: pids[0] for port, pids in holders.items() if own not in pids}
    return {port: "{} ({})".format(text(f"/proc/{pid}/comm"), pid) for port, pid in named.items()}


def process(unit, prefix):
    """Of a unit's main process: when it was started (since 1970), its release, whether it is confined."""
    pid = main_process(unit)
    try:
        ticks = int(text(f"/proc/{pid}/stat").rpartition(")")[2].split()[19])
        uptime_s = float(text("/proc/uptime").split()[0])
    except (AttributeError, IndexError, ValueError):
        return {"started": None, "release": None, "confined": False}
    # Of its libraries: the kernel names them as they are, without the link.
    maps = text(f"/proc/{pid}/maps") or ""
    mapped = re.search(re.escape(str(prefix.resolve())) + r"/releases/([^/\s]+)/", maps)
    return {
        "started": time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK"),
        "release": mapped.group(1) if mapped else None,
        "confined": (text(f"/proc/{pid}/attr/current") or "").startswith("sockmid "),
    }


def activated(unit):
    """When a unit began to be active, seconds since 1970; None: it has not, or that is not known."""
    since = said("systemctl", "show", "--property=ActiveEnterTimestampMonotonic", "--value", unit)
    return time.time() - time.monotonic() + int(since) / 1e6 if since.strip("0").isdigit() else None


def written(path):
    """When a file was changed, seconds since 1970; None if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def late(unit, file):
    """Whether a file that a unit loads when it is started, or the unit's, has changed since."""
    since = activated(unit)
    return since is not None and since < max(written(Path(file)) or 0, written(UNITS / unit) or 0)


def main():
    """Print it."""
    asked = json.loads(sys.argv[1])
    former = installed()
    prefix = Path((former if asked.get("by_unit") else None) or asked["prefix"])
    found = system()
    family = found["family"]
    known = before(asked["before"])
    kept = (known or {}).get("sysctls", {})
    heard = advertised(kept) if asked.get("forwards_ipv6") else []
    wanted = asked["sysctls"]
    sysctls = {**rewritten(wanted, kept), **{name: text(setting(name)) for name in [*heard, *wanted]}}
    candidates = asked["pythons"].get(family) or ["python3"]
    found.update(
        {
            "interpreter": sys.executable,
            "kernel": os.uname().release,
            "machine": os.uname().machine,
            "root": os.geteuid() == 0,
            "lacking_capabilities": lacking(),
            "systemd": Path("/run/systemd/system").is_dir(),
            "python": python(candidates),
            "packages": packages(family),
            "headers_known": headers_known(asked["headers"].get(family, "") + os.uname().release),
            "place": place(prefix),
            "former_place": place(former) if former else None,
            "release": text(prefix / "current/release"),
            "releases": sorted(path.parent.name for path in prefix.glob("releases/*/complete")),
            "free_mib": free_mib(prefix),
            "advertised": heard,
            "sysctls": sysctls,
            "switches": [name for family in SWITCHES for name in switches(wanted, family)],
            "guarded": guarded({**sysctls, **kept}),
            "restored": restored(kept),
            "ptrace_scope": text("/proc/sys/kernel/yama/ptrace_scope"),
            "mtu": {path.parent.name: int(text(path) or 0) for path in Path("/sys/class/net").glob("*/mtu")},
            "apparmor": apparmor(),
            "xtables": xtables(asked.get("xtables", [])),
            "module_there": Path("/sys/module/sockmi").is_dir() or any(Path("/usr/src").glob("sockmi-*")),
            "module_files": any(Path(name).exists() for name in MODULE_FILES),
            "units": {
                name: {
                    "active": said("systemctl", "is-active", name) == "active",
                    "enabled": said("systemctl", "is-enabled", name) == "enabled",
                    "there": (UNITS / name).exists(),
                    "written": written(UNITS / name),
                    "process": process(name, prefix),
                }
                for name in asked["units"]
            },
            "key_files": key_files(),
            "configured": Path("/etc/sockmi/sockmi.yml").exists(),
            "firewalld": firewalld(asked["groups"]),
            "taken": taken(asked.get("ports", [])),
            "ufw": ufw(),
            "firewall_base": bool(said("nft", "list", "table", "inet", "sockmi_firewall")),
            "firewall_late": late("sockmi-firewall.service", asked["firewall"]),
            "before": known,
        }
    )
    print(json.dumps(found))


main()
