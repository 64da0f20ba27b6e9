# SPDX-License-Identifier: MIT
"""The variables of the role: install.yml predicts what they change, and each reaches what it configures.

Wrong values that are seen without a host: tests/unit/test_role.py.
"""

from __future__ import annotations

import re
import secrets
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.collection import PROJECT
from tests.lab.role_host import RoleHost, wheelhouse

pytest.importorskip("ansible")

pytestmark = pytest.mark.timeout(900)  # some runs of Ansible
KEY, BLUE = secrets.token_hex(32), secrets.token_hex(32)
VARIABLES: dict[str, Any] = {
    "sockmi_group_key": KEY,
    "sockmi_groups": [
        {
            "name": "default",
            "address": "239.1.2.3",
            "port": 7001,
            "interface": "lo",
            "hops": 3,
            "announce_interval_s": 2.5,
        },
        {"name": "blue", "key": BLUE, "port": 7002, "members": ["192.0.2.1", "192.0.2.2:7003"]},
    ],
    "sockmi_host_name": "alias",
    "sockmi_stream_port": 7444,
    "sockmi_redirect_modes": ["nat"],
    "sockmi_settings": {"timing": {"freeze_deadline_s": 2}, "redirect": {"table": "other"}},
    "sockmi_kernel_module": "none",
    "sockmi_prefix": "/opt/elsewhere",
    "sockmi_c_library": True,
    "sockmi_sysctls": {"net.ipv4.ip_forward": 1, "net.ipv4.conf.lo.rp_filter": 2},
    "sockmi_firewall": "nftables",
    "sockmi_firewall_sources": ["192.0.2.0/24", "2001:db8::1"],
    "sockmi_wheelhouse_build": False,
    "sockmi_verify": "never",
    "sockmi_wait_s": 1,
}
# Of the real run, what the check mode says in other words.
PREDICTED = {
    "Predict that they are loaded": "Load them at boot, and now",
    "Predict the start": "Start the daemon, now and at boot",
}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RoleHost]:
    """A host on which nothing of SockMi is."""
    (tmp_path / "host").mkdir()
    with RoleHost(tmp_path / "host") as made:
        yield made


def state(host: RoleHost) -> str:
    """All of the host that the role may change."""
    return host.sh(
        f"find {host.scratch}/upper /run -printf '%p %s %T@ %m\\n' | sort; nft list ruleset;"
        "sysctl net.ipv4.ip_forward net.ipv4.conf.lo.rp_filter; ip -o link | wc -l; ls /sys/module"
    )


def changed_tasks(output: str) -> list[str]:
    """Names of the tasks and handlers that changed something."""
    found = re.split(r"^(?:TASK|RUNNING HANDLER) \[(?:[^]]* : )?([^]]*)\].*$", output, flags=re.MULTILINE)
    return [
        name
        for name, said in zip(found[1::2], found[2::2], strict=True)
        if re.search(r"^changed: ", said, re.M)
    ]


# Of each variable that reaches a file: where, and what is there.
FILES = {
    "/etc/sockmi/default.key": [("group_key", f"^{KEY}$")],
    "/etc/sockmi/blue.key": [("groups", f"^{BLUE}$")],
    "/etc/sockmi/sockmi.yml": [
        ("groups", r"^- address: 239\.1\.2\.3\n  announce_interval_s: 2\.5\n  hops: 3\n  interface: lo$"),
        ("groups", r"^  key_file: /etc/sockmi/default\.key\n  name: default\n  port: 7001$"),
        (
            "groups",
            r"^- key_file: /etc/sockmi/blue\.key\n  members:\n  - 192\.0\.2\.1\n  - 192\.0\.2\.2:7003$",
        ),
        ("host_name", r"^host_name: alias$"),
        ("stream_port", r"^stream:\n  port: 7444$"),
        ("redirect_modes", r"^redirect:\n  modes:\n  - nat\n  table: other$"),
        ("settings", r"^timing:\n  freeze_deadline_s: 2$"),
    ],
    "/etc/systemd/system/sockmid.service": [("prefix", r"^ExecStart=/opt/elsewhere/current/bin/sockmid ")],
    "/etc/sysctl.d/60-sockmi.conf": [
        ("sysctls", r"^net\.ipv4\.ip_forward = 1\nnet\.ipv4\.conf\.lo\.rp_filter = 2$")
    ],
    "/proc/sys/net/ipv4/conf/lo/rp_filter": [("sysctls", r"^2$")],
    "/etc/sockmi/firewall.nft": [
        ("firewall", r"^\tchain input {$"),
        ("groups", r"ipv4 udp dport 7002 "),
        ("stream_port", r"ipv6 tcp dport 7444 "),
        ("firewall_sources", r" ip saddr != { 192\.0\.2\.0/24 } drop$"),
        ("firewall_sources", r" ip6 saddr != { 2001:db8::1 } drop$"),
        ("sysctls", r"ct state untracked accept\n\t\tmeta nfproto ipv4 drop$"),  # it was off
    ],
}
LINKS = {
    "/usr/local/sbin/sockmid": ("prefix", "/opt/elsewhere/current/bin/sockmid"),
    "/usr/local/include/sockmi.h": ("c_library", "/opt/elsewhere/current/include/sockmi.h"),
}


def test_install_predicts_and_then_each_variable_is_where_it_belongs(host: RoleHost, tmp_path: Path) -> None:
    variables = VARIABLES | {"sockmi_wheelhouse": wheelhouse(host, tmp_path / "house")}
    host.sh("mkdir -p /run/systemd/system")  # as where systemd runs; more is not asked of it
    before = state(host)
    words = ["-i", "localhost,", "-c", "local", PROJECT / "install.yml"]
    done = host.play(*words, check=True, sockmi_hosts="localhost", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [word for word in ("Traceback", KEY, BLUE) if word in done.stdout + done.stderr]
    assert state(host) == before
    predicted = [PREDICTED.get(name, name) for name in changed_tasks(done.stdout)]
    release = ["Copy it", "Unpack it into a Python environment of its own", "Use the release"]
    assert [name for name in predicted if name in release] == release  # which is in the wheelhouse
    shown = set(re.findall(r"^[+]+(.*)", done.stdout, re.MULTILINE))

    # The same for real, with a release that is there; but no daemon can be started.
    host.release("/opt/elsewhere", unit=False)
    del variables["sockmi_wheelhouse"], variables["sockmi_wheelhouse_build"]
    done = host.run_tasks("gather", "host", "firewall", "settings", "daemon", **variables)
    assert "sockmid runs, but does not answer" in done.stdout  # within wait_s
    real = [name for name in changed_tasks(done.stdout) if name != "Have the linker know the C library"]
    assert real == [name for name in predicted if name not in release]
    for path, expected in FILES.items():
        content = host.sh(f"cat {path}")
        for variable, pattern in expected:
            assert re.search(pattern, content, re.MULTILINE), (variable, content)
        if not path.startswith("/proc") and not path.endswith(".key"):
            assert set(content.splitlines()) <= shown, path
    for path, (variable, target) in LINKS.items():
        assert host.sh(f"readlink {path}").strip() == target, variable
    said = host.sh(
        "stat -c '%a %U' /etc/sockmi/*.key; /usr/local/sbin/sockmid --config /etc/sockmi/sockmi.yml --check"
    )
    assert said.startswith("600 root\n600 root\n/etc/sockmi/sockmi.yml: good\n")


def test_without_settings_there_is_nothing_to_keep(host: RoleHost) -> None:
    code, output, _changed = host.tasks("gather", "host", "firewall", "settings", sockmi_sysctls={})
    assert code == 0, output
    assert host.sh("ls /etc/sockmi") == "firewall.nft\n"


def test_what_is_null_is_not_given(host: RoleHost) -> None:
    """As where an inventory leaves it to others; and a name may look like a number."""
    host.release("/opt/sockmi", unit=False)
    nothing = dict.fromkeys(["address", "port", "interface", "members", "hops", "announce_interval_s", "key"])
    wanted = {
        "sockmi_group_key": KEY,
        "sockmi_host_name": 42,
        "sockmi_groups": [{"name": "default", **nothing}, {"name": "blue", "interface": "", "port": "7790"}],
    }
    [said] = host.cases([(("preflight",), wanted)])
    assert "sockmi_groups" not in said, said
    code, output, _changed = host.tasks("gather", "host", "firewall", "configure", **wanted)
    assert code == 0, output
    config = yaml.safe_load(host.sh("cat /etc/sockmi/sockmi.yml"))
    assert config["host_name"] == "42"
    assert [{*one} for one in config["groups"]] == [{"name", "key_file"}, {"name", "key_file", "port"}]
    assert host.sh("/opt/sockmi/current/bin/sockmid --config /etc/sockmi/sockmi.yml --check").splitlines()[
        0
    ] == ("/etc/sockmi/sockmi.yml: good")


def test_no_variable_is_left_out() -> None:
    specs = yaml.safe_load((PROJECT / "roles/sockmi/meta/argument_specs.yml").read_text())
    options = {name.removeprefix("sockmi_") for name in specs["argument_specs"]["main"]["options"]}
    reaching = {variable for expected in FILES.values() for variable, _pattern in expected}
    reaching |= {variable for variable, _target in LINKS.values()}
    # By what they make fail, or predicted, or what waits for them; or by a test of its own in test_role.py.
    reaching |= {
        "apparmor",
        "kernel_module",
        "kernel_module_parameters",
        "packages",
        "python",
        "uninstall_force",
    }
    reaching |= {"members_min", "verify", "wait_s", "wheelhouse", "wheelhouse_build"}
    assert options == reaching


DAEMON = """
host_name: {0}
groups: [{{name: default, key_file: /etc/sockmi/default.key, interface: lan}}]
run_dir: /run/{0}
state_dir: /var/lib/{0}
metrics_port: 0
"""


def test_members_min_waits_for_others(host: RoleHost) -> None:
    """In a play with two hosts, of which each has to hear one other; the other is in a namespace beside."""
    host.sh(f"mkdir /etc/sockmi /run/sockmi /run/far; umask 77; echo {KEY} >/etc/sockmi/default.key")
    host.sh("ip netns add far; ip link add lan type veth peer name lan netns far")
    host.sh("ip address add 192.0.2.1/24 dev lan; ip link set lan up")
    host.sh("ip -n far address add 192.0.2.2/24 dev lan; ip -n far link set lan up; ip -n far link set lo up")

    def start(name: str, within: str = "") -> None:
        config = host.scratch.with_name(f"{name}.yml")
        config.write_text(DAEMON.format(name))
        sockmid = Path(sys.executable).with_name("sockmid")
        host.sh(f"setsid -f {within} {sockmid} --config {config} >{config}.log 2>&1 </dev/null")
        host.sh(f"timeout 60 sh -c 'while ! [ -S /run/{name}/control.sock ]; do sleep 0.2; done'")

    def told(*due: tuple[int, int]) -> list[str]:
        values = [{"sockmi_members_min": least, "sockmi_wait_s": wait_s} for least, wait_s in due]
        return host.cases([(("members",), one) for one in values], hosts=["one", "two"])

    start("sockmi")
    alone = told((1, 1), (0, 1))
    assert alone[0].count("sockmid runs, but hears 0 other daemons, not 1") == 2
    assert alone[1] == ""
    start("far", "ip netns exec far")
    assert told((1, 60)) == [""]


INSTALLED = """
Package: {}
Version: 1
Architecture: all
Maintainer: nobody
Description: as if
Status: install ok installed
"""


def test_the_kernel_module_gets_its_parameters(host: RoleHost, tmp_path: Path) -> None:
    """In check mode, with the real dkms: there may be no headers of this machine's kernel."""
    host.unpack("dkms")
    kernel = host.sh("uname -r").strip()
    lacking = [
        name for name in ("dkms", f"linux-headers-{kernel}") if host.run("dpkg", "-s", name).returncode
    ]
    (tmp_path / "status").write_text("".join(map(INSTALLED.format, lacking)))
    host.sh(
        f"mkdir -p /usr/src/kernels/{kernel}; touch /usr/src/kernels/{kernel}/Makefile;"
        f"cat {tmp_path}/status >>/var/lib/dpkg/status"
    )
    with tarfile.open(tmp_path / "sources.tar", "w") as sources:
        for file in [*sorted((PROJECT / "kmod").glob("*.[ch]")), PROJECT / "kmod/dkms.conf"]:
            sources.add(file, file.name)
    known = {"sockmi_wheelhouse": str(tmp_path), "__sockmi_dkms": {"file": "sources.tar"}}
    tasks = ("gather", "kernel_module")
    before = state(host)
    done = host.run_tasks(
        *tasks, check=True, sockmi_kernel_module_parameters={"freeze_max_ms": 2500}, **known
    )
    assert done.returncode == 0, done.stdout
    assert "Build and load it" in changed_tasks(done.stdout)
    shown = set(re.findall(r"^[+] +(.*?),?$", done.stdout, re.MULTILINE))
    assert {'"freeze_max_ms": "2500"', '"loaded": true', '"built": true'} <= shown
    done = host.run_tasks(*tasks, check=True, sockmi_kernel_module="none", **known)
    assert (done.returncode, changed_tasks(done.stdout)) == (0, []), done.stdout
    assert state(host) == before


def test_without_the_kernel_module_it_is_said(host: RoleHost, tmp_path: Path) -> None:
    """It cannot be built: `auto` goes on, and says which engine there is; `required` fails."""
    host.unpack("dkms")
    kernel = host.sh("uname -r").strip()
    lacking = ("dkms", f"linux-headers-{kernel}")
    (tmp_path / "status").write_text("".join(map(INSTALLED.format, lacking)))
    host.sh(
        f"mkdir -p /usr/src/kernels/{kernel}; echo modules: >/usr/src/kernels/{kernel}/Makefile;"
        f"cat {tmp_path}/status >>/var/lib/dpkg/status; mkdir -p /opt/sockmi/dkms"
    )
    (tmp_path / "Makefile").write_text("all modules:\n\tfalse\n")
    with tarfile.open(tmp_path / "sources.tar", "w") as sources:
        sources.add(PROJECT / "kmod/dkms.conf", "dkms.conf")
        sources.add(tmp_path / "Makefile", "Makefile")
    known = {"sockmi_wheelhouse": str(tmp_path), "__sockmi_dkms": {"file": "sources.tar"}}
    code, said, _changed = host.tasks("gather", "kernel_module", **known)
    assert code == 0, said
    assert "no kernel module, so the daemon moves sockets by TCP_REPAIR (engine repair): " in said
    code, said, _changed = host.tasks("gather", "kernel_module", sockmi_kernel_module="required", **known)
    assert code != 0
    assert "no kernel module: " in said


def test_wrong_values_are_named_by_what_reads_them(host: RoleHost, tmp_path: Path) -> None:
    """And nothing is changed."""
    host.release("/opt/sockmi", unit=False)
    host.sh("mkdir -p /run/systemd/system; sed -i 's/^Package: libjansson4$/&-not/' /var/lib/dpkg/status")
    configure = ("gather", "host", "firewall", "configure")
    preflight = ("preflight",)
    cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        (configure, {"settings": {"groop": []}}, "groop: unknown option"),
        (configure, {"settings": {"timing": {"freeze_deadline_s": 60}}}, "timing.freeze_deadline_s:"),
        (configure, {"host_name": "x" * 65}, "host_name:"),
        (configure, {"redirect_modes": []}, "at least one mode"),
        (preflight, {"packages": False, "c_library": True}, "lacks the packages libjansson4, and"),
        (preflight, {"sysctls": {"net.ipv4.none": 1}}, "The kernel has no setting net.ipv4.none;"),
        (preflight, {"groups": [{"name": "x", "interface": "wlan9"}]}, "There is no interface wlan9;"),
        (preflight, {"python": "/opt/none/python9"}, "has no Python 3.11, 3.12 or 3.13"),
        (("gather", "host"), {"verify": "always"}, "the test migration failed, and the release is not"),
        (
            ("gather", "kernel_module"),
            {
                **{"kernel_module": "required", "kernel_module_parameters": {"fast mode": 1}},
                **{"packages": False, "prefix": f"{host.scratch}/copied", "wheelhouse": str(tmp_path)},
            },
            "no kernel module: parameters: fast mode='1' is no parameter",
        ),
        (
            ("gather", "kernel_module"),
            {
                **{"kernel_module": "auto", "kernel_module_parameters": {"fast mode": 1}},
                **{"packages": False, "prefix": f"{host.scratch}/copied", "wheelhouse": str(tmp_path)},
            },
            "",  # the repair engine does without
        ),
        (
            ("gather", "wheelhouse"),
            {"wheelhouse": str(tmp_path), "wheelhouse_build": False},
            f"{tmp_path} on the controller has no bundle for",
        ),
    ]
    (tmp_path / "sources.tar").write_bytes(bytes(1024))
    known = {"sockmi_group_key": KEY, "__sockmi_dkms": {"file": "sources.tar"}}
    before = state(host)
    told = host.cases(
        [
            (tasks, known | {f"sockmi_{name}": value for name, value in wrong.items()})
            for tasks, wrong, _said in cases
        ]
    )
    for (_tasks, wrong, said), answer in zip(cases, told, strict=True):
        assert said in answer, (wrong, answer)
        assert bool(said) == bool(answer), (wrong, answer)
    assert state(host) == before


# Of a host's administrator, with names and numbers as SockMi has them elsewhere.
OTHERS = """
ip link add lan type veth peer name far; ip link set lan up; ip link set far up
ip address add 192.0.2.1/24 dev lan
nft add table inet sockmi; nft add table netdev sockmi
sysctl -q -w net.ipv4.ip_local_reserved_ports=80,40000,40002
ip rule add fwmark 1 iif lan priority 98 table 7780
ip route add 198.51.100.0/24 dev lan table 7780; ip route add 198.51.100.0/24 dev lan
"""
# By the daemon's own code: of the host's configuration, and of another daemon.
SETTING_UP = """
from sockmi.redirect.tables import Settings, Tables
for port, settings in [
    (40001, Settings(table="moved", rule_priority=99)),
    (40003, Settings(table="another", rule_priority=97, route_table=97)),
]:
    tables = Tables(settings)
    tables.setup()
    tables.reserve_ports({40000, port})
"""
REMOVING_ANOTHER = """
from sockmi.redirect.tables import Settings, Tables
Tables(Settings(table="another", rule_priority=97, route_table=97)).teardown()
"""


def network(host: RoleHost) -> str:
    """Tables, rules, routes and reserved ports of a host."""
    return host.sh(
        "nft list ruleset; sysctl net.ipv4.ip_local_reserved_ports;"
        "for v in 4 6; do ip -$v rule; ip -$v route show table all;done | grep -v fe80"
    )


def test_uninstall_does_not_pass_over_redirects_that_it_cannot_remove(host: RoleHost) -> None:
    host.release("/opt/sockmi")
    settings = {"redirect": {"table": "moved", "rule_priority": 99}}
    code, output, _changed = host.tasks(
        "gather", "host", "configure", sockmi_group_key=KEY, sockmi_settings=settings
    )
    assert code == 0, output
    host.sh(f"mv /opt/sockmi/releases {host.scratch}; nft add table inet moved")
    before = state(host)
    code, output, changed = host.tasks("uninstall")
    assert (code, changed) == (2, 0)
    assert "/opt/sockmi has no release that could remove its redirects from the kernel. Nothing" in output
    assert state(host) == before

    # One that is not in use will do, as of an installation that was cut off.
    host.sh(f"cd {host.scratch}; mv releases /opt/sockmi; rm /opt/sockmi/current; cp -r /etc/sockmi .")
    code, output, _changed = host.tasks("uninstall")
    assert code == 0, output
    assert not [one for one in ("moved", "sockmi") if one in host.sh("nft list tables; ls /opt /etc")]

    # Without any it removes by name what the daemon has made, and nothing else.
    host.sh(f"cp -r {host.scratch}/sockmi /etc; {OTHERS}")
    before = network(host)
    done = host.run(sys.executable, "-c", SETTING_UP)
    assert done.returncode == 0, done.stderr
    with_ours = network(host)
    code, output, predicted = host.tasks("uninstall", sockmi_uninstall_force=True, check=True)
    assert (code, network(host)) == (0, with_ours), output
    code, output, changed = host.tasks("uninstall", sockmi_uninstall_force=True)
    assert (code, changed) == (0, predicted), output
    assert "sockmi" not in host.sh("ls /opt /etc")
    assert host.run(sys.executable, "-c", REMOVING_ANOTHER).returncode == 0
    assert network(host) == before
