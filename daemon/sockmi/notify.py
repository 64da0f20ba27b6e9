# SPDX-License-Identifier: MIT
"""systemd's readiness protocol (sd_notify(3)): one datagram a message; silent without systemd."""

from __future__ import annotations

import os
import socket
import time


def _send(*lines: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.connect(address)
            channel.send("\n".join(lines).encode())
        except OSError:
            return  # the service manager is gone; the daemon does not depend on it


def ready() -> None:
    """Started, or reloaded."""
    _send("READY=1")


def reloading() -> None:
    """Reading the configuration again; ``ready`` follows."""
    _send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> None:
    """On the way out."""
    _send("STOPPING=1")


def alive() -> None:
    """The watchdog's keep-alive."""
    _send("WATCHDOG=1")


def watchdog_interval_s() -> float | None:
    """How often ``alive`` is due (half of systemd's limit), or None."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 2e6
