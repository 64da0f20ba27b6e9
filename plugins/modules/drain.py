#!/usr/bin/python
# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Empty a host of live TCP sockets, at a rate."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: drain
short_description: Empty a host of live TCP sockets, at a rate
version_added: "0.1.0"
author: SockMi contributors (@sockmi)
description:
  - Moves all TCP sockets that a filter selects to other hosts that run the SockMi daemon, at a rate, until
    none is left. What comes meanwhile is moved too.
  - It spreads them evenly over the hosts of O(to). A host that has gone, or has no room, gets nothing more,
    and the others take its share.
  - A socket that did not move stays live where it is, and is not tried again; three times, if the reason
    is one that passes (it had just changed, or the freeze took too long).
  - What waits in the import lists of the host, for which no application has come, moves too, unless the
    filter asks for a process.
  - With O(count) it does so a step at a time. The playbook C(sockmi.appliance.drain) shows how far it has
    come after each.
options:
  to:
    description:
      - The hosts that shall import, by their daemons' names, ids or addresses.
      - If it is not given, the daemons of the group agree on one for each half second's share.
    type: list
    elements: str
  rate:
    description:
      - At most so many sockets a second, half a second's at once.
      - If it is not given, as fast as they go.
    type: float
  count:
    description:
      - End when so many sockets were tried, also if there are more.
    type: int
  stop_after:
    description:
      - Stop, and fail, when so many sockets did not move. V(0) is never.
    type: int
    default: 10
  so_far:
    description:
      - What the step before has returned as RV(so_far), to go on from there.
    type: dict
    suboptions:
      tried:
        description: How many sockets were tried.
        type: int
        default: 0
      moved:
        description: How many of them moved.
        type: int
        default: 0
      refused:
        description: Inodes of those that did not, or what stands for those of import lists.
        type: list
        elements: int
        default: []
      gone:
        description: The hosts of O(to) that get nothing more.
        type: list
        elements: str
        default: []
      due:
        description: When the next may go, in seconds of the host's monotonic clock.
        type: float
        default: 0.0
extends_documentation_fragment:
  - sockmi.appliance.common
  - sockmi.appliance.common.filter
  - sockmi.appliance.common.moving
attributes:
  check_mode:
    description: Can run in check mode; the daemon is asked for dry runs, and nothing moves.
    support: full
    details:
      - All that would be tried, by O(count) and O(stop_after) too, is asked for at once, each host of O(to)
        for its share. As nothing moves, a further step with O(so_far) finds the same sockets.
  diff_mode:
    description: Shows the host of each connection before and after.
    support: full
  idempotent:
    description: Running it again changes nothing.
    support: full
    details:
      - A moved socket is gone from the host, so the filter selects it no more.
notes:
  - It fails if it has come to an end and sockets are left, and returns the records of all that were tried.
  - With O(idle_s) it ends when for so long none of those that are left has been quiet. One on which a request
    came when its turn had come stays, and is tried again when it is quiet.
seealso:
  - module: sockmi.appliance.export
  - module: sockmi.appliance.info
"""

EXAMPLES = r"""
# ansible web1 -m sockmi.appliance.drain -a 'unit=nginx.service to=web2,web3 rate=50'

- name: Empty this host of a service's connections
  sockmi.appliance.drain:
    unit: nginx.service
    local_port: 443
    to: [web2, web3]
    rate: 50

- name: A hundred of them
  sockmi.appliance.drain:
    unit: nginx.service
    idle_s: 2
    count: 100
  register: step

- name: And a hundred more
  sockmi.appliance.drain:
    unit: nginx.service
    idle_s: 2
    count: 100
    so_far: "{{ step.so_far }}"
  when: not step.done
"""

RETURN = r"""
migrations:
  description:
    - A record for each socket that was tried, the same as those of M(sockmi.appliance.export).
  returned: always, but after wrong options
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
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      from: a
      to: b
      outcome: moved
      refusal: null
      blackout_us: 910
      listed: false
moved:
  description: How many of them are live at another host; in check mode, how many could be moved.
  returned: with RV(migrations)
  type: int
  sample: 20
refused:
  description: How many of them are not.
  returned: with RV(migrations)
  type: int
  sample: 0
closed:
  description: How many sockets had ended by themselves when their turn came.
  returned: with RV(migrations)
  type: int
  sample: 0
spared:
  description: How many sockets that carry the Ansible session itself were left alone.
  returned: with RV(migrations)
  type: int
  sample: 0
left:
  description:
    - How many sockets are there at the end, also those that are not quiet (O(idle_s)), and those that did not
      move; in check mode, how many would be. Null if the daemon could not be asked.
  returned: with RV(migrations)
  type: int
  sample: 0
done:
  description: Whether it has come to an end, rather than to O(count).
  returned: with RV(migrations)
  type: bool
  sample: true
stopped:
  description: Whether that is because of O(stop_after).
  returned: with RV(migrations)
  type: bool
  sample: false
so_far:
  description: This step and those before, for O(so_far) of the next.
  returned: with RV(migrations)
  type: dict
  contains:
    tried:
      description: How many sockets were tried.
      type: int
      returned: always
    moved:
      description: How many of them moved.
      type: int
      returned: always
    refused:
      description: Inodes of those that did not, or what stands for those of import lists.
      type: list
      elements: int
      returned: always
    gone:
      description: The hosts of O(to) that get nothing more.
      type: list
      elements: str
      returned: always
    due:
      description: When the next may go, in seconds of the host's monotonic clock.
      type: float
      returned: always
  sample:
    tried: 20
    moved: 20
    refused: []
    gone: []
    due: 4711.5
code:
  description: The daemon's refusal code, where it refused a whole request.
  returned: on such a failure
  type: str
  sample: shutting-down
"""

import time  # noqa: E402
from collections import Counter  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module, _moving  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._client import ControlError  # noqa: E402

BATCH_MAX = 500
BATCH_S = 0.5
POLL_S = 0.25
SELECTION = (*_module.FILTER_SPEC, "all")
TRIES = 3
PASSING = frozenset({"no-such-socket", "already-migrating", "changed", "freeze-deadline"})
UNHEARD = frozenset({"no-offer", "peer-lost", "shutting-down"})


class Drain:
    """One step. The sockets are listed, and go in this order, batch by batch; then they are listed again.

    What could not be had makes no record: it is looked for again, and is listed still if it has not ended.
    """

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params: dict[str, Any] = module.params
        self.dry_run: bool = module.check_mode
        self.mover = _moving.Mover(self.params["control"], self.params["timeout"], self.dry_run)
        self.records: list[dict[str, Any]] = []
        self.closed = 0
        self.spared = 0
        self.left: int | None = None
        self.done = False
        before: dict[str, Any] = self.params["so_far"] or {}
        self._tried: int = before.get("tried", 0)
        self._moved: int = before.get("moved", 0)
        self._refused: list[int] = list(before.get("refused", []))
        self._gone: list[str] = list(before.get("gone", []))
        self._due: float = before.get("due", 0.0)
        self._patient_until: float | None = None
        self._settled = set(self._refused)
        self._misses: Counter[int] = Counter()
        self._missing: dict[int, dict[str, Any]] = {}

    def run(self) -> None:
        """Check the options, move, report."""
        self._check()
        wanted = _module.socket_filter(self.params)
        told: dict[str, Any] = {}
        try:
            self._empty(wanted)
        except ControlError as error:
            self.done, self.left = True, None
            told = _module.failure(error)
        finally:
            self.mover.close()
        result = self._result()
        if not told and (complaint := self._complaint(result)):
            told = {"msg": complaint}
        if told:
            self.module.fail_json(**result, **told)
        self.module.exit_json(**result)

    def _check(self) -> None:
        params = self.params
        if not any(params[name] not in (None, False, []) for name in SELECTION):
            raise _module.WrongValue(
                "Nothing says which sockets: give a filter such as unit, process or local_port, or all: true "
                "for every one."
            )
        for name in ("kinds", "to"):
            if params[name] == []:
                raise _module.WrongValue(f"{name} is empty; name at least one, or leave the option out.")
        _module.in_range(params, "rate", 0.001, 1_000_000)
        _module.in_range(params, "count", 1, 1_000_000)
        _module.in_range(params, "stop_after", 0, 1_000_000_000)
        _module.in_range(params, "timeout", 0.001, 86400)
        for name in ("tried", "moved", "due"):
            _module.in_range(params["so_far"] or {name: None}, name, 0, 1e12)

    # -- which, and when

    def _empty(self, wanted: dict[str, Any]) -> None:
        rate = self.params["rate"]
        longest_s = max(BATCH_S, 1 / rate) if rate else 0.0
        self._due = min(self._due, time.monotonic() + longest_s)
        everything = {name: value for name, value in wanted.items() if name != "idle_s"}
        rows: list[dict[str, Any]] = []
        while not self._stopped() and not self._enough():
            if wanted != everything:
                rows = self._untried(self.mover.listed(wanted)[0])
            elif not rows:
                rows = self._untried(self._listed(everything))
            if rows and self._due > time.monotonic() and not self.dry_run:
                time.sleep(max(0.0, self._due - time.monotonic()))
            elif rows:
                size = self._limited(len(rows)) if self.dry_run else self._batch_size()
                self._batch(rows[:size])
                del rows[:size]
                self._patient_until = None
            elif wanted == everything:
                self.done = True
                return
            elif self.dry_run or not self._wait_for_quiet(everything):
                self.done = True
                break
        untried = self._untried(self._listed(everything))
        self.done = self.done or self._stopped() or not untried

    def _listed(self, everything: dict[str, Any]) -> list[dict[str, Any]]:
        """All that there are, quiet or not."""
        listed, self.spared = self.mover.listed(everything)
        self.left = len(listed) - sum(one.get("outcome") == "planned" for one in self.records)
        there = {row["inode"] for row in listed}
        taken = {(row["local"], row.get("remote")) for row in listed if "listed" not in row}
        for inode, row in self._missing.items():
            has_owner = "listed" in row and (row["local"], row.get("remote")) in taken  # an application came
            self.closed += inode not in there and not has_owner
        self._missing.clear()
        return listed

    def _untried(self, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [row for row in listed if row["inode"] not in self._settled]
        return sorted(rows, key=lambda row: not row["movable"])  # those that can move come first

    def _batch_size(self) -> int:
        rate = self.params["rate"]
        return self._limited(BATCH_MAX if rate is None else min(max(int(rate * BATCH_S), 1), BATCH_MAX))

    def _limited(self, size: int) -> int:
        count = self.params["count"]
        return size if count is None else min(size, count - len(self.records))

    def _enough(self) -> bool:
        count = self.params["count"]
        return count is not None and len(self.records) >= count

    def _wait_for_quiet(self, everything: dict[str, Any]) -> bool:
        """Whether to look again: some of those that are left may be quiet by then."""
        if self.params["idle_s"] is None or not self._untried(self._listed(everything)):
            return False
        now = time.monotonic()
        if self._patient_until is None:
            self._patient_until = now + self.params["idle_s"]
        time.sleep(max(0.0, min(POLL_S, self._patient_until - now)))
        return now < self._patient_until

    def _stopped(self) -> bool:
        limit = self.params["stop_after"]
        return 0 < limit <= len(self._refused)

    # -- moving

    def _batch(self, rows: list[dict[str, Any]]) -> None:
        """Move ``rows``, spread over the targets."""
        rate = self.params["rate"]
        if rate is not None:
            self._due = max(self._due, time.monotonic()) + len(rows) / rate
        targets = self._targets()
        shares: dict[str | None, list[dict[str, Any]]] = {}
        for number, row in enumerate(rows, self._tried):
            shares.setdefault(targets[number % len(targets)], []).append(row)
        found: dict[int, dict[str, Any]] = {}
        try:
            for target, share in shares.items():
                self._share(share, target, found)
        finally:
            self._keep([(row["inode"], found[row["inode"]]) for row in rows if row["inode"] in found])

    def _targets(self) -> list[str | None]:
        if self.params["to"] is None:
            return [None]
        targets: list[str | None] = [one for one in self.params["to"] if one not in self._gone]
        if not targets:
            raise ControlError(
                f"None of {', '.join(self.params['to'])} takes sockets (any more); see the warnings, "
                "and sockmi.appliance.info with gather_subset=groups."
            )
        return targets

    def _share(
        self, rows: list[dict[str, Any]], target: str | None, found: dict[int, dict[str, Any]]
    ) -> None:
        """Move ``rows`` to one target; ``found`` gets the record of each inode, whatever is raised."""
        try:
            records = self.mover.move([_moving.named(row) for row in rows], target)
        except ControlError as error:
            if error.code != "no-such-host" or target is None:
                raise
            self._drop(target, error.message)
            return
        refusal = self._unheard(records)
        if refusal and target is not None and len(self._targets()) > 1:
            self._drop(target, refusal)
            return
        lost = 0
        for row, record in zip(rows, records):  # noqa: B905 - no strict before Python 3.10
            if record is None or _moving.code_of(record) in PASSING:
                self._misses[row["inode"]] += 1
                if self._misses[row["inode"]] < TRIES:
                    self._missing[row["inode"]] = row
                    continue
            if record is None:
                lost += 1
            else:
                found[row["inode"]] = record
        if lost:
            raise ControlError(f"{self.mover.trouble} {lost} migrations were not begun.")

    def _unheard(self, records: list[dict[str, Any] | None]) -> str:
        """A sentence, if a target took none of its share for reasons of its own; else ""."""
        if self.dry_run or not all(one is not None and _moving.code_of(one) in UNHEARD for one in records):
            return ""
        return _moving.reasons(one for one in records if one is not None)

    def _drop(self, target: str, why: str) -> None:
        self._gone.append(target)
        self.module.warn(f"{target} gets nothing more: {why}")

    def _keep(self, found: list[tuple[int, dict[str, Any]]]) -> None:
        batch = self._batch_size()
        for number, (inode, record) in enumerate(found):
            if self.dry_run and number % batch == 0 and self._stopped():
                return  # after so many batches the run stops
            self.records.append(record)
            self._settled.add(inode)
            self._tried += 1
            if record.get("outcome") in ("moved", "planned"):
                self._moved += 1
            else:
                self._refused.append(inode)

    # -- reporting

    def _result(self) -> dict[str, Any]:
        moving = [one for one in self.records if one.get("outcome") in ("moved", "planned")]
        result: dict[str, Any] = {
            "changed": bool(moving),
            "migrations": self.records,
            "moved": len(moving),
            "refused": len(self.records) - len(moving),
            "closed": self.closed,
            "spared": self.spared,
            "left": self.left,
            "done": self.done,
            "stopped": self._stopped(),
            "so_far": {
                "tried": self._tried,
                "moved": self._moved,
                "refused": self._refused,
                "gone": self._gone,
                "due": self._due,
            },
        }
        if self.module._diff:
            target = ", ".join(self.params["to"] or ["any host of the group"])
            result["diff"] = _moving.diff(self.records, moving, target)
        return result

    def _complaint(self, result: dict[str, Any]) -> str:
        """Why the host is not empty; "" if it is, or if there is more to do."""
        why = _moving.reasons(self.records)
        if self._stopped():
            return (
                f"Stopped: {len(self._refused)} of {self._tried} sockets did not move (stop_after is "
                f"{self.params['stop_after']}), {self.left} are left. {why}"
            )
        if not self.done or not self.left:
            return ""
        if self.dry_run:  # who is not quiet now may be so later
            failed = result["refused"]
            return f"{failed} of {len(self.records)} sockets could not be moved. {why}" if failed else ""
        restless = self.left - len(self._refused)
        quiet = f"; that were not quiet for {self.params['idle_s']} s: {restless}" if restless > 0 else ""
        failed = len(self._refused)
        return f"Sockets that are left: {self.left}; that did not move: {failed}{quiet}. {why}".rstrip()


def argument_spec() -> dict[str, Any]:
    """The options."""
    so_far = {
        "tried": {"type": "int", "default": 0},
        "moved": {"type": "int", "default": 0},
        "refused": {"type": "list", "elements": "int", "default": []},
        "gone": {"type": "list", "elements": "str", "default": []},
        "due": {"type": "float", "default": 0.0},
    }
    return {
        **_module.CONTROL_SPEC,
        **_module.FILTER_SPEC,
        "kinds": {"type": "list", "elements": "str", "choices": _module.KINDS, "default": ["connected"]},
        "all": {"type": "bool", "default": False},
        "to": {"type": "list", "elements": "str"},
        "rate": {"type": "float"},
        "count": {"type": "int"},
        "stop_after": {"type": "int", "default": 10},
        "timeout": {"type": "float", "default": 30.0},
        "so_far": {"type": "dict", "options": so_far},
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
        _module.guarded(module, Drain(module).run)


if __name__ == "__main__":
    main()
