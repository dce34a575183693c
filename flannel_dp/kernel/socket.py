"""A netlink socket that asks the kernel and checks its replies.

On ``struct`` and ``socket`` alone, for a few questions at a time: about devices
(:mod:`flannel_dp.kernel.links`) and the tables of nftables
(:mod:`flannel_dp.resources.firewall.nft_kernel`). Tables of thousands of entries are the compiled
core's.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Final, Self

from flannel_dp.errors import DumpInterrupted, kernel_error
from flannel_dp.kernel import messages as nl
from flannel_dp.kernel.messages import malformed
from flannel_dp.kernel.netns import NetNS, call_in_netns

MAX_INTERRUPTED: Final = 10

_SOL_NETLINK = 270
_NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 11, 12
_BUFFER = 65536
_MSG_TRUNC = int(socket.MSG_TRUNC)  # the operators of an enum are slow
_REPLY_SECONDS = 10


class NetlinkSocket:
    """A socket of one netlink ``protocol`` in one namespace; a context manager.

    Not for use by two threads at once. Every reply is checked: it comes from the kernel,
    answers our request, and has the length it claims.

    Raises ConfigError or NotPermitted as ``call_in_netns`` does.
    """

    def __init__(self, netns: NetNS = None, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._where = netns, protocol
        self._socket = call_in_netns(netns, _open_socket, protocol)
        self._seq = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; a second call does nothing."""
        self._socket.close()

    @property
    def filters_dumps(self) -> bool:
        """Whether the kernel filters dumps (Linux 4.20 and later)."""
        try:
            return bool(self._socket.getsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK))
        except OSError:
            return False

    def abandon(self) -> None:
        """Give up a dump that was begun and not read to its end: go on with a new socket."""
        self.close()
        self._socket = call_in_netns(self._where[0], _open_socket, self._where[1])

    def dump(self, kind: int, body: bytes, what: str) -> list[tuple[int, bytes]]:
        """Dump until a dump is whole; an interrupted one is thrown away, never used.

        Returns (type, payload) of each message. Raises DumpInterrupted, KernelError.
        """
        for _ in range(MAX_INTERRUPTED):
            try:
                return list(self._ask(kind, nl.NLM_F_DUMP, body, what))
            except DumpInterrupted:
                continue
        raise kernel_error(errno.EINTR, what)

    def begin_dump(self, kind: int, body: bytes, what: str) -> Iterator[tuple[int, bytes]]:
        """Yield (type, payload) of each message of a dump as it comes, for a caller that need
        not read to the end; then this socket has to be closed, or to ``abandon`` it.

        Raises as ``dump``, DumpInterrupted only once the dump has come to its end.
        """
        return self._ask(kind, nl.NLM_F_DUMP, body, what)

    def change(self, kind: int, flags: int, body: bytes, what: str) -> None:
        """Send one request that changes something, and wait for the kernel's acknowledgement.

        Raises KernelError as the kernel answers.
        """
        for _ in self._ask(kind, flags | nl.NLM_F_ACK, body, what):
            pass

    def _ask(self, kind: int, flags: int, body: bytes, what: str) -> Iterator[tuple[int, bytes]]:
        """Send one request and yield (type, payload) of each message that answers it."""
        self._seq = self._seq % 0xFFFFFFFF + 1
        size = nl.NLMSGHDR.size + len(body)
        header = nl.NLMSGHDR.pack(size, kind, nl.NLM_F_REQUEST | flags, self._seq, 0)
        try:
            self._socket.send(header + body)
        except OSError as error:
            raise kernel_error(error.errno or errno.EIO, what) from error
        interrupted = False
        while True:
            for kind_, flags_, payload in self._receive(what):
                interrupted = interrupted or bool(flags_ & nl.NLM_F_DUMP_INTR)
                if kind_ == nl.NLMSG_ERROR:
                    nl.raise_error(payload, flags_, what)
                    return
                if kind_ == nl.NLMSG_DONE:
                    if len(payload) >= 4 and struct.unpack_from("=i", payload)[0] < 0:
                        nl.raise_error(payload, flags_ | nl.NLM_F_CAPPED, what, done=True)
                    if interrupted:
                        raise kernel_error(errno.EINTR, what)
                    return
                yield kind_, payload
                if not flags_ & nl.NLM_F_MULTI:
                    return

    def _receive(self, what: str) -> list[tuple[int, int, bytes]]:
        """Receive one datagram that the kernel sent us: its (type, flags, payload) messages."""
        while True:
            try:
                data, _, msg_flags, sender = self._socket.recvmsg(_BUFFER)
            except BlockingIOError as error:
                raise kernel_error(errno.ETIMEDOUT, what) from error
            except OSError as error:
                raise kernel_error(error.errno or errno.EIO, what) from error
            if sender[0] != 0:
                continue
            if msg_flags & _MSG_TRUNC:
                raise malformed(what)
            found = nl.messages(data, self._seq, what)
            if found:
                return found


def _open_socket(protocol: int) -> socket.socket:
    try:
        return _new_socket(protocol)
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, "open a netlink socket") from error


def _new_socket(protocol: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        for option in (_NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                made.setsockopt(_SOL_NETLINK, option, 1)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:  # a kernel before 4.12 or 4.20
                    raise
        # The kernel answers at once or never; without this, "never" would hang us.
        made.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _REPLY_SECONDS, 0)
        )
        made.bind((0, 0))
    except BaseException:
        made.close()
        raise
    return made
