# SPDX-License-Identifier: MIT
"""Servers and clients: ``python3 -m lab.traffic serve KIND``, ``python3 -m lab.traffic KIND ADDRESS PORT``.

A server prints a line ``ready`` when it listens or waits for imports; SIGUSR1 makes it export
all its connections; SIGTERM ends it, and it prints what it did as JSON. A client prints its
result as JSON; SIGTERM makes it end in an orderly way. Exit codes: 0 all was right, 1 not,
2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from lab.traffic import handover
from lab.traffic.clients import CurlClient, DuplexClient, IdleClient, LineClient
from lab.traffic.duplex import Terms
from lab.traffic.pattern import Pattern
from lab.traffic.posting import RemoteRendezvous
from lab.traffic.server import KINDS, Server, listen


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m lab.traffic", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="a server")
    serve.add_argument("kind", choices=sorted(KINDS))
    serve.add_argument("--listen", metavar="ADDRESS", help="accept connections there (:: for all)")
    serve.add_argument("--port", type=_natural, required=True, help="port of the service")
    serve.add_argument("--import", dest="imports", action="store_true", help="take connections of that port")
    serve.add_argument("--adopt", metavar="FD", type=_natural, help="go on with this inherited descriptor")
    serve.add_argument("--context", metavar="FILE", type=Path, help="context of the adopted descriptor")
    serve.add_argument("--to", metavar="HOST", help="where SIGUSR1 exports to (default: any)")
    serve.add_argument(
        "--rendezvous", metavar="DIR", type=Path, required=True, help="where contexts are left"
    )
    serve.add_argument(
        "--ask", metavar="ADDRESS", nargs="+", help="servers on other machines, with contexts of their own"
    )
    for kind in ("duplex", "lines", "idle", "curl"):
        client = commands.add_parser(kind, help="a client")
        client.add_argument("address")
        client.add_argument("port", type=_natural)
        client.add_argument("--name", default=kind)
        client.add_argument("--timeline", metavar="FILE", type=Path)
        client.add_argument("--silence-s", type=float, default=20.0, help="longest silence that is no error")
        if kind in ("duplex", "curl"):
            client.add_argument("--seed", type=_natural, default=1)
            client.add_argument(
                "--bytes", type=_natural, default=0, help="bytes to receive; 0: until stopped"
            )
            client.add_argument("--pace", type=_natural, default=0, help="bytes a second; 0: unlimited")
        if kind == "duplex":
            client.add_argument(
                "--send-bytes", type=_natural, default=0, help="bytes to send; 0: until stopped"
            )
        if kind == "lines":
            client.add_argument("--interval-s", type=float, default=0.1)
            client.add_argument("--lines", type=_natural, default=0, help="0: until stopped")
        if kind == "idle":
            client.add_argument("--idle-s", type=float, default=3600.0)
    return parser


def _client(arguments: argparse.Namespace) -> int:
    remote = (arguments.address, arguments.port)
    common = {"name": arguments.name, "timeline": arguments.timeline, "silence_s": arguments.silence_s}
    client: DuplexClient | LineClient | CurlClient
    if arguments.command == "duplex":
        terms = Terms(arguments.seed, arguments.send_bytes, arguments.bytes, arguments.pace)
        client = DuplexClient(remote, terms, pace=arguments.pace, **common)
    elif arguments.command == "curl":
        digest = Pattern(arguments.seed, "download").sha256(arguments.bytes)
        client = CurlClient(
            remote, arguments.bytes, digest, seed=arguments.seed, pace=arguments.pace, **common
        )
    elif arguments.command == "lines":
        client = LineClient(remote, interval_s=arguments.interval_s, lines=arguments.lines, **common)
    else:
        client = IdleClient(remote, idle_s=arguments.idle_s, **common)
    _on(signal.SIGTERM, client.stop)
    _on(signal.SIGINT, client.stop)
    result = client.run()
    print(json.dumps(asdict(result)), flush=True)
    return 0 if result.ok else 1


def _serve(arguments: argparse.Namespace) -> int:
    listener = listen(arguments.listen, arguments.port) if arguments.listen else None
    rendezvous = handover.Rendezvous(arguments.rendezvous)
    if arguments.ask:
        rendezvous = RemoteRendezvous(arguments.rendezvous, arguments.ask)
    server = Server(KINDS[arguments.kind], listener, rendezvous)
    importer: handover.Importer | None = None
    if arguments.imports:
        wait = handover.library_import(local_port=arguments.port)
        importer = handover.Importer(wait, server.rendezvous, server.adopt, server.failed)
    if arguments.adopt is not None:
        [connection] = handover.adopted([arguments.adopt])
        server.adopt(connection, arguments.context.read_bytes() if arguments.context else b"")
    _on(signal.SIGTERM, server.stop)
    _on(signal.SIGINT, server.stop)
    # Loaded now, not when connections wait for it.
    export = handover.library_export(arguments.to)
    _on(signal.SIGUSR1, lambda: server.hand_over(export))
    print("ready", flush=True)
    server.serve()
    if importer is not None:
        importer.stop()
    print(json.dumps(asdict(server.counts)), flush=True)
    return 1 if server.counts.failures else 0


def _on(number: signal.Signals, action: Callable[[], None]) -> None:
    # In a thread: the action may take locks that the interrupted code holds.
    def handler(_number: int, _frame: FrameType | None) -> None:
        threading.Thread(target=action, daemon=True).start()

    signal.signal(number, handler)


def main(words: list[str] | None = None) -> int:
    """Run one server or client; its exit code."""
    arguments = _parser().parse_args(words)
    try:
        return _serve(arguments) if arguments.command == "serve" else _client(arguments)
    except ModuleNotFoundError as error:
        print(f"traffic: {error}; install it, or add daemon/ to PYTHONPATH", file=sys.stderr)
        return 1
    except OSError as error:
        where = getattr(arguments, "listen", None) or getattr(arguments, "address", "")
        print(f"traffic: {where} port {arguments.port}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
