# SPDX-License-Identifier: MIT
"""The kernel's news that somebody has changed nftables: not what, which is cheap to look up."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import socket
import struct
from collections.abc import Iterator

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 270, 1, 2
_NFNLGRP_NFTABLES = 7
_NEW_GENERATION = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWGEN: one at the end of each transaction
_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter
_TYPE_AT = 4  # of nlmsg_type


class TableNews:
    """Heard since it was made; in the network namespace of the thread that makes it.

    While somebody listens the kernel writes down each element that changes, which doubles the cost of a
    transaction: so nobody does while it is ours (``unheard``). Of what others do, no more than that a
    transaction has ended passes the filter.
    """

    def __init__(self) -> None:
        self.socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            _NETLINK_NETFILTER,
        )
        self.socket.bind((0, 0))
        _attach(self.socket)
        self._listen(_ADD_MEMBERSHIP)

    @contextlib.contextmanager
    def unheard(self) -> Iterator[None]:
        """Our own transaction: what others do at the same time may be missed."""
        self._listen(_DROP_MEMBERSHIP)
        try:
            yield
        finally:
            self._listen(_ADD_MEMBERSHIP)

    def read(self) -> None:
        """Read all, or that the kernel had no room to tell it."""
        while True:
            try:
                self.socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def close(self) -> None:
        """Close the netlink socket."""
        self.socket.close()

    def _listen(self, option: int) -> None:
        self.socket.setsockopt(_SOL_NETLINK, option, _NFNLGRP_NFTABLES)


def _attach(sock: socket.socket) -> None:
    # The filter loads in network order what netlink has in the host's.
    wanted = int.from_bytes(struct.pack("=H", _NEW_GENERATION), "big")
    program = (
        (0x28, 0, 0, _TYPE_AT),  # ldh
        (0x15, 0, 1, wanted),  # jeq
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: all of it
        (0x06, 0, 0, 0),  # ret: nothing
    )
    code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*one) for one in program))
    prog = struct.pack("HP", len(program), ctypes.addressof(code))  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, prog)
