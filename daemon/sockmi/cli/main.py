# SPDX-License-Identifier: MIT
"""`sockmi`: export, import, list, status, history, groups, drain, doctor, reload, key."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from sockmi.cli.arguments import build_parser, check
from sockmi.cli.commands import COMMANDS, INTERRUPTED, NO_DAEMON, NOT_DONE, OK, Unreachable
from sockmi.cli.output import print_json
from sockmi.client import SockMiError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    check(parser, options)
    try:
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
    except Unreachable as unreachable:
        _complain(unreachable.error, options)
        return NO_DAEMON
    except SockMiError as error:
        _complain(error, options)
        return NOT_DONE
    except BrokenPipeError:
        # Whoever reads has seen enough; the interpreter must not complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _complain(error: SockMiError, options: argparse.Namespace) -> None:
    if options.json and not (options.command == "import" and options.exec is None):
        name = errno.errorcode.get(error.errno or 0, "EIO")
        print_json({"ok": False, "error": {"code": error.code, "message": error.strerror, "errno": name}})
    print(f"sockmi: {error.code + ': ' if error.code else ''}{error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
