"""What of this machine a data plane works on: one network namespace and the sockets into it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from flannel_dp._core import Pages
from flannel_dp.errors import KernelError
from flannel_dp.kernel.ahead import ReadAhead
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.netns import NetNS, check_netns
from flannel_dp.kernel.tables import Kernel, Progress
from flannel_dp.tables.entries import TABLE_MAIN, Scope
from flannel_dp.tables.results import TableResult
from flannel_dp.tables.scopes import nexthop_scope


class Host:
    """A network namespace (None: the caller's), its tables and its devices.

    Nothing is opened before it is needed. ``use_nexthops=False`` asks for gateway routes where
    the kernel has nexthop objects.
    """

    def __init__(self, netns: NetNS = None, *, use_nexthops: bool = True) -> None:
        check_netns(netns)
        self.netns = netns
        self._use_nexthops = use_nexthops
        self._has_nexthops: bool | None = None
        self._kernel: Kernel | None = None
        self._shared: LinkReader | None = None
        self._too_large: set[tuple[int, int]] = set()
        self._spare: dict[tuple[int, int], Pages] = {}
        #: Dumps that are read ahead, and what is called with how far a pass is, and with what was
        #: applied to a table of a family; of one pass each.
        self.ahead: ReadAhead | None = None
        self.progress: Progress | None = None
        self.applied: Callable[[int, TableResult], None] | None = None

    @classmethod
    def of(cls, kernel: Kernel) -> Host:
        """Return the namespace of an open kernel object, which stays the caller's to close."""
        made = cls(kernel.netns)
        made._kernel = kernel
        return made

    def close(self) -> None:
        """Close the sockets."""
        if self._kernel is not None:
            self._kernel.close()
        self._kernel = None

    @property
    def kernel(self) -> Kernel:
        """The tables of the namespace, for one thread at a time."""
        if self._kernel is None:
            self._kernel = Kernel(self.netns, strict=False)  # its device is its own
        return self._kernel

    def links(self) -> AbstractContextManager[LinkReader]:
        """Return a reader of devices, addresses and routes; the shared one while the node is read
        (``looking``)."""
        return LinkReader(self.netns) if self._shared is None else nullcontext(self._shared)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Ask the kernel for each device and its addresses once until the end of the block, in
        which nothing may be written."""
        with LinkReader(self.netns) as reader:
            self._shared, reader.too_large = reader.remembering(), self._too_large
            reader.spare, self._spare = self._spare, {}
            try:
                yield
            finally:
                self._shared = None
                self._spare = reader.small_tables()

    @contextmanager
    def reading_ahead(self) -> Iterator[ReadAhead]:
        """The same, and let tables be read on a second thread."""
        with self.looking(), self.kernel.read_ahead() as ahead:
            self.ahead = ahead
            try:
                yield ahead
            finally:
                self.ahead = None

    def main_table(self, family: int) -> Pages | None:
        """Return the whole main table where it was read in this pass (``looking``), else None."""
        return None if self._shared is None else self._shared.main_table(family)

    @property
    def waited(self) -> float:
        """How long the kernel took for whole tables in this pass, in seconds."""
        return 0.0 if self._shared is None else self._shared.waited

    def reads_main_table(self, family: int) -> bool:
        """Return whether a pass reads the whole main table."""
        return (family, TABLE_MAIN) not in self._too_large

    # ---- nexthop objects: only routes of IPv4 use them, and only since Linux 5.3

    @property
    def nexthops(self) -> bool | None:
        """Whether IPv4 routes use nexthop objects; None where the kernel has none.

        The kernel is asked once. Raises KernelError.
        """
        return self._use_nexthops if self._knows_nexthops() else None

    def uses_nexthops(self, family: int) -> bool:
        """Return whether routes of one family use nexthop objects. Raises KernelError."""
        return family == 4 and self._use_nexthops and self._knows_nexthops()

    def keeps(self, kind: str, family: int) -> bool:
        """Return whether entries of this kind can be in the kernel for one family.

        Raises KernelError.
        """
        return kind != "nexthop" or (family == 4 and self._knows_nexthops())

    def readable(self, family: int, *scopes: Scope) -> list[Scope]:
        """Return those of ``scopes`` that the kernel has a table for. Raises KernelError."""
        return [scope for scope in scopes if self.keeps(scope.kind, family)]

    def _knows_nexthops(self) -> bool:
        if self._has_nexthops is None:
            try:
                self.kernel.read("nexthop", nexthop_scope(1))  # lo: an empty answer
                self._has_nexthops = True
            except KernelError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._has_nexthops = False
        return self._has_nexthops
