# SPDX-License-Identifier: MIT
"""`sockmi`: export, import, list, status, history, groups, drain, doctor, reload, key."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence

from sockmi.cli.arguments import build_parser, check
from sockmi.cli.commands import COMMANDS, INTERRUPTED, NO_DAEMON, NOT_DONE, OK, Unreachable
from sockmi.cli.output import nobody_reads, print_json
from sockmi.client import SockMiError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    _open_standard()
    parser, shown = build_parser(), io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):  # --help and --version print
            options = parser.parse_args(arguments)
    except SystemExit as asked:
        raise SystemExit(asked.code if _write(shown.getvalue()) else NOT_DONE) from None
    check(parser, options)
    try:
        # An import says what comes when it comes, or has the connection there.
        return COMMANDS[options.command](options) if options.command == "import" else _whole(options)
    except Unreachable as unreachable:
        _complain(unreachable.error, options)
        return NO_DAEMON
    except SockMiError as error:
        _complain(error, options)
        return NOT_DONE
    except BrokenPipeError:
        nobody_reads(sys.stdout)
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED


def _whole(options: argparse.Namespace) -> int:
    """Show all when all is known: the exit status is the same if whoever reads has seen enough before."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            status = COMMANDS[options.command](options)
    finally:
        written = _write(shown.getvalue())
    return status if written else status or NOT_DONE


def _write(text: str) -> bool:
    """Print it, or say why it cannot be; True if it is not missed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads(sys.stdout)
    except OSError as error:
        nobody_reads(sys.stdout)
        print(
            f"sockmi: standard output: {error.strerror}; the answer is lost, what was done stays",
            file=sys.stderr,
        )
        return False
    return True


def _open_standard() -> None:
    """Who starts us with a standard descriptor closed gets none of our sockets in its place."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


def _complain(error: SockMiError, options: argparse.Namespace) -> None:
    if options.json and not (options.command == "import" and options.exec is None):
        name = errno.errorcode.get(error.errno or 0, "EIO")
        print_json({"ok": False, "error": {"code": error.code, "message": error.strerror, "errno": name}})
    print(f"sockmi: {error.code + ': ' if error.code else ''}{error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
