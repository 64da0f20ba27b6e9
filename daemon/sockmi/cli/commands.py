# SPDX-License-Identifier: MIT
"""What each command of `sockmi` does: a request to the daemon, its answer shown, an exit status.

With ``--json`` the answer is printed in the fields of docs/control.md: lists as arrays of rows or
migration records, everything else as the response itself.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID, uuid4

from sockmi.cli.arguments import selection
from sockmi.cli.output import (
    ProgressBar,
    local_time,
    nobody_reads,
    print_json,
    print_json_line,
    print_table,
    show_records,
)
from sockmi.cli.relay import relay
from sockmi.client import Control, Export, Imported, ImportRequest, SockMiError
from sockmi.client.control import learn_outcomes
from sockmi.client.errors import Unanswered
from sockmi.client.exports import ask, migrations
from sockmi.client.imports import importing
from sockmi.client.link import Link

OK, NOT_DONE, USAGE, NO_DAEMON, NOTHING = 0, 1, 2, 3, 4

_EXPORT_TIMEOUT_S = 30.0


class Unreachable(Exception):
    """The daemon cannot be asked; ``error`` says why."""

    def __init__(self, error: SockMiError) -> None:
        super().__init__(error.strerror)
        self.error = error


@contextlib.contextmanager
def _daemon(options: argparse.Namespace) -> Iterator[Control]:
    try:
        control = Control(options.control)
    except SockMiError as error:
        raise Unreachable(error) from None
    with control:
        try:
            yield control
        except SockMiError as error:
            if not error.code and error.errno in (errno.ECONNRESET, errno.ETIMEDOUT):
                raise Unreachable(error) from None
            raise


def _one(options: argparse.Namespace, op: str, **fields: Any) -> dict[str, Any]:
    with _daemon(options) as control:
        [answer] = control.call(op, **fields)
    return answer


def _outcomes(records: list[dict[str, Any]], options: argparse.Namespace) -> int:
    if options.json:
        print_json(records)
    else:
        show_records(records)
    if not records:
        return NOTHING
    return OK if all(record["outcome"] in ("moved", "planned") for record in records) else NOT_DONE


# -- moving


async def _exporting(link: Link, options: argparse.Namespace, migration: UUID) -> list[dict[str, Any]]:
    link.allow(options.timeout or _EXPORT_TIMEOUT_S)
    one = Export(options.listed or options.fd, options.pid, migration_id=migration)
    await ask(link, [one], options.to, timeout_s=options.timeout, dry_run=options.dry_run)
    return await migrations(link)


def export(options: argparse.Namespace) -> int:
    """``sockmi export``."""
    migration = uuid4()
    try:
        with _daemon(options) as control:
            records = control.run(lambda link: _exporting(link, options, migration))
    except Unreachable as unreachable:
        if options.dry_run or not isinstance(unreachable.error, Unanswered):
            raise
        try:
            records = learn_outcomes([migration], options.control, unreachable.error)
        except SockMiError as error:
            raise Unreachable(error) from None
    return _outcomes(records, options)


def import_(options: argparse.Namespace) -> int:
    """``sockmi import``."""
    request = ImportRequest(
        options.kinds,
        local_address=options.local_address,
        local_port=options.local_port,
        remote_address=options.remote_address,
        remote_port=options.remote_port,
    )
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    children: list[subprocess.Popen[bytes]] = []
    failures = taken = 0
    while taken < options.count:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        with _daemon(options) as control:
            arrived = control.run(lambda link: importing(link, [request], left))  # noqa: B023
        if not arrived:
            break
        taken += 1
        if options.exec is None:
            return _join(arrived[0], options)
        try:
            children.append(_start(arrived[0], options.exec))
            _report(arrived[0], options, sys.stdout)
        except OSError as error:
            print(f"sockmi: {options.exec[0]}: {error.strerror}; the socket is closed", file=sys.stderr)
            failures += 1
        failures += sum(child.returncode != 0 for child in children if child.poll() is not None)
        children = [child for child in children if child.returncode is None]
    failures += sum(child.wait() != 0 for child in children)
    if taken < options.count and not options.json:
        print(f"sockmi: {taken or 'nothing'} came in time", file=sys.stderr)
    if failures:
        print(f"sockmi: {failures} of {taken} commands failed", file=sys.stderr)
        return NOT_DONE
    return OK if taken == options.count else NOTHING


def _report(one: Imported, options: argparse.Namespace, file: TextIO) -> None:
    """Whether or not anybody reads it, and whatever is behind ``file``: the connection goes on."""
    record = one.record
    row = {
        "migration_id": str(record.migration_id),
        "kind": one.kind.value,
        "state": record.state,
        "local": one.local and str(one.local),
        "remote": one.remote and str(one.remote),
        "origin": one.origin and str(one.origin),
        "from": record.source,
        "context_bytes": len(one.context),
        "mode": record.mode,
        "engine": record.engine,
        "hop": record.hop,
    }
    end = f" <-> {one.remote}" if one.remote else ""
    try:
        if options.json:
            print_json_line(row, file)
        else:
            print(f"{one.kind.value} {one.origin}{end} from {record.source}", file=file, flush=True)
    except OSError:
        nobody_reads(file)


def _start(one: Imported, command: list[str]) -> subprocess.Popen[bytes]:
    assert one.socket is not None
    with one.socket:
        # A blocking descriptor is what programs expect; it is the child's from now on.
        one.socket.setblocking(True)
        environment = {
            **os.environ,
            "SOCKMI_LOCAL": str(one.origin or ""),
            "SOCKMI_REMOTE": str(one.remote or ""),
            "SOCKMI_MIGRATION_ID": str(one.record.migration_id),
        }
        return subprocess.Popen(command, stdin=one.fd, stdout=one.fd, env=environment)


def _join(one: Imported, options: argparse.Namespace) -> int:
    """Standard output carries the connection, so the report goes to standard error."""
    _report(one, options, sys.stderr)
    assert one.socket is not None
    with one.socket:
        try:
            relay(one.socket, sys.stdin.fileno(), sys.stdout.fileno())
        except BrokenPipeError:
            return NOT_DONE
        except OSError as error:
            print(f"sockmi: the connection broke: {error.strerror}", file=sys.stderr)
            return NOT_DONE
    return OK


def drain(options: argparse.Namespace) -> int:
    """``sockmi drain``."""
    request = {
        "filter": selection(options),
        "to": options.to,
        "rate_per_s": options.rate,
        "timeout_s": options.timeout,
        "dry_run": options.dry_run,
    }
    shown = ProgressBar()
    records: list[dict[str, Any]] = []
    with _daemon(options) as control, contextlib.closing(shown):
        for answer in control.call("drain", **request):
            progress = answer["progress"]
            records += answer["migrations"]
            shown.show(progress)
        listed = 0
        with contextlib.suppress(SockMiError):  # the drain is over, whatever has become of the daemon
            [status] = control.call("status")
            listed = sum(one["length"] for one in status["import_lists"].values())
        listed -= sum(record["outcome"] == "planned" and record["pid"] is None for record in records)
    done = progress["moved"] + progress["planned"]
    if options.json:
        print_json({"progress": progress, "migrations": records, "listed": listed})
    else:
        failed = [record for record in records if record["outcome"] not in ("moved", "planned")]
        if failed:
            show_records(failed)
        verb = "could be moved" if options.dry_run else "moved"
        gone = f" ({progress['closed']} had ended by then)" if progress["closed"] else ""
        took = "" if options.dry_run else f" in {progress['elapsed_s']:.2f} s"
        print(f"{done} of {progress['selected']} {verb}{took}{gone}")
        if progress["spared"]:
            print(f"{progress['spared']} left alone: your own login")
        for host, count in Counter(one["to"] for one in records if one["outcome"] == "planned").items():
            print(f"room for {count} on {host}")
        if listed:
            print(f"{listed} in this host's import lists stay for an application (sockmi list imports)")
    if not progress["selected"]:
        return NOTHING
    return OK if done + progress["closed"] == progress["selected"] else NOT_DONE


# -- looking


_SOCKETS = ("pid", "fd", "process", "state", "local", "remote", "recv-q", "send-q", "verdict")
_IMPORTS = ("kind", "state", "local", "remote", "from", "since", "bytes", "id")
_REDIRECTS = ("direction", "mode", "local", "remote", "other", "hop")


def _socket_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    queues = (row["receive_queue_bytes"], row["send_queue_bytes"])
    verdict = "movable" if row["movable"] else row["refusal"]["code"]
    who = (row["pid"], row["fd"], row["process"])
    return (*who, row["state"], row["local"], row["remote"], *queues, verdict)


def _import_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    ends = (row["kind"], row["state"], row["origin"], row["remote"], row["from"])
    return (*ends, local_time(row["waiting_since"]), row["image_bytes"], row["migration_id"])


def _redirect_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _REDIRECTS)


_TABLES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    "sockets": (_SOCKETS, _socket_cells),
    "imports": (_IMPORTS, _import_cells),
    "redirects": (_REDIRECTS, _redirect_cells),
}


def list_(options: argparse.Namespace) -> int:
    """``sockmi list``."""
    table = options.table
    with _daemon(options) as control:
        answers = control.call("list", table=table, filter=selection(options))
        rows = [row for answer in answers for row in answer[table]]
    if options.json:
        print_json(rows)
    else:
        columns, cells = _TABLES[table]
        print_table(columns, [cells(row) for row in rows])
    return OK if rows else NOTHING


def status(options: argparse.Namespace) -> int:
    """``sockmi status``."""
    answer = _one(options, "status")
    if options.json:
        print_json(answer)
        return OK
    up = f"up {answer['uptime_s']:.0f} s, engine {answer['engine']}"
    counts = f"{answer['redirects_out']} lead away, {answer['redirects_in']} came"
    print(f"host       {answer['host']} ({answer['host_id']})")
    print(f"daemon     {answer['version']}, pid {answer['pid']}, {up}")
    if answer["stopping"]:
        print("           it is stopping: nothing new is begun")
    print(f"redirects  {', '.join(answer['modes'])}; {counts}")
    print(f"groups     {', '.join(answer['groups']) or 'none'}")
    for kind, one in answer["import_lists"].items():
        print(f"{kind:<10} {one['length']} of {one['maximum']} listed, {one['waiting']} applications wait")
    outcomes = ", ".join(f"{count} {name}" for name, count in answer["outcomes"].items()) or "none yet"
    print(f"migrations {answer['migrations_under_way']} under way; since the start: {outcomes}")
    return OK


def history(options: argparse.Namespace) -> int:
    """``sockmi history``."""
    names = ("limit", "outcomes", "direction", "host", "since", "until")
    request = {name: getattr(options, name) for name in names}
    with _daemon(options) as control:
        answers = control.call("history", **request)
        records = [record for answer in answers for record in answer["migrations"]]
    if options.json:
        print_json(records)
    else:
        show_records(records, ended=True)
    return OK if records else NOTHING


def doctor(options: argparse.Namespace) -> int:
    """``sockmi doctor``."""
    answer = _one(options, "doctor")
    if options.json:
        print_json(answer)
    else:
        for check in answer["checks"]:
            print(f"{check['status']:<8} {check['name']}: {check['message']}")
            if check["mend"]:
                print(f"{'':<8} -> {check['mend']}")
    return OK if answer["healthy"] else NOT_DONE


# -- running


def groups(options: argparse.Namespace) -> int:
    """``sockmi groups``."""
    request: dict[str, Any] = {"action": options.action}
    if options.action == "forget":
        request["host_id"] = options.name
    elif options.action != "list":
        request["name"] = options.name
    if options.force:
        request["force"] = True
    if options.action == "join":
        names = ("key_file", "address", "port", "interface", "peers")
        request |= {name: getattr(options, name) for name in names}
    answer = _one(options, "groups", **request)
    if options.json:
        print_json(answer)
        return OK
    if options.action != "list" and not answer["changed"]:
        print("nothing to do", file=sys.stderr)
    for group in answer["groups"]:
        where = group["address"] or ", ".join(group["peers"])
        note = "" if group["configured"] else " (joined by hand)"
        print(f"{group['name']}: {where} port {group['port']}{note}")
        print_table(("host", "address", "heard s ago", "stream"), [_member(one) for one in group["members"]])
    if not answer["groups"]:
        print("This host is in no group.", file=sys.stderr)
    for host in answer["missed"]:
        print(
            f"{host}: not heard, though something waits for it (sockmi groups forget, if it never comes back)"
        )
    return OK


def _member(member: dict[str, Any]) -> tuple[Any, ...]:
    heard = member["last_heard_s"]
    age = None if heard is None else round(heard, 1)
    return (member["host"], member["address"], age, "open" if member["connected"] else None)


def reload(options: argparse.Namespace) -> int:
    """``sockmi reload``."""
    compared = {} if options.check is None else {"instead": options.check}
    answer = _one(options, "reload", **compared)
    if options.json:
        print_json(answer)
    else:
        print(f"changed: {', '.join(answer['changed']) or 'nothing'}")
        if answer["restart_needed"]:
            print(f"needs a restart: {', '.join(answer['restart_needed'])}")
    return OK


def key(options: argparse.Namespace) -> int:
    """``sockmi key``; it needs no daemon."""
    from sockmi.transport.keyring import KeyFileError, generate

    path: Path = options.file
    try:
        keyring = generate(path)
    except KeyFileError as error:
        raise SockMiError(errno.EEXIST if path.exists() else errno.EIO, str(error)) from None
    if options.json:
        print_json({"file": str(path), "key_id": next(iter(keyring.by_id())).hex()})
    else:
        print(f"{path}: a new group key; copy it to every host of the group, readable by root alone")
    return OK


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "export": export,
    "import": import_,
    "list": list_,
    "status": status,
    "history": history,
    "groups": groups,
    "drain": drain,
    "doctor": doctor,
    "reload": reload,
    "key": key,
}
INTERRUPTED = 128 + signal.SIGINT
