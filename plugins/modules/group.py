#!/usr/bin/python
# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Groups of SockMi daemons."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: group
short_description: Have the SockMi daemon join or leave a group
version_added: "0.1.0"
author: SockMi contributors (@sockmi)
description:
  - Makes the daemon of the managed host a member of a group of daemons, or ends that.
  - Can install the group's key, and verify that other members are heard.
  - What is joined here is joined again when the daemon restarts, until it is left. Its key file must stay.
options:
  state:
    description:
      - V(present), the daemon is in the group, with the given settings.
      - V(absent), it is not. The key file stays.
    type: str
    choices: [present, absent]
    default: present
  name:
    description:
      - Name of the group; up to 32 of a-z, 0-9 and C(-).
    type: str
    required: true
  address:
    description:
      - Multicast address of the group.
      - To join, O(address) or O(peers) is needed.
    type: str
  peers:
    description:
      - The other members, each as C(ADDRESS) or C(ADDRESS:PORT), for networks without multicast.
      - Where no port is given it is the group's.
    type: list
    elements: str
  port:
    description:
      - UDP port of the group. The daemon's own choice is 7780.
    type: int
  interface:
    description:
      - Network interface of the group. If it is not given, the routing table decides.
    type: str
  key_file:
    description:
      - File on the managed host that has the group's key. Needed to join.
    type: path
  key:
    description:
      - The group's key, or several, one a line, each as 64 hexadecimal digits or as base64.
      - Written to O(key_file), with mode 0600 and as root's, if the file has other contents; a group that
        the daemon is in already is then left and joined again, so that it uses the new key.
      - If it cannot be joined, the file has the former key again.
    type: str
  members_min:
    description:
      - Verify that at least so many other members are heard; the module fails if they are not
        within O(wait_s).
      - Not verified in check mode where the group would have to be joined first.
    type: int
    default: 0
  wait_s:
    description:
      - Seconds to wait for O(members_min).
    type: float
    default: 30.0
extends_documentation_fragment:
  - sockmi.appliance.common
attributes:
  check_mode:
    description:
      - Can run in check mode; neither the group nor the key file is changed.
      - It fails where a run would be refused, for the key, the interface, its address or the port, or as
        migrations are under way. So it does if another socket of the host has the port, but where the group
        keeps its own.
    support: full
  diff_mode:
    description: Shows the settings before and after, and that the key differs, never the key.
    support: full
  idempotent:
    description: Running it again changes nothing.
    support: full
notes:
  - Run it as root (C(become)); only administrators may join and leave.
  - Settings that are not given are left as they are. To change one, the group is left and joined again;
    this is refused while migrations are under way.
  - A group of the daemon's configuration that is changed or left here is back as configured after the
    daemon's next start.
seealso:
  - module: sockmi.appliance.info
"""

EXAMPLES = r"""
- name: Join a group by multicast, and hear at least two others
  sockmi.appliance.group:
    name: web
    address: 239.7.7.7
    port: 7007
    interface: eth0
    key_file: /etc/sockmi/web.key
    key: "{{ vault_sockmi_web_key }}"
    members_min: 2
    wait_s: 60

- name: Join a group in a network without multicast
  sockmi.appliance.group:
    name: cloud
    peers: [10.0.0.11, 10.0.0.12]
    key_file: /etc/sockmi/cloud.key

- name: Only verify that the others are there
  sockmi.appliance.group:
    name: web
    members_min: 2

- name: Leave it
  sockmi.appliance.group:
    name: web
    state: absent
"""

RETURN = r"""
group:
  description: The group after the task; null if the daemon is not in it.
  returned: success
  type: dict
  contains:
    name:
      description: Name of the group.
      type: str
      returned: always
    address:
      description: Multicast address; null if the members are listed.
      type: str
      returned: always
    port:
      description: UDP port.
      type: int
      returned: always
    interface:
      description: Network interface, or null.
      type: str
      returned: always
    peers:
      description: Address and port of each listed member.
      type: list
      elements: str
      returned: always
    configured:
      description: Whether it stands in the daemon's configuration.
      type: bool
      returned: always
    members:
      description: The other daemons.
      type: list
      elements: dict
      returned: always
      contains:
        host:
          description: Name of its host.
          type: str
          returned: always
        host_id:
          description: Id of its host.
          type: str
          returned: always
        address:
          description: Address and port that it is heard from.
          type: str
          returned: always
        last_heard_s:
          description: Seconds since it was heard; null if it has not been.
          type: float
          returned: always
        connected:
          description: Whether a stream to it is open.
          type: bool
          returned: always
        load:
          description: Its load, as it says it; null if it has not.
          type: float
          returned: always
  sample:
    name: web
    address: 239.7.7.7
    port: 7007
    interface: eth0
    peers: []
    configured: false
    members:
      - host: b
        host_id: 6fa459eaee8a3ca4894edb77e160355e
        address: 10.7.0.2:7008
        last_heard_s: 0.4
        connected: true
        load: 0.1
key_changed:
  description: Whether the key file was written, or would be in check mode.
  returned: success, or once it has begun
  type: bool
  sample: false
code:
  description: The daemon's refusal code, where it refused the request.
  returned: on such a failure
  type: str
  sample: bad-request
"""

import base64  # noqa: E402
import binascii  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import ipaddress  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import socket  # noqa: E402
import stat  # noqa: E402
import struct  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._client import (  # noqa: E402
    ControlClient,
    ControlError,
)

PORT = 7780
KEY_BYTES = 32
KEYS_MAX = 8
KEY_BYTES_DIFFERENT_MIN = 8  # these three: sockmi/transport/keyring.py; a unit test compares them
ANSWER_S = 30.0
POLL_S = 0.2
SIOCGIFADDR = 0x8915  # linux/sockios.h
IF_INET6 = Path("/proc/net/if_inet6")
LINK_SCOPE = 0x20  # net/ipv6.h
TENTATIVE_OR_FAILED = 0x48  # linux/if_addr.h
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
SETTINGS = ("address", "port", "interface", "peers")


class KeyFile:
    """The key file: compared, written only if it differs, and put back if what was written is no use."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.path = Path(module.params["key_file"] or "")
        self.wanted = _checked_key(module.params["key"]) if module.params["key"] is not None else None
        self.before = "as given"
        self.content_differs = False
        self.access_differs = False
        self._former: bytes | None = None
        if self.wanted is not None:
            self._compare(self.wanted)
        self._writable()

    @property
    def changed(self) -> bool:
        """Whether there is something to write, or has been."""
        return self.content_differs or self.access_differs

    def _compare(self, wanted: list[str]) -> None:
        path = self.path
        try:
            self._former = path.read_bytes()
            status = path.stat()
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise _module.WrongValue(
                    f"key_file {path}: there is no folder {path.parent}; make it first."
                ) from None
            self.content_differs = True
            self.before = "absent"
            return
        except OSError as error:
            raise _module.WrongValue(f"key_file {path}: {error.strerror}; is become needed?") from None
        self.content_differs = _lines(self._former.decode(errors="replace")) != wanted
        mode, foreign = stat.S_IMODE(status.st_mode), _foreign(status)
        self.access_differs = mode != 0o600 or foreign
        self.before = f"{'other contents' if self.content_differs else 'as given'}, mode {mode:04o}"
        self.before += f", of user {status.st_uid}" if foreign else ""

    def _writable(self) -> None:
        """Raise WrongValue if it could not be written."""
        if self.changed and not os.access(self._target.parent, os.W_OK):
            raise _module.WrongValue(f"key_file {self.path} cannot be written; is become needed?")

    @property
    def _target(self) -> Path:
        return self.path.resolve()  # a link stays one

    def examine(self) -> None:
        """Raise WrongValue if the daemon would not take what is, or is to be, in it."""
        if self.wanted is not None:
            return
        path = self.path
        try:
            status = path.stat()
            text = path.read_text(errors="replace")
        except OSError as error:
            raise _module.WrongValue(
                f"key_file {path}: {error.strerror}; give key, or copy the file from a member."
            ) from None
        if status.st_mode & 0o077 or _foreign(status):
            raise _module.WrongValue(f"key_file {path}: make it root's, with mode 0600; it is a secret.")
        _checked_key(text, f"key_file {path}")

    def write(self) -> None:
        """Write it, if it differs."""
        if not self.changed or self.wanted is None:
            return
        try:
            self._replace(("\n".join(self.wanted) + "\n").encode())
        except OSError as error:
            raise _module.WrongValue(f"key_file {self.path}: {error.strerror}; is become needed?") from None

    def put_back(self) -> None:
        """Undo `write`, but for owner and mode: with others the daemon would take no key. Raises OSError."""
        if not self.content_differs:
            return
        if self._former is None:
            self._target.unlink()
        else:
            self._replace(self._former)
        self.content_differs = False

    @property
    def was_there(self) -> bool:
        """Whether there was such a file before."""
        return self._former is not None

    def _replace(self, content: bytes) -> None:
        """Put a file in its place that was its owner's alone at every moment."""
        target = str(self._target)
        module = self.module
        context = module.selinux_context if self.was_there else module.selinux_default_context
        descriptor, new = tempfile.mkstemp(prefix=".", dir=str(self._target.parent))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            module.set_context_if_different(new, context(target), False)
            Path(new).rename(target)
        except BaseException:
            Path(new).unlink()
            raise


class Membership:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params: dict[str, Any] = module.params
        self.name: str = module.params["name"]
        self.predicted = False
        self.changed = False  # once it is no prediction: whether anything is other than it was
        self.key_changed = False
        self.added: list[str] = []

    def run(self) -> None:
        """Check the options, make it so, report."""
        self._check()
        key = KeyFile(self.module) if self.params["state"] == "present" else None
        with ControlClient(self.params["control"], ANSWER_S) as client:
            before = self._row(client)
            try:
                after = self._present(client, before, key) if key else self._absent(client, before)
            except ControlError as error:
                done = {"changed": self.changed or self.key_changed, "key_changed": self.key_changed}
                self.module.fail_json(**done, **_module.failure(error))
            key_changed = key is not None and key.changed
            result: dict[str, Any] = {
                "changed": key_changed or _settings(before) != _settings(after),
                "key_changed": key_changed,
            }
            if self.module._diff:
                result["diff"] = self._diff(before, after, key)
            if after is not None and not self.predicted:
                after = self._heard(client, after, result)
        self.module.exit_json(group=after, **result)

    # -- options

    def _check(self) -> None:
        params = self.params
        if not NAME.fullmatch(self.name):
            raise _module.WrongValue(
                f"name is {self.name!r}; use up to 32 of a-z, 0-9 and '-', beginning with a letter or digit."
            )
        _module.in_range(params, "port", 1, 65535)
        _module.in_range(params, "members_min", 0, 100_000)
        _module.in_range(params, "wait_s", 0, 86400)
        if params["address"] is not None:
            params["address"] = str(_address("address", params["address"]))
            if not ipaddress.ip_address(params["address"]).is_multicast:
                raise _module.WrongValue(
                    f"address is {params['address']}, which is no multicast address; "
                    "choose one of 239.0.0.0/8 or ff05::/16, or list the members as peers."
                )
        if params["peers"] is not None:
            if not params["peers"]:
                raise _module.WrongValue("peers is empty; list the other members, or leave the option out.")
            for text in params["peers"]:
                _peer(text, PORT)

    def _wanted(self, row: dict[str, Any] | None) -> dict[str, Any]:
        """The settings to be: those given, the others as they are."""
        wanted = _settings(row) or {"address": None, "port": PORT, "interface": None, "peers": []}
        for name in SETTINGS:
            if self.params[name] is not None:
                wanted[name] = self.params[name]
        if self.params["peers"] is not None:  # by the group's port, whether it is given now or was before
            wanted["peers"] = [_peer(text, wanted["port"]) for text in self.params["peers"]]
        if self.params["address"] is not None:
            wanted["peers"] = []
        elif self.params["peers"] is not None:
            wanted["address"] = None
        return dict(wanted, peers=sorted(wanted["peers"]))

    # -- states

    def _present(self, client: ControlClient, row: dict[str, Any] | None, key: KeyFile) -> dict[str, Any]:
        wanted = self._wanted(row)
        join = row is None or _settings(row) != wanted or key.content_differs
        if join:
            if not wanted["address"] and not wanted["peers"]:
                raise _module.WrongValue(
                    f"The daemon is not in group {self.name!r}; "
                    "to join it, give address (multicast) or peers."
                )
            if self.params["key_file"] is None:
                raise _module.WrongValue(f"To join group {self.name!r}, give key_file, the group's key.")
            # Before anything is written or left: what the daemon would refuse, in check mode too.
            key.examine()
            self._joinable(client, wanted, row)
            if row is not None:
                self._leavable(client, row)
        if self.module.check_mode:
            if not join and row is not None:
                return row
            self.predicted = True
            configured = bool(row and row["configured"])
            return dict(wanted, name=self.name, configured=configured, members=[])
        key.write()  # first: the group is not left for a key that cannot be written
        self.key_changed = key.changed
        if join:
            self._join(client, wanted, row, key)
            self.changed = True
            row = self._row(client)
        if row is None:
            raise ControlError(f"The daemon joined group {self.name!r}, but does not list it; see its log.")
        return row

    def _absent(self, client: ControlClient, row: dict[str, Any] | None) -> None:
        if row is None:
            return
        self._leavable(client, row)
        if not self.module.check_mode:
            self._leave(client, row)
            self.changed = True

    def _joinable(self, client: ControlClient, wanted: dict[str, Any], row: dict[str, Any] | None) -> None:
        self._administrator()
        interface = wanted["interface"]
        if interface is not None and interface not in [name for _index, name in socket.if_nameindex()]:
            raise _module.WrongValue(f"interface is {interface!r}, which this host has not (ip link).")
        for other in client.groups()[0]:
            if (
                other["name"] != self.name
                and (other["port"], other["interface"]) == (wanted["port"], interface)
                and _versions(other) & _versions(wanted)
            ):
                raise _module.WrongValue(
                    f"port is {wanted['port']}, which group {other['name']!r} of this host has; give another."
                )
        self._bindable(wanted, own_port=row is not None and row["port"] == wanted["port"])

    def _bindable(self, wanted: dict[str, Any], *, own_port: bool) -> None:
        """Raise WrongValue if somebody has the port, or there is no address to send from.

        ``own_port``: this group has it until it is left.
        """
        for version in sorted(_versions(wanted)):
            try:
                _bind(version, wanted)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    where = f" on {wanted['interface']}" if wanted["interface"] else ""
                    raise _module.WrongValue(
                        f"Group {self.name!r} could not be joined{where}: {error.strerror}; is the interface "
                        f"up, and has it an IPv{version} address (ip address)?"
                    ) from None
                if not own_port:
                    raise _module.WrongValue(
                        f"port is {wanted['port']}, which another socket of this host has (ss -ulpn); "
                        "give another."
                    ) from None

    def _administrator(self) -> None:
        if os.geteuid():
            raise _module.WrongValue("Only administrators may join and leave groups; use become.")

    def _leavable(self, client: ControlClient, row: dict[str, Any]) -> None:
        self._administrator()
        under_way = client.status()["migrations_under_way"]
        if under_way:
            raise _module.WrongValue(
                f"{under_way} migrations are under way on this host, and group {self.name!r} must be left; "
                "try again when they have ended (sockmi status)."
            )
        if row["configured"]:
            self.module.warn(
                f"Group {self.name!r} stands in the daemon's configuration; "
                "it is back as it stands there after the daemon's next start."
            )

    def _leave(self, client: ControlClient, row: dict[str, Any]) -> None:
        client.groups("leave", name=self.name, force=row["configured"])

    def _join(
        self, client: ControlClient, wanted: dict[str, Any], old: dict[str, Any] | None, key: KeyFile
    ) -> None:
        """Leave it if need be, and join; if that fails, key and settings are as they were, or it is told."""
        left = False
        try:
            if old is not None:
                self._leave(client, old)
                left = True
            client.groups("join", **self._request(wanted))
        except ControlError as error:
            self.changed = not error.code  # it is not known how far it came
            if key.was_there or not left:  # else the daemon's former key is in no file that is known here
                try:
                    key.put_back()
                except OSError as trouble:
                    self._add(f"key_file {key.path} has the new key, not the former: {trouble.strerror}.")
            self.key_changed = key.changed
            if left:
                self._rejoin(client, _settings(old) or {})
            raise ControlError(" ".join([error.message, *self.added]), error.code, error.errno_name) from None

    def _rejoin(self, client: ControlClient, former: dict[str, Any]) -> None:
        """Join with the former settings."""
        try:
            client.groups("join", **self._request(former))
        except ControlError:
            self.changed = True
            self._add("It has left the group, and could not join it with the former settings either.")
        else:
            self._add("It is in the group with the former settings again.")

    def _add(self, sentence: str) -> None:
        """To what it fails with."""
        self.added.append(sentence)

    def _request(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": self.name,
            "key_file": str(Path(self.params["key_file"]).absolute()),
            "port": settings["port"],
            "interface": settings["interface"],
            "address": settings["address"],
            "peers": settings["peers"] or None,
        }

    def _heard(self, client: ControlClient, row: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """The row, as soon as enough members are heard; else the module fails with ``result``."""
        deadline = time.monotonic() + self.params["wait_s"]
        while True:
            heard = [one["host"] for one in row["members"] if one["last_heard_s"] is not None]
            if len(heard) >= self.params["members_min"]:
                return row
            if time.monotonic() >= deadline:
                self.module.fail_json(
                    msg=f"Group {self.name!r}: {len(heard)} of {self.params['members_min']} other members "
                    f"heard within {self.params['wait_s']:g} s ({', '.join(sorted(heard)) or 'nobody'}). "
                    "Check that the others run and have the same key, address and port, and that the network "
                    f"lets UDP port {row['port']} through.",
                    group=row,
                    **result,
                )
            time.sleep(POLL_S)
            row = self._row(client) or row

    # -- reporting

    def _row(self, client: ControlClient) -> dict[str, Any] | None:
        rows, _changed = client.groups()
        return next((row for row in rows if row["name"] == self.name), None)

    def _diff(
        self, before: dict[str, Any] | None, after: dict[str, Any] | None, key: KeyFile | None
    ) -> dict[str, str]:
        old, new = _settings(before), _settings(after)
        if key is not None and key.changed:
            old = dict(old or {}, key_file=f"{key.path}: {key.before}")
            new = dict(new or {}, key_file=f"{key.path}: as given, mode 0600")
        header = f"group {self.name}"
        return {
            "before_header": header,
            "after_header": header,
            "before": _module.pretty(old),
            "after": _module.pretty(new),
        }


def _settings(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """What of a group's row can be set."""
    if row is None:
        return None
    return {name: sorted(row[name] or []) if name == "peers" else row[name] for name in SETTINGS}


def _address(option: str, text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise _module.WrongValue(f"{option} is {text!r}; give an IPv4 or IPv6 address.") from None


def _peer(text: str, port: int) -> str:
    """``ADDRESS:PORT`` as the daemon writes it."""
    found = re.fullmatch(r"\[(?P<six>[^\]]+)\]:(?P<port>\d+)|(?P<four>[^:]+):(?P<port4>\d+)", text)
    if found:
        host = found.group("six") or found.group("four")
        port = int(found.group("port") or found.group("port4"))
    else:
        host = text
    address = _address("peers", host)
    if not 1 <= port <= 65535:
        raise _module.WrongValue(f"peers has {text!r}; give a port from 1 to 65535.")
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _foreign(status: os.stat_result) -> bool:
    """Whether the daemon would not take a key file for its owner."""
    return status.st_uid not in (0, os.geteuid())


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _checked_key(text: str, what: str = "key") -> list[str]:
    """The key's lines, each a key or a comment, if the daemon takes them; WrongValue never shows one."""
    lines = _lines(text)
    keys = []
    for number, line in enumerate(lines, 1):
        if word := line.partition("#")[0].strip():
            key = _decoded(word)
            if key is None:
                raise _module.WrongValue(
                    f"{what}, line {number}: not a key; give {KEY_BYTES} bytes as {KEY_BYTES * 2} "
                    "hexadecimal digits or as base64 (sockmi key FILE makes one)."
                )
            if len(set(key)) < KEY_BYTES_DIFFERENT_MIN:
                raise _module.WrongValue(
                    f"{what}, line {number}: a key is not random (sockmi key FILE makes one)."
                )
            keys.append(key)
    if not keys:
        raise _module.WrongValue(f"{what} is empty; give the group's key (sockmi key FILE makes one).")
    if len(keys) > KEYS_MAX or len(set(keys)) < len(keys):
        raise _module.WrongValue(f"{what} has {len(keys)} keys; give 1 to {KEYS_MAX}, each once.")
    return lines


def _decoded(text: str) -> bytes | None:
    """A key's bytes; None if it is none."""
    try:
        if len(text) == KEY_BYTES * 2:
            return bytes.fromhex(text)
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _bind(version: int, settings: dict[str, Any]) -> None:
    """Bind sockets as the daemon would (sockmi/transport/group.py; a test compares them), and close them."""
    address, port, interface = settings["address"], settings["port"], settings["interface"]
    scope = (0, socket.if_nametoindex(interface) if interface else 0) if version == 6 else ()
    where: tuple[Any, ...] = ("0.0.0.0" if version == 4 else "::", port)  # noqa: S104
    with _udp(version) as own, _udp(version) as listener:
        if address:
            where = (_source(version, (address, port, *scope), interface), port, *scope)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif interface:
            _to_device(own, interface)
        own.bind(where)
        if address:
            listener.bind((address, port, *scope))


def _source(version: int, group: tuple[Any, ...], interface: str | None) -> str:
    """From where the daemon would send to a multicast group; OSError if there is no such address."""
    if interface and version == 6:
        return _source_ipv6(interface)
    with _udp(version) as probe:
        if interface:
            request = struct.pack("16sH14s", interface.encode(), socket.AF_INET, b"")
            return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
        probe.connect(group)
        return str(probe.getsockname()[0])


def _source_ipv6(interface: str) -> str:
    found = []
    for line in _module.text_of(IF_INET6).splitlines():
        packed, _index, _prefix, scope, flags, name = line.split()
        if name == interface and not int(flags, 16) & TENTATIVE_OR_FAILED:
            found.append((int(scope, 16) == LINK_SCOPE, str(ipaddress.IPv6Address(bytes.fromhex(packed)))))
    if not found:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return min(found, key=lambda one: one[0])[1]


def _udp(version: int) -> socket.socket:
    made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    if version == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _to_device(one: socket.socket, interface: str) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())


def _versions(settings: dict[str, Any]) -> set[int]:
    """Of IP: those that the group's sockets have."""
    hosts = (
        [settings["address"]]
        if settings["address"]
        else [one.rpartition(":")[0] for one in settings["peers"]]
    )
    return {ipaddress.ip_address(host.strip("[]")).version for host in hosts}


def argument_spec() -> dict[str, Any]:
    """The options."""
    return {
        **_module.CONTROL_SPEC,
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "name": {"type": "str", "required": True},
        "address": {"type": "str"},
        "peers": {"type": "list", "elements": "str"},
        "port": {"type": "int"},
        "interface": {"type": "str"},
        "key_file": {"type": "path", "no_log": False},
        "key": {"type": "str", "no_log": True},
        "members_min": {"type": "int", "default": 0},
        "wait_s": {"type": "float", "default": 30.0},
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(
            argument_spec=argument_spec(),
            supports_check_mode=True,
            mutually_exclusive=[["address", "peers"]],
            required_by={"key": ["key_file"]},
        )
        _module.guarded(module, Membership(module).run)


if __name__ == "__main__":
    main()
