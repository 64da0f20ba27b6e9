# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the modules of this collection share; private to it.

Options and their checks, and a failure that is always a sentence.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.sockmi.appliance.plugins.module_utils._client import ControlError

KINDS = ["bound", "listening", "connected"]
STATES = [
    "CLOSED",
    "LISTEN",
    "SYN-SENT",
    "ESTABLISHED",
    "FIN-WAIT-1",
    "FIN-WAIT-2",
    "CLOSE-WAIT",
    "CLOSING",
    "LAST-ACK",
]

CONTROL_SPEC: dict[str, Any] = {"control": {"type": "path"}}
FILTER_SPEC: dict[str, Any] = {
    "pid": {"type": "int"},
    "process": {"type": "str"},
    "unit": {"type": "str"},
    "local_address": {"type": "str"},
    "local_port": {"type": "int"},
    "remote_address": {"type": "str"},
    "remote_port": {"type": "int"},
    "idle_s": {"type": "float"},
    "states": {"type": "list", "elements": "str", "choices": STATES},
}


class WrongValue(Exception):
    """An option's value that cannot be used; the text names the option and says what to do."""


def in_range(params: dict[str, Any], name: str, least: float, most: float) -> None:
    """Raise WrongValue if the option is given and not a number from ``least`` to ``most``."""
    value = params[name]
    if isinstance(value, bool) or (value is not None and not least <= value <= most):
        raise WrongValue(f"{name} is {value}; give a number from {least} to {most}.")


def socket_filter(params: dict[str, Any]) -> dict[str, Any]:
    """The control socket's filter of `FILTER_SPEC` and ``kinds``; raises WrongValue."""
    in_range(params, "pid", 1, 1 << 22)
    for name in ("local_port", "remote_port"):
        in_range(params, name, 1, 65535)
    in_range(params, "idle_s", 0, 1e9)
    for name in ("local_address", "remote_address"):
        if params[name] is not None:
            try:
                ipaddress.ip_network(params[name], strict=False)
            except ValueError:
                raise WrongValue(
                    f"{name} is {params[name]!r}; give an IP address, or a network such as 192.0.2.0/24."
                ) from None
    for name in ("process", "unit"):
        if params[name] is not None and not params[name]:
            raise WrongValue(f"{name} is empty; give a shell pattern, or leave the option out.")
    wanted = {name: params[name] for name in (*FILTER_SPEC, "kinds")}
    return {name: value for name, value in wanted.items() if value not in (None, [])}


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Around the making of an AnsibleModule: what it stumbles over (.inf for a whole number) is a failure."""
    try:
        yield
    except (ArithmeticError, TypeError, ValueError) as error:
        result = {
            "failed": True,
            "msg": f"The options cannot be read ({type(error).__name__}: {error}); one is no number, "
            "or no text.",
        }
        sys.stdout.write(json.dumps(result) + "\n")
        raise SystemExit(1) from None


def guarded(module: AnsibleModule, body: Callable[[], None]) -> None:
    """Run ``body``; whatever goes wrong becomes a failure with a sentence, never a traceback."""
    try:
        body()
    except WrongValue as error:
        module.fail_json(msg=str(error))
    except ControlError as error:
        module.fail_json(**failure(error))
    except Exception as error:
        module.fail_json(
            msg=f"{module._name} met something unforeseen ({type(error).__name__}: {error}). "
            "Please report it with the version of the collection, the task, "
            "and the daemon's log (journalctl -u sockmid)."
        )


def failure(error: ControlError) -> dict[str, Any]:
    """What ``fail_json`` is told about an error of the daemon: ``msg``, and ``code`` if it gave one."""
    message = error.message
    if not error.code and message.endswith("may this user use it?"):
        message += " Start it (systemctl start sockmid), set the option control, or use become."
    return {"msg": message, "code": error.code} if error.code else {"msg": message}


def pretty(value: Any) -> str:
    """``value`` as text for a diff."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n" if value is not None else ""


def text_of(path: Path) -> str:
    """The contents of a small file, stripped; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
