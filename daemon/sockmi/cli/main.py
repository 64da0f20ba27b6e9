"""`sockmi`: export, import, list, status, history, groups, drain, doctor, key.

Each command is one request to the daemon's control socket; with ``--json`` its answer is printed
as it came (docs/control.md).
"""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from sockmi.cli.output import ProgressBar, print_json, print_table, show_records
from sockmi.client import Control, ImportRequest, SockMiError, import_socket
from sockmi.engine.base import Kind
from sockmi.version import VERSION

OK, NOT_DONE, USAGE, NO_DAEMON, NOTHING = 0, 1, 2, 3, 4

_EPILOG = """\
exit status:
  0  done
  1  the daemon refused, or some socket did not move (why is printed)
  2  wrong arguments
  3  the daemon cannot be reached (not running, or no permission)
  4  nothing to do: no socket matched, or an import timed out
"""
_UNREACHABLE = (errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ECONNRESET)


# -- commands


def _export(options: argparse.Namespace) -> int:
    wanted = {"pid": options.pid, "fd": options.fd}
    request: dict[str, Any] = {"to": options.to, "timeout_s": options.timeout, "dry_run": options.dry_run}
    with Control(options.control) as control:
        records = [
            record
            for answer in control.call("export", sockets=[wanted], **request)
            for record in answer["migrations"]
        ]
    return _show_outcomes(records, options)


def _show_outcomes(records: list[dict[str, Any]], options: argparse.Namespace) -> int:
    if options.json:
        print_json(records)
    else:
        show_records(records)
    if not records:
        return NOTHING
    return OK if all(record["outcome"] in ("moved", "planned") for record in records) else NOT_DONE


def _import(options: argparse.Namespace) -> int:
    request = ImportRequest(
        [Kind(one) for one in options.state],
        local_address=options.local_address,
        local_port=options.local_port,
        remote_address=options.remote_address,
        remote_port=options.remote_port,
    )
    taken = 0
    children: list[subprocess.Popen[bytes]] = []
    while taken < options.count:
        [*arrived] = import_socket(request, options.timeout, control=options.control)
        if not arrived:
            break
        for one in arrived:
            taken += 1
            if options.json:
                print_json({"local": str(one.origin), "remote": str(one.remote), "kind": one.kind})
            if options.exec:
                assert one.socket is not None
                environment = {
                    **os.environ,
                    "SOCKMI_LOCAL": str(one.origin or ""),
                    "SOCKMI_REMOTE": str(one.remote or ""),
                    "SOCKMI_MIGRATION_ID": str(one.record.migration_id),
                }
                # The descriptor is the child's from now on; a blocking one is what programs expect.
                one.socket.setblocking(True)
                children.append(subprocess.Popen(options.exec, stdin=one.fd, stdout=one.fd, env=environment))
                one.socket.close()
    status = [child.wait() for child in children]
    if taken == 0:
        if not options.json:
            print("sockmi: nothing came in time", file=sys.stderr)
        return NOTHING
    return OK if not any(status) else NOT_DONE


def _list(options: argparse.Namespace) -> int:
    rows = _rows(options, options.table)
    if options.json:
        print_json(rows)
    elif options.table == "sockets":
        print_table(
            ("pid", "fd", "process", "state", "local", "remote", "recv-q", "send-q", "verdict"),
            [
                (
                    row["pid"], row["fd"], row["process"], row["state"], row["local"], row["remote"],
                    row["receive_queue_bytes"], row["send_queue_bytes"],
                    "movable" if row["movable"] else row["refusal"]["code"],
                )
                for row in rows
            ],
        )  # fmt: skip
    elif options.table == "imports":
        print_table(
            ("kind", "state", "local", "remote", "from", "since", "bytes"),
            [
                (
                    row["kind"], row["state"], row["origin"], row["remote"], row["from"],
                    row["waiting_since"], row["image_bytes"],
                )
                for row in rows
            ],
        )  # fmt: skip
    else:
        print_table(
            ("direction", "mode", "local", "remote", "other", "hop"),
            [
                (row["direction"], row["mode"], row["local"], row["remote"], row["other"], row["hop"])
                for row in rows
            ],
        )
    return OK if rows else NOTHING


def _rows(options: argparse.Namespace, table: str) -> list[dict[str, Any]]:
    wanted = _filter(options) if table == "sockets" else {}
    with Control(options.control) as control:
        return [row for answer in control.call("list", table=table, filter=wanted) for row in answer[table]]


def _filter(options: argparse.Namespace) -> dict[str, Any]:
    names = (
        "pid", "process", "unit", "kinds", "states",
        "local_address", "local_port", "remote_address", "remote_port",
    )  # fmt: skip
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def _status(options: argparse.Namespace) -> int:
    with Control(options.control) as control:
        [answer] = control.call("status")
    if options.json:
        print_json(answer)
        return OK
    lists = answer["import_lists"]
    print(f"host       {answer['host']} ({answer['host_id']})")
    up = f"up {answer['uptime_s']:.0f} s, engine {answer['engine']}"
    print(f"daemon     {answer['version']}, pid {answer['pid']}, {up}")
    counts = f"{answer['redirects_out']} lead away, {answer['redirects_in']} came"
    print(f"redirects  {', '.join(answer['modes'])}; {counts}")
    print(f"groups     {', '.join(answer['groups']) or 'none'}")
    for kind, one in lists.items():
        print(f"{kind:<10} {one['length']} of {one['maximum']} listed, {one['waiting']} applications wait")
    outcomes = ", ".join(f"{count} {name}" for name, count in answer["outcomes"].items()) or "none yet"
    print(f"migrations {answer['migrations_under_way']} under way; since the start: {outcomes}")
    return OK


def _history(options: argparse.Namespace) -> int:
    with Control(options.control) as control:
        records = [
            record
            for answer in control.call("history", limit=options.limit, outcomes=options.outcome)
            for record in answer["migrations"]
        ]
    if options.json:
        print_json(records)
    else:
        show_records(records)
    return OK if records else NOTHING


def _groups(options: argparse.Namespace) -> int:
    request: dict[str, Any] = {"action": options.action}
    if options.action != "list":
        request["name"] = options.name
    if options.action == "join":
        request |= {
            "key_file": options.key_file,
            "address": options.address,
            "port": options.port,
            "interface": options.interface,
            "peers": options.peer,
        }
    with Control(options.control) as control:
        [answer] = control.call("groups", **request)
    if options.json:
        print_json(answer)
        return OK
    for group in answer["groups"]:
        where = group["address"] or ", ".join(group["peers"])
        note = "" if group["configured"] else " (until restart)"
        print(f"{group['name']}: {where} port {group['port']}{note}")
        print_table(
            ("host", "address", "heard s ago", "stream"),
            [
                (
                    member["host"],
                    member["address"],
                    None if member["last_heard_s"] is None else round(member["last_heard_s"], 1),
                    "open" if member["connected"] else None,
                )
                for member in group["members"]
            ],
        )
    return OK


def _drain(options: argparse.Namespace) -> int:
    request: dict[str, Any] = {"filter": _filter(options), "to": options.to, "dry_run": options.dry_run}
    request |= {"rate_per_s": options.rate} if options.rate else {}
    request |= {"timeout_s": options.timeout} if options.timeout else {}
    bar = ProgressBar()
    records: list[dict[str, Any]] = []
    progress: dict[str, Any] = {"selected": 0}
    with Control(options.control) as control:
        for answer in control.call("drain", **request):
            progress = answer["progress"]
            records += answer["migrations"]
            bar.show(progress)
    bar.end()
    if options.json:
        print_json({"progress": progress, "migrations": records})
    else:
        show_records([record for record in records if record["outcome"] not in ("moved", "planned")])
        done = "could be moved" if options.dry_run else "moved"
        count = progress["planned"] if options.dry_run else progress["moved"]
        print(f"{count} of {progress['selected']} {done} in {progress['elapsed_s']:.2f} s")
    if not progress["selected"]:
        return NOTHING
    return OK if progress["moved"] + progress["planned"] == progress["selected"] else NOT_DONE


def _doctor(options: argparse.Namespace) -> int:
    with Control(options.control) as control:
        [answer] = control.call("doctor")
    if options.json:
        print_json(answer)
    else:
        for check in answer["checks"]:
            print(f"{check['status']:<8} {check['name']}: {check['message']}")
            if check["mend"]:
                print(f"{'':<8} -> {check['mend']}")
    return OK if answer["healthy"] else NOT_DONE


def _reload(options: argparse.Namespace) -> int:
    with Control(options.control) as control:
        [answer] = control.call("reload")
    if options.json:
        print_json(answer)
    else:
        print(f"changed: {', '.join(answer['changed']) or 'nothing'}")
        if answer["restart_needed"]:
            print(f"needs a restart: {', '.join(answer['restart_needed'])}")
    return OK


def _key(options: argparse.Namespace) -> int:
    from sockmi.transport.keyring import KeyFileError, generate

    try:
        generate(options.file)
    except KeyFileError as error:
        print(f"sockmi: {error}", file=sys.stderr)
        return NOT_DONE
    print(f"{options.file}: a new group key; copy it to every host of the group, readable by root alone")
    return OK


# -- arguments


def _number(least: float, most: float, unit: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {unit} from {least:g} to {most:g}")
        return value

    return read


def _whole(least: int, most: int, what: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} ({least} to {most})")
        return int(text)

    return read


def _address(text: str) -> str:
    try:
        ip_network(text, strict=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no address or network: {error}") from None
    return text


_PORT = _whole(1, 65535, "a port")
_SECONDS = _number(0.001, 86400, "seconds")


def _selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which sockets (all that is given must match)")
    group.add_argument("--pid", type=_whole(1, 2**22, "a process id"))
    group.add_argument("--process", metavar="PATTERN", help="process name, as in the shell: 'nginx*'")
    group.add_argument("--unit", metavar="PATTERN", help="systemd unit: nginx.service")
    group.add_argument("--kind", dest="kinds", action="append", choices=[kind.value for kind in Kind])
    group.add_argument(
        "--state", dest="states", action="append", metavar="STATE", help="ESTABLISHED, CLOSE-WAIT, ..."
    )
    _addresses(group)


def _addresses(group: Any) -> None:
    group.add_argument("--local-address", type=_address, metavar="ADDRESS")
    group.add_argument("--local-port", "--port", type=_PORT, metavar="PORT")
    group.add_argument("--remote-address", type=_address, metavar="ADDRESS")
    group.add_argument("--remote-port", type=_PORT, metavar="PORT")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON (docs/control.md)")
    common.add_argument(
        "--control",
        metavar="PATH",
        help="control socket (default: $SOCKMI_CONTROL or /run/sockmi/control.sock)",
    )
    parser = argparse.ArgumentParser(
        prog="sockmi",
        description="Moves live TCP connections between hosts while the other end notices nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sockmi {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, parents=[common], help=text, description=text)
        one.set_defaults(run=run)
        return one

    export = command("export", _export, "move one socket of a process to another host")
    export.add_argument("--pid", type=_whole(1, 2**22, "a process id"), required=True)
    export.add_argument("--fd", type=_whole(0, 2**30, "a descriptor"), required=True)
    export.add_argument("--to", metavar="HOST", help="name, id or address; default: any host of the group")
    export.add_argument("--timeout", type=_SECONDS, default=30.0, metavar="SECONDS")
    export.add_argument("--dry-run", action="store_true", help="only say whether it could be moved")

    take = command("import", _import, "take sockets that come to this host")
    take.add_argument("--state", action="append", choices=[kind.value for kind in Kind], default=None)
    take.add_argument("--count", type=_whole(1, 10**6, "a count"), default=1, help="how many (default 1)")
    take.add_argument(
        "--timeout",
        type=_number(0, 86400, "seconds"),
        default=None,
        metavar="SECONDS",
        help="default: wait for ever",
    )
    take.add_argument(
        "--exec",
        nargs=argparse.REMAINDER,
        metavar="CMD",
        help="start CMD with the socket as its standard input and output",
    )
    _addresses(take)

    listing = command("list", _list, "sockets that could be moved, that wait to be imported, or redirects")
    listing.add_argument("table", nargs="?", choices=("sockets", "imports", "redirects"), default="sockets")
    _selection(listing)

    command("status", _status, "the daemon at a glance")

    history = command("history", _history, "migrations that have ended, latest first")
    history.add_argument("--limit", type=_whole(1, 10**6, "a count"), default=20)
    history.add_argument(
        "--outcome", action="append", choices=("moved", "refused", "aborted", "failed", "planned")
    )

    groups = command("groups", _groups, "groups of daemons and their members")
    groups.add_argument("action", nargs="?", choices=("list", "join", "leave"), default="list")
    groups.add_argument("name", nargs="?")
    groups.add_argument("--address", type=_address, help="multicast address")
    groups.add_argument(
        "--peer", action="append", metavar="ADDRESS:PORT", help="a member, for networks without multicast"
    )
    groups.add_argument("--port", type=_PORT)
    groups.add_argument("--interface")
    groups.add_argument("--key-file")

    drain = command("drain", _drain, "move all sockets that match")
    _selection(drain)
    drain.add_argument("--to", metavar="HOST", help="name, id or address; default: any host of the group")
    drain.add_argument("--rate", type=_number(0.1, 10**6, "sockets a second"), metavar="PER_SECOND")
    drain.add_argument("--timeout", type=_SECONDS, metavar="SECONDS")
    drain.add_argument("--dry-run", action="store_true", help="only say what could be moved")

    command("doctor", _doctor, "what would make a migration fail here, and its mend")
    command("reload", _reload, "have the daemon read its configuration again")
    key = command("key", _key, "make a group key")
    key.add_argument("file", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "import" and options.state is None:
        options.state = [kind.value for kind in Kind]
    if options.command == "import" and options.exec == []:
        parser.error("--exec needs a command")
    if options.command == "groups" and options.action != "list" and not options.name:
        parser.error(f"groups {options.action} needs the group's name")
    if options.command == "groups" and options.action == "join" and not options.key_file:
        parser.error("groups join needs --key-file")
    try:
        status: int = options.run(options)
    except SockMiError as error:
        if options.json:
            print_json({"ok": False, "error": {"code": error.code, "message": error.strerror}})
        print(f"sockmi: {error.code + ': ' if error.code else ''}{error.strerror}", file=sys.stderr)
        return NO_DAEMON if not error.code and error.errno in _UNREACHABLE else NOT_DONE
    except BrokenPipeError:
        return OK
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
