# SPDX-License-Identifier: MIT
"""What an engine does: freeze, capture, release, restore and activate sockets.

One contract test suite runs against every engine: ``repair`` stops the owners of a socket, ``kernel`` owns
the socket's lock. Each step stands beside its inverse:
``stop``/``resume``, ``capture``/(nothing: reading changes nothing), ``restore``/``discard``.
All calls are synchronous, batched, and made from one thread (ptrace belongs to a thread).
"""

# Values that are `frozen` are dataclasses, which pylint does not know.
# pylint: disable=invalid-field-call
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag, StrEnum
from typing import TYPE_CHECKING, Protocol

from sockmi.addresses import Endpoint, FourTuple
from sockmi.frozen import frozen
from sockmi.refusal import Refusal

if TYPE_CHECKING:
    from sockmi.engine.owners import Owners


class Kind(StrEnum):
    """Which of the paper's three lists a socket belongs to; unconnected ones count as bound."""

    BOUND = "bound"
    LISTENING = "listening"
    CONNECTED = "connected"


class BindFlag(IntFlag):
    """What decides with whom a socket that is not connected can share its port."""

    REUSE_ADDRESS = 1
    REUSE_PORT = 2
    V6_ONLY = 4
    DEVICE = 8
    """SO_BINDTODEVICE."""


_NO_FLAGS = BindFlag(0)


@frozen
class Needs:
    """What the importer must be able to do for this socket.

    ``window_scale``: the larger one of a connection; of a socket in SYN-SENT the one that it has offered.
    ``urgent``: urgent data, or the mark of it, is in the receive queue. ``direct``: no router may pass its
    packets on, as the application looks at their TTL (RFC 5082), or has set it to 1.
    """

    window_scale: int = 0
    timestamp_us: bool = False
    image_bytes_max: int = 0
    bind_flags: BindFlag = _NO_FLAGS
    urgent: bool = False
    direct: bool = False


@frozen
class SocketFacts:
    """A socket as preflight sees it; nothing is frozen to learn this.

    ``state`` is the RFC 9293 name (``ESTABLISHED``, ``FIN-WAIT-1``, ``LISTEN``, ``CLOSED`` ...).
    ``inode`` is the sockfs inode: two descriptors with the same inode share one socket.
    ``refusal`` is None if it could be moved now. ``waiting``: connections in the queue of a listener.
    """

    inode: int
    cookie: int
    kind: Kind
    state: str
    family: int
    local: Endpoint | None
    remote: Endpoint | None
    receive_queue_bytes: int
    send_queue_bytes: int
    needs: Needs
    refusal: Refusal | None = None
    waiting: int = 0
    tuple: FourTuple | None = field(init=False, compare=False, repr=False)
    """Local and remote endpoint of a connected socket, else None: made once, as every step asks for it."""

    def __post_init__(self) -> None:
        connected = self.local is not None and self.remote is not None and self.kind is Kind.CONNECTED
        found = FourTuple(self.local, self.remote) if connected else None  # type: ignore[arg-type]
        object.__setattr__(self, "tuple", found)


@dataclass(slots=True)
class Fidelity:
    """What of one socket's state was carried, approximated or reset to a default (names)."""

    carried: list[str] = field(default_factory=list)
    approximated: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)


@frozen
class Captured:
    """An image, and what the engine could not put into it."""

    image: bytes
    fidelity: Fidelity


@frozen
class Placement:
    """Where the copy lives on this host.

    ``local`` is the endpoint that the restored socket is bound to: the original's own for
    address-preserving redirects (then ``transparent`` is set), the importer's for translation.
    """

    local: Endpoint | None
    transparent: bool


@frozen
class Restored:
    """A dormant copy; closing ``fd`` emits nothing.

    Of the repair engine it is in repair or, if it is to listen, bound. Of the kernel engine its lock is
    held: whoever calls something on it waits until it lives.
    """

    fd: int
    fidelity: Fidelity


class Engine(Protocol):
    """The contract; see the module docstring."""

    @property
    def name(self) -> str:
        """``repair`` or ``kernel``."""

    @property
    def version(self) -> str:
        """Of what it uses; empty if that has none."""

    @property
    def carries_urgent(self) -> bool:
        """Whether it can restore urgent data (Needs.urgent)."""

    owners: Owners

    def inspect(self, fds: Sequence[int]) -> list[SocketFacts]:
        """Preflight of each descriptor, in order. Waits for as long as somebody keeps a socket locked."""

    def look(self, fds: Sequence[int]) -> list[SocketFacts]:
        """The same for sockets of others: what there is to see in a second (``LOCKED``). For any thread."""

    def judge(self, fds: Sequence[int], seen: list[SocketFacts]) -> list[SocketFacts]:
        """And what only the engine knows besides what ``look`` has seen; waits for nobody."""

    def stop(self, inodes: Sequence[int], pids: Sequence[int], timeout_s: float) -> list[Refusal | None]:
        """Stop every process that holds one of ``inodes``; ``pids`` are the known holders.

        The kernel engine stops nobody: what is captured before ``resume`` stays frozen until then.
        Nested calls count: a process runs again when each stop of it has been resumed.
        In order of ``inodes``: None, or why its owners cannot be stopped (those already stopped
        for it alone run again).
        """

    def resume(self, inodes: Sequence[int]) -> None:
        """The inverse of ``stop``; never fails."""

    def obstacles(self, inodes: Sequence[int]) -> list[Refusal | None]:
        """Preflight of the owners of each socket, whom ``owners`` has found."""

    def capture(self, fds: Sequence[int], thaw_after_s: float = 1.0) -> list[Captured | Refusal]:
        """Read the whole state of each stopped and held socket; leaves it as it was.

        What the kernel engine has frozen goes on by itself after ``thaw_after_s``, and is not released then.
        """

    def compare(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Whether what is stopped still equals its image: why it would not be released. Changes nothing."""

    def release(
        self, fds: Sequence[int], images: Sequence[bytes], *, owned: bool = False, together: bool = False
    ) -> list[Refusal | None]:
        """Close each original without a packet, if it still equals its image.

        ``owned``: and if somebody else has it too, as far as the engine can tell (NO_SUCH_SOCKET).
        ``together``: all connections or none, also if this process is killed in the middle of it.

        The owner keeps a dead descriptor: every blocked call wakes, the next call gets
        ECONNABORTED, later ones ENOTCONN (receive) or EPIPE (send); a listener's
        accept gets EINVAL. One that is not connected can neither listen (EINVAL) nor connect (EISCONN).
        """

    def deaden(self, fd: int) -> Refusal | None:
        """Finish ``release`` of an original without a connection, which a killed daemon had perhaps begun."""

    def lives(self, fd: int, kind: Kind) -> bool:
        """Whether a copy is dormant no more: it listens, or is out of repair."""

    def in_repair(self, fd: int) -> bool:
        """Whether a socket is in repair: if it is one of ours, dormant."""

    def end_repair(self, fd: int) -> bool:
        """Lead a socket out of repair that a killed daemon left in it; False if it was not.

        Options that repair has changed are put back, if it is one of ``left_in_repair``.
        """

    def left_in_repair(self) -> set[int]:
        """The inodes of originals that a killed daemon left in repair, or with an option changed."""

    def forget_left(self) -> None:
        """What is left in repair still has no owner."""

    def restore(self, images: Sequence[bytes], placements: Sequence[Placement]) -> list[Restored | Refusal]:
        """Make a dormant copy of each image."""

    def renew(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Before holds of copies are lifted: those that were dormant for too long are made anew, or refused.

        What is not refused has all its time before it: nothing was counted while it was dormant. One that is
        refused may be no more; its image is as good as before.
        """

    def discard(self, fds: Sequence[int]) -> None:
        """The inverse of ``restore``: close dormant copies without a packet."""

    def activate(self, fds: Sequence[int], images: Sequence[bytes]) -> list[Refusal | None]:
        """Bring dormant copies to life; keeps ``fds`` open.

        One that is refused has never lived, and its image is as good as before.
        """

    def deliver(
        self, image: bytes, placement: Placement, device: str | None, uid: int, *, only_ask: bool = False
    ) -> Refusal | None:
        """Give a connection to the program that listens for it, by its own accept(); of root or ``uid``.

        ``device``: by which the peer is reached: who listens at another one alone does not get it.
        ``only_ask``: look whether it could be done. After a refusal nothing is left of it, and the image is
        as good as before.
        """
