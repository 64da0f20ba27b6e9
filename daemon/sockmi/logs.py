# SPDX-License-Identifier: MIT
"""The daemon's log on standard error: text for people, or one JSON object a line.

Extra fields of a record (``migration_id``, ``connection``, ``step``) go into the JSON, and into
brackets behind the text.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from sockmi.config import Config

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}
# sd-daemon(3): systemd reads the priority from the start of a line.
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
    """A line for people; for the systemd journal with its priority, and without the time, which it has."""

    def __init__(self, *, journal: bool = False) -> None:
        time = "" if journal else "%(asctime)s "
        super().__init__(f"{time}%(levelname)s %(name)s: %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        """As logging.Formatter."""
        text = super().format(record)
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        text = f"{text} [{fields}]" if fields else text
        if not self._journal:
            return text
        priority = f"<{_PRIORITIES.get(record.levelno, 5)}>"
        return "\n".join(priority + line for line in text.splitlines())


def _is_journal(descriptor: int) -> bool:
    """Whether systemd has connected a descriptor to its journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(descriptor)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure(config: Config) -> None:
    """Send the log to standard error, as the configuration says."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextFormatter(journal=_is_journal(sys.stderr.fileno()))
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    set_level(config)


def set_level(config: Config) -> None:
    """As much of the log as the configuration says."""
    for name in ("sockmi", "__main__"):  # the latter: python -m sockmi.service
        logging.getLogger(name).setLevel(config.log_level.upper())
