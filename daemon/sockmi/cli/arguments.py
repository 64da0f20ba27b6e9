# SPDX-License-Identifier: MIT
"""The arguments of `sockmi`: what it accepts, and what is wrong with the rest."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable
from datetime import datetime
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

from sockmi.addresses import Endpoint
from sockmi.engine.base import Kind
from sockmi.version import VERSION

EPILOG = """\
exit status:
  0  done
  1  the daemon refused, or some socket did not move (why is printed)
  2  wrong arguments
  3  the daemon cannot be reached (not running, no permission, no answer)
  4  nothing to do: nothing matched, or an import timed out

More in sockmi(1).
"""
KINDS = tuple(kind.value for kind in Kind)
OUTCOMES = ("moved", "refused", "aborted", "failed", "planned")
STATES = (
    "ESTABLISHED", "SYN-SENT", "SYN-RECEIVED", "FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT",
    "CLOSED", "CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING",
)  # fmt: skip
_SELECTING = (
    "pid", "fd", "process", "unit", "kinds", "states",
    "local_address", "local_port", "remote_address", "remote_port", "idle_s",
)  # fmt: skip
_FD_ALONE = "--fd needs --pid: the same number is another socket in another process"
COUNT_MAX = 10**6


def selection(options: argparse.Namespace) -> dict[str, Any]:
    """The filter of docs/control.md that the options name."""
    return {name: value for name in _SELECTING if (value := getattr(options, name, None)) is not None}


def _number(least: float, most: float, unit: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {unit} from {least:g} to {most:g}")
        return value

    return read


def _whole(least: int, most: int, what: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} ({least} to {most})")
        return int(text)

    return read


def _network(text: str) -> str:
    try:
        ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no address and no network (ADDRESS/BITS)") from None
    return text


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no IP address") from None


def _multicast(text: str) -> str:
    if not ip_address(_address(text)).is_multicast:
        raise argparse.ArgumentTypeError(
            f"{text} is not multicast; choose one of 239.0.0.0/8 or ff05::/16, or use --peer"
        )
    return text


def _endpoint(text: str) -> str:
    try:
        endpoint = Endpoint.parse(text)
    except ValueError:
        endpoint = None
    if endpoint is None or not endpoint.port:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT (of IPv6: [ADDRESS]:PORT)")
    return str(endpoint)


def _state(text: str) -> str:
    state = text.upper().replace("_", "-")
    if state not in STATES:
        raise argparse.ArgumentTypeError(f"{text!r} is no TCP state; choose among {', '.join(STATES)}")
    return state


def _time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).astimezone().isoformat()
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write 2026-11-23, 2026-11-23T12:00 or 2026-11-23T12:00:00+01:00"
        ) from None


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no id; `sockmi list imports` has them") from None


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read: {error}") from None


def _name(text: str) -> str:
    if not 1 <= len(text) <= 255:
        raise argparse.ArgumentTypeError("it must have 1 to 255 characters")
    return text


_PORT = _whole(1, 65535, "a port")
_PID = _whole(1, 2**22, "a process id")
_FD = _whole(0, 2**30, "a descriptor")
_SECONDS = _number(0.001, 86400, "seconds")


class _Once(argparse.Action):
    """An option that has one value: given twice, nobody knows which was meant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        value: Any,
        name: str | None = None,
    ) -> None:
        if name is not None and self.dest in (given := vars(options).setdefault("given", set())):
            raise argparse.ArgumentError(self, "given twice")
        if name is not None:
            given.add(self.dest)
        setattr(options, self.dest, value)


class _Parser(argparse.ArgumentParser):
    """Abbreviations of options are refused: a script must not change its meaning with a release."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry `{self.prog} --help`.\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    # Behind the command they have no default: it would undo what was said before the command.
    common = _common(json=argparse.SUPPRESS, control=argparse.SUPPRESS)
    parser = _Parser(
        prog="sockmi",
        parents=[_common(json=False, control=None)],
        description="Moves live TCP connections between hosts while the other end notices nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sockmi {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[common], help=text, description=text)

    _export(command("export", "move one socket of a process to another host"))
    _import(command("import", "take a socket that comes to this host"))
    _list(command("list", "sockets that could be moved, that wait to be imported, or redirects"))
    command("status", "the daemon at a glance")
    _history(command("history", "migrations that have ended, latest first"))
    _groups(command("groups", "groups of daemons and their members"))
    _drain(command("drain", "move all sockets that match"))
    command("doctor", "what would make a migration fail here, and its mend")
    reload = command("reload", "have the daemon read its configuration and keys again")
    reload.add_argument(
        "--check",
        type=_text_of,
        metavar="FILE",
        help="do nothing; say what would change if FILE were the configuration",
    )
    key = command("key", "make a group key")
    key.add_argument("file", type=Path, help="the new file; it must not exist")
    return parser


def _common(json: Any, control: Any) -> _Parser:
    """The options of every command, which may stand before it and behind it."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--json", action="store_true", default=json, help="print JSON (fields: docs/control.md)"
    )
    common.add_argument(
        "--control",
        type=_name,
        default=control,
        metavar="PATH",
        help="control socket (default: $SOCKMI_CONTROL or /run/sockmi/control.sock)",
    )
    return common


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pid", type=_PID, help="the process that holds the socket")
    parser.add_argument("--fd", type=_FD, help="its descriptor")
    parser.add_argument(
        "--listed", type=_uuid, metavar="ID", help="instead: what waits in an import list (list imports)"
    )
    _moving(parser)


def _moving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", type=_name, metavar="HOST", help="name, id or address; default: any host of the group"
    )
    parser.add_argument(
        "--timeout", type=_SECONDS, metavar="SECONDS", help="refuse what has found no importer by then"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say whether it could be moved")


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", dest="kinds", action="append", choices=KINDS, help="may be repeated; default: connected"
    )
    parser.add_argument(
        "--count", type=_whole(1, COUNT_MAX, "a count"), default=1, help="how many (default 1; needs --exec)"
    )
    parser.add_argument(
        "--timeout",
        type=_number(0, 86400, "seconds"),
        metavar="SECONDS",
        help="for all of them; default: wait for ever",
    )
    parser.add_argument(
        "--exec",
        nargs=argparse.REMAINDER,
        metavar="CMD",
        help="the last option: start CMD for each socket, as its standard input and output; "
        "without it, the connection is joined to the standard input and output of sockmi itself",
    )
    _ends(parser, _address, "ADDRESS")


def _ends(group: Any, address: Callable[[str], str], form: str) -> None:
    group.add_argument("--local-address", type=address, metavar=form, help="of this host's end")
    group.add_argument("--local-port", "--port", type=_PORT, metavar="PORT", help="of this host's end")
    group.add_argument("--remote-address", type=address, metavar=form, help="of the peer")
    group.add_argument("--remote-port", type=_PORT, metavar="PORT", help="of the peer")


def _select(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which sockets (all that is given must match)")
    group.add_argument("--pid", type=_PID, help="of this process")
    group.add_argument("--fd", type=_FD, help="with this descriptor")
    group.add_argument(
        "--process", type=_name, metavar="PATTERN", help="process name, as in the shell: 'ng*'"
    )
    group.add_argument("--unit", type=_name, metavar="PATTERN", help="systemd unit: nginx.service")
    group.add_argument("--kind", dest="kinds", action="append", choices=KINDS, help="may be repeated")
    group.add_argument(
        "--state",
        dest="states",
        action="append",
        type=_state,
        help="ESTABLISHED, CLOSE-WAIT ...; may be repeated",
    )
    _ends(group, _network, "ADDRESS[/BITS]")
    group.add_argument(
        "--idle-s",
        type=_number(0, 1e9, "seconds"),
        metavar="SECONDS",
        help="connections that have been quiet for so long: nothing queued, the last request answered",
    )


def _list(parser: argparse.ArgumentParser) -> None:
    tables = ("sockets", "imports", "redirects")
    parser.add_argument("table", nargs="?", choices=tables, default="sockets", help="default: sockets")
    _select(parser)


def _history(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=_whole(1, COUNT_MAX, "a count"), default=20, help="at most so many (default 20)"
    )
    parser.add_argument(
        "--outcome", dest="outcomes", action="append", choices=OUTCOMES, help="may be repeated"
    )
    parser.add_argument("--direction", choices=("export", "import"), help="which side this host was")
    parser.add_argument("--host", type=_name, help="the other host's name")
    parser.add_argument("--since", type=_time, metavar="TIME", help="begun then or later (ISO 8601)")
    parser.add_argument("--until", type=_time, metavar="TIME", help="begun before")


def _groups(parser: argparse.ArgumentParser) -> None:
    actions = ("list", "join", "leave", "forget")
    parser.add_argument("action", nargs="?", choices=actions, default="list", help="default: list")
    parser.add_argument(
        "name", nargs="?", type=_name, help="of the group; forget: the id of a host that is gone"
    )
    parser.add_argument("--address", type=_multicast, help="join: the group's multicast address")
    parser.add_argument(
        "--peer",
        dest="peers",
        action="append",
        type=_endpoint,
        metavar="ADDRESS:PORT",
        help="join: a member, for networks without multicast; may be repeated",
    )
    parser.add_argument("--port", type=_PORT, help="join: the group's UDP port (default 7780)")
    parser.add_argument("--interface", type=_name, help="join: where the group is")
    parser.add_argument(
        "--key-file", type=_name, metavar="FILE", help="join: the group's key, on the daemon's host"
    )
    parser.add_argument(
        "--force", action="store_true", help="leave: though it stands in the daemon's configuration"
    )


def _drain(parser: argparse.ArgumentParser) -> None:
    _select(parser)
    parser.add_argument(
        "--all", action="store_true", help="every socket of this host, if nothing else is given"
    )
    _moving(parser)
    parser.add_argument(
        "--rate", type=_number(0.1, 10**6, "sockets a second"), metavar="PER_SECOND", help="at most so fast"
    )


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What single options cannot know; ends the program with status 2 if they do not go together."""
    checked = _CHECKS.get(options.command)
    if checked is not None and (complaint := checked(options)):
        parser.exit(2, f"sockmi {options.command}: {complaint}\nTry `sockmi {options.command} --help`.\n")


def _check_export(options: argparse.Namespace) -> str | None:
    named = options.pid is not None, options.fd is not None
    if options.listed is not None and any(named):
        return "--listed names a socket that no process has; leave out --pid and --fd"
    if options.listed is None and not all(named):
        return "say which socket: --pid and --fd, or --listed"
    return None


def _check_import(options: argparse.Namespace) -> str | None:
    options.kinds = options.kinds or ["connected"]
    if (options.remote_address or options.remote_port) and "connected" not in options.kinds:
        return "only connected sockets have a remote end; add --kind connected"
    if options.exec is None:
        if options.count > 1:
            return "--count needs --exec: this terminal can be joined to one connection only"
        if options.kinds != ["connected"]:
            return "without --exec only connected sockets can be taken"
        return None
    if not options.exec:
        return "--exec needs a command"
    if shutil.which(options.exec[0]) is None:
        # Now, while nothing has been taken: a connection without a program would be lost.
        return f"--exec: {options.exec[0]!r} is no program that can be run"
    return None


def _check_list(options: argparse.Namespace) -> str | None:
    if options.fd is not None and options.pid is None:
        return _FD_ALONE
    if options.table == "redirects" and selection(options):
        return "filters are for `list sockets` and `list imports`, not for redirects"
    return None


def _check_history(options: argparse.Namespace) -> str | None:
    if (
        options.since
        and options.until
        and datetime.fromisoformat(options.since) >= datetime.fromisoformat(options.until)
    ):
        return "--since is not before --until"
    return None


def _check_drain(options: argparse.Namespace) -> str | None:
    if not selection(options) and not options.all:
        return "say which sockets (--unit, --process, --pid, --port ...), or --all"
    if options.fd is not None and options.pid is None:
        return _FD_ALONE
    if selection(options) and options.all:
        return "--all and a selection contradict each other"
    return None


def _check_groups(options: argparse.Namespace) -> str | None:
    joining = {
        name: value
        for name in ("address", "peers", "port", "interface", "key_file")
        if (value := getattr(options, name)) is not None
    }
    if options.action != "join" and joining:
        return f"--{next(iter(joining)).rstrip('s').replace('_', '-')} is for `groups join`"
    if options.action != "leave" and options.force:
        return "--force is for `groups leave`"
    if options.action == "list":
        return "`groups list` takes no name" if options.name else None
    if not options.name:
        wanted = "host's id" if options.action == "forget" else "group's name"
        return f"{options.action} needs the {wanted}"
    if options.action == "forget":
        try:
            options.name = str(UUID(options.name))
        except ValueError:
            return f"{options.name!r} is no id of a host; `sockmi groups` has those that something waits for"
    if options.action == "join":
        if not options.key_file:
            return "join needs --key-file"
        if (options.address is None) == (options.peers is None):
            return "join needs either --address (multicast) or --peer"
        options.key_file = str(Path(options.key_file).absolute())
    return None


_CHECKS: dict[str, Callable[[argparse.Namespace], str | None]] = {
    "export": _check_export,
    "import": _check_import,
    "list": _check_list,
    "history": _check_history,
    "drain": _check_drain,
    "groups": _check_groups,
}
