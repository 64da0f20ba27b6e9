#!/usr/bin/python
# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the SockMi daemon of a host knows."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: info
short_description: Gather what the SockMi daemon of a host knows
version_added: "0.1.0"
author: SockMi contributors (@sockmi)
description:
  - Gathers facts about the SockMi daemon of the managed host, the sockets that it could move, those that
    wait to be imported, its redirects, its groups, and the history of its migrations.
options:
  gather_subset:
    description:
      - What to gather. V(all) stands for everything.
      - Gathering V(sockets) looks at every socket of the host, all other subsets are cheap.
    type: list
    elements: str
    choices: [all, daemon, groups, sockets, imports, redirects, history]
    default: [daemon, groups]
  kinds:
    description:
      - Kinds of the RV(sockets); all, if it is not given.
    type: list
    elements: str
    choices: [bound, listening, connected]
  history_limit:
    description:
      - At most so many entries of the RV(history).
    type: int
    default: 100
  history_outcomes:
    description:
      - Only entries of the RV(history) with these outcomes.
    type: list
    elements: str
    choices: [moved, refused, aborted, failed, planned]
  history_direction:
    description:
      - Only entries of the RV(history) of this direction.
    type: str
    choices: [export, import]
  timeout:
    description:
      - Seconds to wait for each answer of the daemon.
    type: float
    default: 30.0
extends_documentation_fragment:
  - sockmi.appliance.common
  - sockmi.appliance.common.filter
attributes:
  check_mode:
    description: Can run in check mode.
    support: full
  diff_mode:
    description: Shows what changed.
    support: N/A
    details:
      - This module changes nothing.
  idempotent:
    description: Running it again changes nothing.
    support: full
notes:
  - The options O(pid) to O(states) select RV(sockets), and do nothing for the other subsets.
  - Any user who may connect to the control socket may gather; others than root see only the
    sockets of their own processes.
seealso:
  - module: sockmi.appliance.export
"""

EXAMPLES = r"""
# ansible web -m sockmi.appliance.info

- name: Who is in the groups of this host
  sockmi.appliance.info:
    gather_subset: [groups]
  register: sockmi

- name: Which connections of nginx cannot be moved
  sockmi.appliance.info:
    gather_subset: [sockets]
    process: nginx
    kinds: [connected]
  register: nginx

- name: Show them
  ansible.builtin.debug:
    msg: "{{ nginx.sockets | rejectattr('movable') }}"

- name: The last failures
  sockmi.appliance.info:
    gather_subset: [history]
    history_outcomes: [failed, aborted]
    history_limit: 20
"""

RETURN = r"""
daemon:
  description: The daemon at a glance. Counters are since its start.
  returned: if O(gather_subset) has V(daemon) or V(all)
  type: dict
  contains:
    api_version:
      description: Version of the control socket's protocol.
      type: int
      returned: always
    version:
      description: Version of the daemon.
      type: str
      returned: always
    host:
      description: Name of this host among the daemons.
      type: str
      returned: always
    host_id:
      description: Id of this host.
      type: str
      returned: always
    pid:
      description: Process id of the daemon.
      type: int
      returned: always
    engine:
      description: What freezes and restores sockets.
      type: str
      returned: always
    modes:
      description: Redirects, the preferred one first.
      type: list
      elements: str
      returned: always
    uptime_s:
      description: Seconds since its start.
      type: float
      returned: always
    stopping:
      description: Whether it is stopping and accepts no new work.
      type: bool
      returned: always
    groups:
      description: Names of its groups.
      type: list
      elements: str
      returned: always
    import_lists:
      description:
        - For V(bound), V(listening) and V(connected) the C(length) of the import list, its C(maximum),
          and how many requests are C(waiting).
      type: dict
      returned: always
    migrations_under_way:
      description: Exports that have no outcome yet.
      type: int
      returned: always
    redirects_out:
      description: Redirects that lead packets away.
      type: int
      returned: always
    redirects_in:
      description: Connections that came and are redirected here.
      type: int
      returned: always
    outcomes:
      description: How many migrations ended with which outcome.
      type: dict
      returned: always
  sample:
    api_version: 1
    version: 0.1.0
    host: a
    host_id: 4be0643f1d98573b97cdca98a65347dd
    pid: 700
    engine: repair
    modes: [forward, nat]
    uptime_s: 12.5
    stopping: false
    groups: [default]
    import_lists:
      bound: {length: 0, maximum: 1024, waiting: 0}
      listening: {length: 0, maximum: 1024, waiting: 1}
      connected: {length: 3, maximum: 1024, waiting: 0}
    migrations_under_way: 0
    redirects_out: 2
    redirects_in: 1
    outcomes: {moved: 10, refused: 1}
groups:
  description: The groups of this daemon and the members that it hears.
  returned: if O(gather_subset) has V(groups) or V(all)
  type: list
  elements: dict
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
      description: Whether it stands in the daemon's configuration, and so comes back after a restart.
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
    - name: web
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
sockets:
  description: The TCP sockets of this host's processes that the filter selects; an entry for each descriptor.
  returned: if O(gather_subset) has V(sockets) or V(all)
  type: list
  elements: dict
  contains:
    pid:
      description: Process that holds it.
      type: int
      returned: always
    fd:
      description: Its descriptor there.
      type: int
      returned: always
    process:
      description: Name of the process.
      type: str
      returned: always
    unit:
      description: Systemd unit of the process, or null.
      type: str
      returned: always
    user_id:
      description: User that owns the socket.
      type: int
      returned: always
    inode:
      description: Identifies the socket on this host; the same for all its descriptors.
      type: int
      returned: always
    kind:
      description: V(bound), V(listening) or V(connected).
      type: str
      returned: always
    state:
      description: TCP state.
      type: str
      returned: always
    local:
      description: Local address and port; null if it has none.
      type: str
      returned: always
    remote:
      description: Address and port of the other end; null unless connected.
      type: str
      returned: always
    receive_queue_bytes:
      description: Bytes received and not yet read.
      type: int
      returned: always
    send_queue_bytes:
      description: Bytes written and not yet acknowledged.
      type: int
      returned: always
    received_bytes:
      description: Bytes that have come so far, if O(idle_s) is given; else null.
      type: int
      returned: always
    movable:
      description: Whether it could be moved now.
      type: bool
      returned: always
    refusal:
      description: Why not; or null.
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
  sample:
    - pid: 510
      fd: 5
      process: nginx
      unit: nginx.service
      user_id: 33
      inode: 81234
      kind: connected
      state: ESTABLISHED
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      receive_queue_bytes: 0
      send_queue_bytes: 2896
      received_bytes: null
      movable: true
      refusal: null
imports:
  description: The sockets that came and wait for their application.
  returned: if O(gather_subset) has V(imports) or V(all)
  type: list
  elements: dict
  contains:
    migration_id:
      description: Identifies the migration.
      type: str
      returned: always
    kind:
      description: V(bound), V(listening) or V(connected).
      type: str
      returned: always
    state:
      description: TCP state.
      type: str
      returned: always
    local:
      description: Local address and port of the socket here; null if it has none.
      type: str
      returned: always
    remote:
      description: Address and port of the other end; null unless connected.
      type: str
      returned: always
    origin:
      description: Local address and port as the other end knows them; null if it has none.
      type: str
      returned: always
    from:
      description: Name of the exporter.
      type: str
      returned: always
    listener:
      description: Migration id of the listener from whose queue it came, or null.
      type: str
      returned: always
    waiting_since:
      description: When it came.
      type: str
      returned: always
    context_bytes:
      description: Size of the application's context.
      type: int
      returned: always
    image_bytes:
      description: Size of the image.
      type: int
      returned: always
  sample:
    - migration_id: 7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01
      kind: connected
      state: ESTABLISHED
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      origin: 10.7.0.1:80
      from: a
      listener: null
      waiting_since: '2026-11-23T12:00:00Z'
      context_bytes: 12
      image_bytes: 1200
redirects:
  description: The redirects of this host.
  returned: if O(gather_subset) has V(redirects) or V(all)
  type: list
  elements: dict
  contains:
    migration_id:
      description: The migration that made it; null if that is not known.
      type: str
      returned: always
    direction:
      description: V(export) leads packets away, V(import) receives them.
      type: str
      returned: always
    mode:
      description: V(forward), V(nat), V(takeover) or V(iptables).
      type: str
      returned: always
    local:
      description: The end of this side, as the exporter's socket had it.
      type: str
      returned: always
    remote:
      description: The other end.
      type: str
      returned: always
    other:
      description: The importer's endpoint (V(export)), or the one that the other end knows (V(import)).
      type: str
      returned: always
    hop:
      description: How often the connection has moved.
      type: int
      returned: always
    since:
      description: When it was made; null if that is not known.
      type: str
      returned: always
  sample:
    - migration_id: 7f0c0f0e-3f0b-4d0f-9f3d-2f1f6a1b7c01
      direction: export
      mode: nat
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      other: 10.7.0.2:31000
      hop: 1
      since: '2026-11-23T12:00:00Z'
history:
  description:
    - Records of migrations that have ended, the latest first; the same as those of
      M(sockmi.appliance.export), and those of imports.
  returned: if O(gather_subset) has V(history) or V(all)
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
      description: V(export) or V(import).
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
        - V(failed), an error after the hand-over; RV(history[].refusal) says where it is.
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
      direction: export
      kind: connected
      state: ESTABLISHED
      local: 10.7.0.1:80
      remote: 10.7.0.9:40112
      from: a
      to: b
      outcome: moved
      blackout_us: 910
      listed: false
      mode: forward
      hop: 1
code:
  description: The daemon's refusal code, where it refused the request.
  returned: on such a failure
  type: str
  sample: bad-request
"""

from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils import _module  # noqa: E402
from ansible_collections.sockmi.appliance.plugins.module_utils._client import ControlClient  # noqa: E402

SUBSETS = ["daemon", "groups", "sockets", "imports", "redirects", "history"]
OUTCOMES = ["moved", "refused", "aborted", "failed", "planned"]
ENVELOPE = ("ok", "id", "more", "fds")


def gathered(client: ControlClient, params: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """What ``gather_subset`` names."""
    subsets = SUBSETS if "all" in params["gather_subset"] else params["gather_subset"]
    facts: dict[str, Any] = {}
    if "daemon" in subsets:
        status = client.status()
        facts["daemon"] = {name: value for name, value in status.items() if name not in ENVELOPE}
    if "groups" in subsets:
        facts["groups"], _changed = client.groups()
    if "sockets" in subsets:
        facts["sockets"] = client.sockets(wanted)
    if "imports" in subsets:
        facts["imports"] = client.imports()
    if "redirects" in subsets:
        facts["redirects"] = client.redirects()
    if "history" in subsets:
        facts["history"] = client.history(
            limit=params["history_limit"],
            outcomes=params["history_outcomes"],
            direction=params["history_direction"],
        )
    return facts


def argument_spec() -> dict[str, Any]:
    """The options."""
    return {
        **_module.CONTROL_SPEC,
        **_module.FILTER_SPEC,
        "gather_subset": {
            "type": "list",
            "elements": "str",
            "choices": ["all", *SUBSETS],
            "default": ["daemon", "groups"],
        },
        "kinds": {"type": "list", "elements": "str", "choices": _module.KINDS},
        "history_limit": {"type": "int", "default": 100},
        "history_outcomes": {"type": "list", "elements": "str", "choices": OUTCOMES},
        "history_direction": {"type": "str", "choices": ["export", "import"]},
        "timeout": {"type": "float", "default": 30.0},
    }


def main() -> None:
    """Run the module."""
    with _module.readable():
        module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)

    def body() -> None:
        _module.in_range(module.params, "history_limit", 1, 1_000_000)
        _module.in_range(module.params, "timeout", 0.001, 86400)
        wanted = _module.socket_filter(module.params)
        with ControlClient(module.params["control"], module.params["timeout"]) as client:
            facts = gathered(client, module.params, wanted)
        module.exit_json(changed=False, **facts)

    _module.guarded(module, body)


if __name__ == "__main__":
    main()
