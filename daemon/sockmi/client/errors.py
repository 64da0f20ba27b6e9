# SPDX-License-Identifier: MIT
"""What calls of the API raise, and what of the daemon's answers becomes an exception."""

from __future__ import annotations

import errno
from typing import Any


class SockMiError(OSError):
    """A call failed; ``errno`` and ``strerror`` as in C, ``code`` is the refusal code or ""."""

    def __init__(self, errnum: int, message: str, code: str = "") -> None:
        super().__init__(errnum, message)
        self.code = code


class Unanswered(SockMiError):
    """The daemon has not answered: what has become of the request must be asked."""


class BrokenLink(Unanswered):
    """The daemon went away in the middle."""

    def __init__(self, message: str = "The SockMi daemon closed the connection; see its log.") -> None:
        super().__init__(errno.ECONNRESET, message)


def number(name: str | None) -> int:
    """The errno of this name."""
    return int(getattr(errno, name or "", errno.EIO))


def strange(what: str) -> SockMiError:
    """The daemon does not keep to docs/control.md."""
    return SockMiError(errno.EPROTO, f"The SockMi daemon's answer is not as specified: {what}.")


def silent() -> Unanswered:
    """The daemon did not answer within the time allowed."""
    return Unanswered(errno.ETIMEDOUT, "The SockMi daemon does not answer; see its log.")


def refused(why: dict[str, Any]) -> SockMiError:
    """A refusal, in the daemon's words."""
    return SockMiError(
        number(why.get("errno")),
        str(why.get("message", "The socket could not be activated.")),
        str(why.get("code", "internal")),
    )


def check(answer: dict[str, Any]) -> None:
    """Raise SockMiError unless the request was carried out."""
    if answer.get("ok") is True:
        return
    error = answer.get("error")
    if not isinstance(error, dict) or not {"code", "message"} <= set(error):
        raise strange("it has neither ok nor an error")
    raise refused(error)
