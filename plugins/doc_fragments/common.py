# Copyright: SockMi contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the documentation of the modules has in common."""

from __future__ import annotations


class ModuleDocFragment:
    """Fragments: the way to the daemon, which sockets, and what holds for all that move them."""

    DOCUMENTATION = r"""
options:
  control:
    description:
      - Path of the SockMi daemon's control socket on the managed host.
      - If it is not given, the environment variable E(SOCKMI_CONTROL) of the task is used,
        and without that C(/run/sockmi/control.sock).
    type: path
requirements:
  - Python 3.8 or later on the managed host; nothing but its standard library
  - a running SockMi daemon on the managed host
attributes:
  action_group:
    description: Use C(group/sockmi.appliance.sockmi) in C(module_defaults) to set defaults for these modules.
    support: full
    membership:
      - sockmi.appliance.sockmi
  platform:
    description: Target operating system families.
    support: full
    platforms: linux
"""

    FILTER = r"""
options:
  pid:
    description:
      - Process id that holds the socket.
    type: int
  process:
    description:
      - Shell pattern for the name of the process, as in C(/proc/PID/comm), for instance V(nginx*).
    type: str
  unit:
    description:
      - Shell pattern for the systemd unit of the process, for instance V(nginx.service).
    type: str
  local_address:
    description:
      - Local address of the socket, or a network (V(192.0.2.0/24), V(2001:db8::/64)).
    type: str
  local_port:
    description:
      - Local port of the socket.
    type: int
  remote_address:
    description:
      - Address of the other end, or a network.
    type: str
  remote_port:
    description:
      - Port of the other end.
    type: int
  idle_s:
    description:
      - Connections on which no data has come or gone for so many seconds, with nothing queued either way, and
        whose last request has been answered.
    type: float
  states:
    description:
      - States of the socket, as in RFC 9293.
    type: list
    elements: str
    choices:
      - CLOSED
      - LISTEN
      - SYN-SENT
      - ESTABLISHED
      - FIN-WAIT-1
      - FIN-WAIT-2
      - CLOSE-WAIT
      - CLOSING
      - LAST-ACK
"""

    MOVING = r"""
options:
  kinds:
    description:
      - Kinds of the sockets that the filter selects.
    type: list
    elements: str
    choices: [bound, listening, connected]
    default: [connected]
  all:
    description:
      - Select every socket of O(kinds) on the host. Without it at least one other selection is needed,
        so that nothing is moved for want of an option.
    type: bool
    default: false
  timeout:
    description:
      - Seconds in which an importer must be found. What has none by then is refused, what has one goes on.
      - If the daemon has not answered 15 seconds later it is told to undo what is not committed, and asked
        what became of each socket.
    type: float
    default: 30.0
notes:
  - Run it as root (C(become)); only administrators may move sockets of other processes.
  - A filter never selects the sockets that carry the Ansible session itself, those of the module's
    process and its ancestors such as C(sshd). Their number is returned as RV(spared).
"""
