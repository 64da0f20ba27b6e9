# SPDX-License-Identifier: MIT
"""``python3 -m lab``: make, remove and look at labs and their daemons, and run commands on their hosts.

Exit codes: 0 done (also if nothing was to do); 1 it failed, the reason is on standard error;
2 wrong usage; ``exec`` ends with the command's own code. ``status`` is 3 if the lab is not up,
``daemons status`` if one of the daemons is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from lab import labs, namespaces, record, standing
from lab.plan import HOSTS, LabError, checked_name, namespaces_of

NOT_UP = 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m lab", description="Labs of network namespaces; needs root.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="up|down|status|daemons|exec")
    up = commands.add_parser("up", help="make a lab that stays until it is taken down")
    down = commands.add_parser("down", help="end everything in a lab and remove it")
    status = commands.add_parser("status", help="show a lab, its addresses and processes")
    daemons = commands.add_parser("daemons", help="start, stop and look at the daemons on a lab's hosts")
    daemons.add_argument("action", choices=("up", "down", "status"))
    daemons.add_argument(
        "--hosts", default="a,b,c", metavar="NAMES", help="on which hosts (default: a,b,c; possible too: d)"
    )
    for command in (up, down, status, daemons):
        command.add_argument("--lab", default="demo", metavar="NAME", help="name of the lab (default: demo)")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    for command in (up, down, daemons):
        command.add_argument("--check", action="store_true", help="only say whether there is something to do")
    execute = commands.add_parser("exec", help="run a command on a host: exec HOST -- COMMAND ...")
    execute.add_argument("--lab", default="demo", metavar="NAME", help="name of the lab (default: demo)")
    execute.add_argument("host", metavar="HOST", help=", ".join(HOSTS))
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command")
    return parser


def _change(arguments: argparse.Namespace) -> int:
    lab = labs.Lab(arguments.lab, persistent=True)
    if arguments.check:
        found = record.read(lab.name)
        up = found is not None and found.alive and not lab.missing()
        changed = not up if arguments.command == "up" else found is not None
    else:
        changed = lab.up() if arguments.command == "up" else lab.down()
    if arguments.json:
        print(json.dumps({"lab": lab.name, "state": arguments.command, "changed": changed}))
    else:
        done = {"up": "is up", "down": "is down"}[arguments.command]
        would = "would be changed" if arguments.check else done
        print(f"lab {lab.name} {would if changed else done + ' already'}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    lab = labs.Lab(arguments.lab)
    found = record.read(lab.name)
    up = found is not None and found.alive and not lab.missing()
    names = namespaces_of(lab.name)
    processes = namespaces.processes_in(names)
    hosts: list[dict[str, Any]] = [
        {
            "host": host.name,
            "namespace": host.namespace,
            "address4": str(host.address4),
            "address6": str(host.address6),
            "processes": sorted(processes.get(names.index(host.namespace), [])),
        }
        for host in lab.hosts.values()
    ]
    if arguments.json:
        print(json.dumps({"lab": lab.name, "up": up, "missing": lab.missing(), "hosts": hosts}))
    elif not up:
        why = "is not complete" if found else "is not up"
        print(f"lab {lab.name} {why}; make it: python3 -m lab up --lab {lab.name}")
    else:
        print(f"lab {lab.name} is up")
        for host in hosts:
            count = len(host["processes"])
            print(f"  {host['host']:7}{host['address4']:13}{host['address6']:13}{count:3} processes")
    return 0 if up else NOT_UP


def _daemons(arguments: argparse.Namespace) -> int:
    lab = labs.Lab(arguments.lab, persistent=True)
    hosts = standing.chosen_hosts(lab, arguments.hosts)
    if arguments.action == "status":
        rows = standing.status(lab, hosts)
    else:
        change = standing.up if arguments.action == "up" else standing.down
        rows = change(lab, hosts, check=arguments.check)
    changed = any(row["changed"] for row in rows)
    if arguments.json:
        print(json.dumps({"lab": lab.name, "action": arguments.action, "changed": changed, "hosts": rows}))
    else:
        for row in rows:
            state = f"runs (pid {row['pid']})" if row["pid"] else "does not run"
            note = ", would be changed" if row["changed"] and arguments.check else ""
            print(f"daemon on {row['host']} {state}{note}")
    return NOT_UP if arguments.action == "status" and not all(row["pid"] for row in rows) else 0


def _exec(arguments: argparse.Namespace) -> int:
    host = labs.Lab(checked_name(arguments.lab)).host(arguments.host)
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words:
        raise LabError(f"say which command: python3 -m lab exec {host.name} -- COMMAND")
    with host.entered():
        try:
            os.execvpe(words[0], words, host.environment)  # noqa: S606 - this is what the command is for
        except OSError as error:
            raise LabError(f"cannot run {words[0]}: {error.strerror}") from None


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = _parser().parse_args(words)
    try:
        checked_name(arguments.lab)
        actions = {
            "up": _change,
            "down": _change,
            "status": _status,
            "daemons": _daemons,
            "exec": _exec,
        }
        return actions[arguments.command](arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
    except PermissionError as error:
        print(f"lab: {error.filename or 'the kernel'}: permission denied; run it as root", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
