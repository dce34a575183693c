"""Objects of the compiled unit that a second thread uses, or closes, while the first one waits.

What another thread needs raises BufferError; a descriptor stays open until its last user is done,
so that its number cannot be another file's meanwhile.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flannel_dp import _core
from flannel_dp.errors import KernelError
from flannel_dp.kernel.netns import call_in_netns
from flannel_dp.tables.entries import EventFilter, Neighbour, Nexthop, Route, Scope
from tests.lib.waiting import LIMIT, wait_until

NEIGHBOURS = Scope("neighbour", socket.AF_INET, 1)
MAC = "02:00:00:00:00:07"
NLMSG_ERROR, NLMSG_DONE, NLMSG_HEADER = 2, 3, struct.Struct("=IHHII")


class Questioned:
    """A kernel that answers when a test says so: it is at the other end of a channel's socket.

    The name of its socket reads as the netlink address with port 0, which is the kernel's.
    """

    def __init__(self, fd: int) -> None:
        self._far = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        near = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = b"\0q\0\0\0\0" + os.urandom(4)
        self._far.bind(name)
        near.bind("")
        self._near = near.getsockname()
        near.connect(name)
        self._far.settimeout(LIMIT)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(LIMIT), 0))
        os.dup2(near.fileno(), fd)
        near.close()

    def await_question(self) -> int:
        """Return the sequence number of the next question."""
        return int(NLMSG_HEADER.unpack_from(self._far.recv(65536))[3])

    def answer(self, seq: int) -> None:
        """Say that this was all (to a dump), or that it is done (to anything else)."""
        done = NLMSG_HEADER.pack(20, NLMSG_DONE, 2, seq, 0) + bytes(4)
        self._far.sendto(done, self._near)

    def acknowledge(self, seq: int) -> None:
        """Answer as the kernel does to a change that it made."""
        echoed = NLMSG_HEADER.pack(16, 0, 0, seq, 0)
        self._far.sendto(
            NLMSG_HEADER.pack(36, NLMSG_ERROR, 0, seq, 0) + bytes(4) + echoed, self._near
        )

    def close(self) -> None:
        self._far.close()


class Caller(threading.Thread):
    """A thread that makes one call, and what came of it."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__(daemon=True)
        self._call, self._args = call, args
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._call(*self._args)
        except Exception as error:
            self.error = error

    def end(self) -> Any:
        self.join(LIMIT)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture(name="channel")
def channel_fixture() -> Iterator[_core.Channel]:
    with _core.Channel() as made:
        yield made


@pytest.fixture(name="kernel")
def kernel_fixture(channel: _core.Channel) -> Iterator[Questioned]:
    made = Questioned(channel.fileno())
    yield made
    made.close()


def neighbours() -> _core.Table:
    table = _core.Table("neighbour")
    table.add(Neighbour(1, "10.244.7.0", MAC))
    return table


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_channel_that_waits_is_used_by_no_other_thread(
    channel: _core.Channel, kernel: Questioned
) -> None:
    table = neighbours()
    caller = Caller(channel.diff, table, [NEIGHBOURS])
    seq = kernel.await_question()

    calls: list[Callable[[], object]] = [
        lambda: channel.read("neighbour", [NEIGHBOURS]),
        lambda: channel.diff(neighbours(), [NEIGHBOURS]),
        lambda: channel.look_up(neighbours(), NEIGHBOURS),
        lambda: channel.get(NEIGHBOURS, Neighbour(1, "10.244.7.0", MAC)),
        lambda: channel.fetch([NEIGHBOURS]),
        # Nor is the table changed that the thread compares with.
        lambda: table.add(Neighbour(1, "10.244.8.0", MAC)),
        lambda: table.discard(Neighbour(1, "10.244.7.0", MAC)),
        lambda: table.merge(neighbours()),
    ]
    for call in calls:
        with pytest.raises(BufferError, match="in use by another thread"):
            call()
    kernel.answer(seq)
    assert caller.end().added == 1
    table.add(Neighbour(1, "10.244.8.0", MAC))


def test_a_channel_that_waits_is_closed_when_its_answer_has_come(
    channel: _core.Channel, kernel: Questioned
) -> None:
    fd = channel.fileno()
    caller = Caller(channel.diff, neighbours(), [NEIGHBOURS])
    seq = kernel.await_question()

    channel.close()
    channel.close()
    assert is_open(fd)
    for call in (channel.fileno, lambda: channel.read("neighbour", [NEIGHBOURS])):
        with pytest.raises(ValueError, match="closed"):
            call()
    kernel.answer(seq)
    assert caller.end().added == 1
    assert not is_open(fd)


def test_a_channel_closed_between_two_dumps_makes_no_second_one(
    channel: _core.Channel, kernel: Questioned
) -> None:
    """The caller's function closes it, and the number is another file's at once."""
    number = channel.fileno()
    held: list[socket.socket] = []

    def fetched(scope: Scope) -> None:
        if scope.device == 2:
            channel.close()
            held.extend(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            assert number in {one.fileno() for one in held}

    two = [NEIGHBOURS, NEIGHBOURS._replace(device=2)]
    caller = Caller(lambda: channel.diff(neighbours(), two, fetched=fetched))
    kernel.answer(kernel.await_question())
    with pytest.raises(ValueError, match="the channel is closed"):
        caller.end()
    for one in held:
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.recv(1)
        one.close()


def test_a_difference_that_is_applied_is_left_alone(
    channel: _core.Channel, kernel: Questioned
) -> None:
    table = neighbours()
    caller = Caller(channel.diff, table, [NEIGHBOURS])
    kernel.answer(kernel.await_question())
    diff = caller.end()
    caller = Caller(channel.apply, diff, 0, 1, memoryview(bytearray(4)).cast("i"))
    seq = kernel.await_question()

    with _core.Channel() as other:
        calls: list[Callable[[], object]] = [
            lambda: other.apply(diff, 0, 1, memoryview(bytearray(4)).cast("i")),
            lambda: diff.operation(0),
            diff.conflicts,
            diff.misfit,
            lambda: diff.adopt(lambda tag, entry: True),
            lambda: table.add(Neighbour(1, "10.244.8.0", MAC)),
        ]
        for call in calls:
            with pytest.raises(BufferError):
                call()
    kernel.acknowledge(seq)
    assert caller.end() == []


def test_a_table_that_changes_between_two_dumps_is_not_compared(
    channel: _core.Channel, kernel: Questioned
) -> None:
    table = neighbours()

    def fetched(scope: Scope) -> None:
        if scope.device == 2:
            for number in range(1000):
                table.add(Neighbour(3, f"10.244.{number >> 8}.{number & 255}", MAC))

    two = [NEIGHBOURS, NEIGHBOURS._replace(device=2)]
    caller = Caller(lambda: channel.diff(table, two, fetched=fetched))
    kernel.answer(kernel.await_question())
    with pytest.raises(BufferError, match="changed"):
        caller.end()


def test_a_dump_that_is_received_is_not_read(channel: _core.Channel, kernel: Questioned) -> None:
    fd = channel.fileno()
    scope = Scope("route", socket.AF_INET)
    caller = Caller(_core.fetch_dump, fd, 1, scope)
    kernel.answer(kernel.await_question())
    pages = caller.end()
    caller = Caller(lambda: _core.fetch_dump(fd, 2, scope, spare=pages))
    seq = kernel.await_question()

    with _core.Channel() as other:
        calls: list[Callable[[], object]] = [
            lambda: pages.written(b"\x02"),
            lambda: other.read("route", [scope], whole=pages),
            lambda: other.diff(_core.Table("route"), [scope], whole=pages),
            lambda: _core.fetch_dump(other.fileno(), 3, scope, spare=pages),
        ]
        for call in calls:
            with pytest.raises(BufferError, match="in use by another thread"):
                call()
    kernel.answer(seq)
    assert caller.end() is pages
    assert pages.written(b"\x02") == []


def test_watched_tables_are_left_alone_while_events_are_read(host: Any) -> None:
    """Each event about a device is handed over with the interpreter's lock held, which other
    threads have in between."""
    table, nexthops = _core.Table("route"), _core.Table("nexthop")
    watched = _core.Watched(table, [Scope("route", socket.AF_INET)])
    objects = _core.Watched(nexthops, [Scope("nexthop", socket.AF_INET)])
    events = call_in_netns(host.ns, lambda: _core.Events(filter=EventFilter(every_link=True)))
    calls: list[Callable[[], object]] = [
        lambda: watched.touch(Route("10.244.7.0/24", device=1)),
        watched.forget,
        watched.take,
        lambda: watched.orphan(objects),
        lambda: table.add(Route("10.244.7.0/24", device=1)),
        lambda: nexthops.add(Nexthop(7, "10.244.7.0", 7)),
        lambda: events.read([]),
    ]
    reading = threading.Event()

    def read() -> int:
        total = 0
        while not reading.is_set():
            host.ip_batch("", *(f"link set lo alias {number}" for number in range(50)))
            total += int(events.read([watched, objects])[0])
        return total

    caller = Caller(read)

    def refused(call: Callable[[], object]) -> bool:
        try:
            call()
        except BufferError:
            return True
        return caller.error is not None

    try:
        for call in calls:
            wait_until(lambda call=call: any(refused(call) for _ in range(100)))
    finally:
        reading.set()
        try:
            assert caller.end()
        finally:
            events.close()


def test_a_probe_socket_that_waits_is_closed_afterwards() -> None:
    before = set(os.listdir("/proc/self/fd"))
    origin = _core.ProbeOrigin(_core.PROBE_ECHO, bytes([127, 0, 0, 1]))
    probing = _core.ProbeSocket(origin, bytes(24), 1, key=bytes(16))

    def receive() -> None:
        while True:
            probing.receive(20)

    caller = Caller(receive)

    def refused() -> bool:
        try:
            probing.send(memoryview(bytes(4)).cast("I"), 0, 99_999)
        except BufferError:
            return True
        except ValueError:  # the size
            return False
        return False

    wait_until(refused)
    probing.close()
    with pytest.raises(KernelError, match="receive answers"):
        caller.end()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_map_that_is_read_is_closed_afterwards() -> None:
    before = set(os.listdir("/proc/self/fd"))
    held = _core.BpfMap.create(1, 4, 4, 4096)
    held.update_many(
        b"".join(number.to_bytes(4, "little") for number in range(4096)), bytes(4 * 4096)
    )

    def read() -> None:
        while True:
            assert held.read(step=64)[0] == 4096

    caller = Caller(read)
    held.close()
    with pytest.raises(ValueError, match="closed"):
        caller.end()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", [5, 6])
def test_a_value_for_each_processor_has_its_room(kind: int) -> None:
    """The kernel writes one for each that is possible, whatever room there is."""
    cpus = _core.possible_cpus()
    held = _core.BpfMap.create(kind, 4, 16, 2)
    key = bytes(4)
    for wrong in {0, cpus - 1, cpus + 1}:
        for call in (
            lambda wrong=wrong: held.lookup(key, wrong),
            lambda wrong=wrong: held.read(wrong),
        ):
            with pytest.raises(ValueError, match=f"has {cpus} values under a key, not {wrong}"):
                call()
    with pytest.raises(ValueError, match=f"has {16 * cpus} bytes"):
        held.update(key, bytes(12))
    held.update(key, bytes(range(16)) * cpus)
    assert held.lookup(key, cpus) == bytes(range(16)) * cpus
    held.close()


def test_a_map_without_keys_is_not_read_by_them() -> None:
    queue = _core.BpfMap.create(22, 0, 8, 8)
    for call in (queue.read, lambda: queue.update_many(bytes(8), bytes(8))):
        with pytest.raises(ValueError, match=r"no keys|do not fit"):
            call()
    queue.close()


def test_capabilities_are_dropped_by_one_thread_at_a_time() -> None:
    """The one that is asked blocks signals, so that it takes a while."""
    stopped = threading.Event()
    ready = threading.Event()

    def deaf() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMAX})
        ready.set()
        stopped.wait(LIMIT)

    other = Caller(deaf)
    assert ready.wait(LIMIT)
    everything = (1 << 64) - 1
    first = Caller(
        lambda: _core.drop_in_thread(other.native_id, everything, False, int(LIMIT * 1000))
    )

    def refused() -> bool:
        try:
            _core.drop_in_thread(0, everything, False, 0)
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    wait_until(refused)
    stopped.set()
    other.end()
    assert first.end() is None  # a thread that ended keeps nothing
