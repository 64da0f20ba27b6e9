#!/usr/bin/python
# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Move live TCP sockets to another host."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: export
short_description: Move live TCP sockets to another host
version_added: "0.1.0"
author: SockMi contributors (@sockmi)
description:
  - Moves TCP sockets of processes on the managed host to another host that runs the SockMi daemon.
    The other end of each connection notices nothing.
  - Takes one socket, named by O(pid) and O(fd), or all that a filter selects.
  - What waits in the import lists of the host, for which no application has come, is among them, unless the
    filter asks for a process.
  - A socket that cannot be moved whole is refused, and stays live where it is.
options:
  fd:
    description:
      - Descriptor of the socket in the process O(pid).
      - With it exactly this socket is moved, and no filter may be given; O(kinds) is not used.
    type: int
  count:
    description:
      - Move at most so many of the selected sockets; those that can be moved come first.
    type: int
  to:
    description:
      - The host that shall import, by its daemon's name, its id or an address.
      - If it is not given, the daemons of the group agree on one.
    type: str
  migration_id:
    description:
      - A UUID of your choice for the move of one socket (O(fd)).
      - Makes it idempotent. When the migration with this id has been done, the module changes nothing
        and returns its record; when it was refused or undone, it is tried again.
    type: str
  allow_refused:
    description:
      - Do not fail if some of the selected sockets did not move.
    type: bool
    default: false
extends_documentation_fragment:
  - sockmi.appliance.common
  - sockmi.appliance.common.filter
  - sockmi.appliance.common.moving
attributes:
  check_mode:
    description: Can run in check mode; the daemon is asked for a dry run, and nothing moves.
    support: full
  diff_mode:
    description: Shows the host of each connection before and after.
    support: full
  idempotent:
    description: Running it again changes nothing.
    support: partial
    details:
      - A moved socket is gone from the host, so a filter selects it no more.
      - A single socket needs O(migration_id); without it a second run fails, since the socket is gone.
notes:
  - O(timeout) holds for each batch of up to 500 sockets.
  - Records of all selected sockets are returned also when the module fails.
seealso:
  - module: sockmi.appliance.info
  - module: sockmi.appliance.group
"""

EXAMPLES = r"""
# ansible web1 -m sockmi.appliance.export -a 'pid=510 fd=5'

- name: Move one socket to any host of the group
  sockmi.appliance.export:
    pid: 510
    fd: 5

- name: Move one socket, once
  sockmi.appliance.export:
    pid: 510
    fd: 5
    to: web2
    migration_id: 7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01

- name: Move all connections of a service, and go on if some cannot be moved
  sockmi.appliance.export:
    unit: nginx.service
    local_port: 443
    to: web2
    allow_refused: true
  register: moved

- name: Move the listening socket with its queue, and ten of its connections
  sockmi.appliance.export:
    process: redis-server
    kinds: "{{ item.kinds }}"
    count: "{{ item.count }}"
    to: db2
  loop:
    - {kinds: [listening], count: 1}
    - {kinds: [connected], count: 10}

- name: Move every connection of this host but our own
  sockmi.appliance.export:
    all: true
    to: 192.0.2.12
"""

RETURN = r"""
migrations:
  description:
    - A record for each selected socket, as the daemon keeps it.
    - In check mode the RV(migrations[].outcome) of those that can be moved is V(planned), and
      RV(migrations[].to) the host that has offered room for it.
  returned: always, but after a failure before any socket was selected
  type: list
  elements: dict
  contains:
    migration_id:
      description: Identifies the move of this socket on all hosts.
      type: str
      returned: always
    batch_id:
      description: Identifies the negotiation that it was part of; null if none was begun.
      type: str
      returned: always
    direction:
      description: Always V(export).
      type: str
      returned: always
    kind:
      description: V(bound), V(listening) or V(connected); null if there was no such socket.
      type: str
      returned: always
    state:
      description: TCP state when it was selected; null if there was no such socket.
      type: str
      returned: always
    local:
      description: Local address and port, as the exporter's socket had them; null if it had none.
      type: str
      returned: always
    remote:
      description: Address and port of the other end; null unless connected.
      type: str
      returned: always
    from:
      description: Name of the exporter.
      type: str
      returned: always
    to:
      description: Name of the importer; null until it is chosen.
      type: str
      returned: always
    user_id:
      description: User who asked for it; null if nobody did, as for what waits in a listener's queue.
      type: int
      returned: always
    pid:
      description: Process that held it; null if none did.
      type: int
      returned: always
    fd:
      description: Its descriptor there; null if it had none.
      type: int
      returned: always
    listener:
      description: Migration id of the listener from whose queue it came, or null.
      type: str
      returned: always
    started_at:
      description: When it was selected.
      type: str
      returned: always
    ended_at:
      description: When it had its outcome; null if it is still under way.
      type: str
      returned: always
    step:
      description: How far it has come; V(ended) or V(active) at the end.
      type: str
      returned: always
    outcome:
      description:
        - V(moved), it is live at the importer.
        - V(refused) or V(aborted), it is live at the exporter as before.
        - V(failed), an error after the hand-over; RV(migrations[].refusal) says where it is.
        - V(planned), a dry run found no obstacle.
        - Null if it is still under way.
      type: str
      returned: always
    refusal:
      description: Why it did not move, or null.
      type: dict
      returned: always
      contains:
        code:
          description: A code for programs, such as V(urgent-data).
          type: str
          returned: always
        message:
          description: A sentence for people.
          type: str
          returned: always
        errno:
          description: Name of the matching errno.
          type: str
          returned: always
    blackout_us:
      description:
        - The freeze, how long nobody could answer the other end, in microseconds, as the exporter
          measured it.
        - Null if it was not frozen.
      type: int
      returned: always
    listed:
      description:
        - Whether it waited in the importer's import list when it had moved. Its other end hears nothing until
          an application takes it.
      type: bool
      returned: always
    receive_queue_bytes:
      description: Bytes received and not yet read, moved with it.
      type: int
      returned: always
    sent_bytes:
      description: Bytes sent and not yet acknowledged, moved with it.
      type: int
      returned: always
    unsent_bytes:
      description: Bytes written and not yet sent, moved with it.
      type: int
      returned: always
    image_bytes:
      description: Size of the image that travelled.
      type: int
      returned: always
    context_bytes:
      description: Size of the application's context that travelled.
      type: int
      returned: always
    mode:
      description: The redirect; V(forward), V(nat), V(takeover), V(iptables), or null.
      type: str
      returned: always
    engine:
      description: This host's engine, V(kernel) or V(repair); null if an older daemon did it.
      type: str
      returned: always
    hop:
      description: How often the connection has moved, this time included.
      type: int
      returned: always
    fidelity:
      description: Names of the parts of the state that were carried, approximated or reset.
      type: dict
      returned: always
      contains:
        carried:
          description: Carried exactly.
          type: list
          elements: str
          returned: always
        approximated:
          description: Carried as well as it can be.
          type: list
          elements: str
          returned: always
        reset:
          description: At a default now.
          type: list
          elements: str
          returned: always
  sample:
    - migration_id: 7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01
      batch_id: 9c1c3d2e-58f2-4a53-8a59-0b8f6b1a2d10
      direction: export
      kind: connected
      state: ESTABLISHED
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      from: a
      to: b
      user_id: 0
      pid: 510
      fd: 5
      listener: null
      started_at: '2026-11-23T12:00:00.120Z'
      ended_at: '2026-11-23T12:00:00.124Z'
      step: active
      outcome: moved
      refusal: null
      blackout_us: 910
      listed: false
      receive_queue_bytes: 0
      sent_bytes: 2896
      unsent_bytes: 65536
      image_bytes: 69120
      context_bytes: 12
      mode: forward
      engine: repair
      hop: 1
      fidelity:
        carried: [receive-queue]
        approximated: [congestion-window]
        reset: [rtt]
moved:
  description:
    - How many of them are live at another host; in check mode, how many could be moved.
    - Counts also one that had been moved before under its O(migration_id).
  returned: with RV(migrations)
  type: int
  sample: 1
refused:
  description: How many of them are not.
  returned: with RV(migrations)
  type: int
  sample: 0
closed:
  description: How many of the sockets that the filter matched had ended by themselves when their turn came.
  returned: with RV(migrations)
  type: int
  sample: 0
spared:
  description: How many sockets the filter matched that carry the Ansible session itself, and were left alone.
  returned: with RV(migrations)
  type: int
  sample: 0
code:
  description: The daemon's refusal code, where it refused the whole request.
  returned: on such a failure
  type: str
  sample: no-such-host
"""

import uuid  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module, _moving  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._client import ControlError  # noqa: E402

BATCH = 500
SELECTION = (*_module.FILTER_SPEC, "count", "all")
TRIES = 3


class Export:
    """One run of the module. ``records`` grows batch by batch, so that a failure can return them."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params: dict[str, Any] = module.params
        self.mover = _moving.Mover(self.params["control"], self.params["timeout"], module.check_mode)
        self.records: list[dict[str, Any]] = []
        self.spared = 0
        self.closed = 0
        self.done_before: set[str] = set()

    def run(self) -> None:
        """Check the options, move, report."""
        self._check()
        wanted = _module.socket_filter(self.params)
        try:
            if self.params["fd"] is not None:
                self._one()
            else:
                self._selected(wanted)
        except ControlError as error:
            told = _module.failure(error)
            if error.code in ("no-such-socket", "no-privilege", "not-tcp"):
                told["msg"] += " sockmi.appliance.info with gather_subset=sockets lists what can be moved."
            self.module.fail_json(**self._result(), **told)
        finally:
            self.mover.close()
        result = self._result()
        if result["refused"] and not self.params["allow_refused"]:
            self.module.fail_json(msg=self._complaint(result), **result)
        self.module.exit_json(**result)

    def _check(self) -> None:
        params = self.params
        given = [name for name in SELECTION if params[name] not in (None, False, [])]
        if params["fd"] is not None:
            surplus = [name for name in given if name != "pid"]
            if surplus:
                raise _module.WrongValue(
                    f"pid and fd name one socket; leave out {', '.join(surplus)}, or fd."
                )
            _module.in_range(params, "fd", 0, 1 << 30)
        elif not given:
            raise _module.WrongValue(
                "Nothing says which sockets: give pid and fd, or a filter such as unit, process or "
                "local_port, or all: true for every one."
            )
        elif not params["kinds"]:
            raise _module.WrongValue("kinds is empty; name at least one, or leave the option out.")
        _module.in_range(params, "count", 1, 1_000_000)
        _module.in_range(params, "timeout", 0.001, 86400)
        if params["migration_id"] is not None:
            try:
                params["migration_id"] = str(uuid.UUID(params["migration_id"]))
            except ValueError:
                raise _module.WrongValue(
                    f"migration_id is {params['migration_id']!r}; give a UUID, for instance "
                    "\"{{ 'some name' | ansible.builtin.to_uuid }}\"."
                ) from None

    # -- what to move

    def _one(self) -> None:
        migration_id = self.params["migration_id"]
        known = self.mover.client.migrations([migration_id]) if migration_id else []
        for record in known:
            if record.get("direction") == "export" and record.get("outcome") == "moved":
                self.records.append(record)
                self.done_before.add(migration_id)
                return
        named = {"pid": self.params["pid"], "fd": self.params["fd"]}
        self._move([{**named, "migration_id": migration_id} if migration_id else named])

    def _selected(self, wanted: dict[str, Any]) -> None:
        chosen, self.spared = self.mover.listed(wanted)
        if self.params["count"] is not None:
            chosen.sort(key=lambda row: not row["movable"])
            del chosen[self.params["count"] :]
        for first in range(0, len(chosen), BATCH):
            self._batch(wanted, chosen[first : first + BATCH])

    def _batch(self, wanted: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Move ``rows``, without those that end by themselves in the meantime."""
        for tries_left in reversed(range(TRIES)):
            try:
                before = len(self.records)
                self._move([_moving.named(row) for row in rows])
                self._set_closed_apart(wanted, rows, before)
                return
            except ControlError as error:
                if error.code != "no-such-socket" or not tries_left:
                    raise
            left = [now for now in self._now(wanted, rows) if now is not None]
            self.closed += len(rows) - len(left)
            rows = left
            if not rows:
                return

    def _set_closed_apart(self, wanted: dict[str, Any], rows: list[dict[str, Any]], before: int) -> None:
        """Of what was not found: what is nowhere had ended; the rest (passed on meanwhile) was refused.

        ``before``: how many records there were before those of ``rows``.
        """
        records = self.records[before:]
        if not any(_not_found(record) for record in records):
            return
        pairs = zip(records, self._now(wanted, rows))  # noqa: B905 - Python 3.8
        kept = [record for record, now in pairs if not _not_found(record) or now is not None]
        self.closed += len(records) - len(kept)
        self.records[before:] = kept

    def _now(self, wanted: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """``rows`` as they are listed now, None: nowhere. Applications may have what waited."""
        listed = self.mover.listed(wanted)[0]
        by_inode = {row["inode"]: row for row in listed}
        taken = {(row["local"], row.get("remote")): row for row in listed if "listed" not in row}
        return [
            by_inode.get(row["inode"])
            or (taken.get((row["local"], row.get("remote"))) if "listed" in row else None)
            for row in rows
        ]

    def _move(self, sockets: list[dict[str, Any]]) -> None:
        records = self.mover.move(sockets, self.params["to"])
        begun = [record for record in records if record is not None]
        self.records += begun
        if len(begun) < len(records):
            lost = f"{len(records) - len(begun)} of {len(records)} migrations were not begun; run it again."
            raise ControlError(f"{self.mover.trouble} {lost}")

    # -- reporting

    def _result(self) -> dict[str, Any]:
        good = "planned" if self.mover.dry_run else "moved"
        fine = [one for one in self.records if one.get("outcome") in (good, "moved")]
        changed = [one for one in fine if one.get("migration_id") not in self.done_before]
        result: dict[str, Any] = {
            "changed": bool(changed),
            "migrations": self.records,
            "moved": len(fine),
            "refused": len(self.records) - len(fine),
            "closed": self.closed,
            "spared": self.spared,
        }
        if self.module._diff:
            target = self.params["to"] or "any host of the group"
            news = [one for one in self.records if one.get("migration_id") not in self.done_before]
            result["diff"] = _moving.diff(news, changed, target)
        return result

    def _complaint(self, result: dict[str, Any]) -> str:
        verb = "could not be moved" if self.mover.dry_run else "did not move"
        return (
            f"{result['refused']} of {len(self.records)} sockets {verb}. {_moving.reasons(self.records)} "
            "Each record in migrations says where its socket is; mend the cause and run it again, "
            "or set allow_refused."
        )


def _not_found(record: dict[str, Any]) -> bool:
    """Whether nothing was at its pid and fd when its turn came."""
    return _moving.code_of(record) == "no-such-socket"


def argument_spec() -> dict[str, Any]:
    """The options."""
    return {
        **_module.CONTROL_SPEC,
        **_module.FILTER_SPEC,
        "fd": {"type": "int"},
        "kinds": {"type": "list", "elements": "str", "choices": _module.KINDS, "default": ["connected"]},
        "all": {"type": "bool", "default": False},
        "count": {"type": "int"},
        "to": {"type": "str"},
        "timeout": {"type": "float", "default": 30.0},
        "migration_id": {"type": "str"},
        "allow_refused": {"type": "bool", "default": False},
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(
            argument_spec=argument_spec(),
            supports_check_mode=True,
            required_by={"fd": ["pid"], "migration_id": ["fd"]},
        )
        _module.guarded(module, Export(module).run)


if __name__ == "__main__":
    main()
