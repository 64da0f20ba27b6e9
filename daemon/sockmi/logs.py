# SPDX-License-Identifier: MIT
"""The daemon's log: text for people on standard error, JSON, or entries of the systemd journal.

Extra fields of a record (``migration_id``, ``connection``, ``step``) go into the JSON, are fields of the
journal (``MIGRATION_ID``, ...), and stand in brackets behind the text.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

from sockmi.config import Config

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}
# Where journald takes entries with fields (systemd.io/JOURNAL_NATIVE_PROTOCOL).
_JOURNAL = Path("/run/systemd/journal/socket")
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging.Formatter."""
        content = {
            "time": round(record.created, 6),
            "priority": _PRIORITIES.get(record.levelno, 5),
            "level": record.levelname.lower(),
            "logger": record.name.replace("__main__", "sockmi.service"),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, default=str)


class TextFormatter(logging.Formatter):
    """A line for people; the journal has its time."""

    def __init__(self, *, time: bool = True) -> None:
        super().__init__(f"{'%(asctime)s ' if time else ''}%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """As logging.Formatter."""
        text = super().format(record)
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return f"{text} [{fields}]" if fields else text


class JournalHandler(logging.StreamHandler[Any]):
    """Entries with fields. What journald does not take at once goes to ``stream``, which it reads as well."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.setFormatter(TextFormatter(time=False))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler."""
        try:
            self._socket.sendto(self._entry(record), str(_JOURNAL))
        except OSError:  # it is full, or starts again, or the entry is too large for a datagram
            super().emit(record)
        except Exception:
            self.handleError(record)

    def format(self, record: logging.LogRecord) -> str:
        """For the stream: systemd reads the priority from the start of a line (sd-daemon(3))."""
        priority = f"<{_PRIORITIES.get(record.levelno, 5)}>"
        return "\n".join(priority + line for line in super().format(record).splitlines())

    def _entry(self, record: logging.LogRecord) -> bytes:
        fields = {
            "MESSAGE": super().format(record),
            "PRIORITY": _PRIORITIES.get(record.levelno, 5),
            "SYSLOG_IDENTIFIER": "sockmid",
            "LOGGER": record.name.replace("__main__", "sockmi.service"),
            **{name.upper(): value for name, value in _fields(record).items() if value is not None},
        }
        return b"".join(_field(name, str(value).encode()) for name, value in fields.items())


def _field(name: str, value: bytes) -> bytes:
    """Lengths are little-endian, and stand before what has more than one line."""
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name.encode(), len(value).to_bytes(8, "little"), value)
    return b"%s=%s\n" % (name.encode(), value)


def _is_journal(descriptor: int) -> bool:
    """Whether systemd has connected a descriptor to its journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(config: Config) -> None:
    """Send the log to standard error, as the configuration says."""
    handler: logging.Handler
    if config.log_format == "text" and _is_journal(sys.stderr.fileno()):
        handler = JournalHandler(sys.stderr)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if config.log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_level(config)


def set_level(config: Config) -> None:
    """As much of the log as the configuration says."""
    for name in ("sockmi", "__main__"):  # the latter: python -m sockmi.service
        logging.getLogger(name).setLevel(config.log_level.upper())
