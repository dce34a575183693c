"""subnet.env as a resource: the file that tells the CNI plugin which subnet is this node's."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from flannel_dp.cluster.network import NetworkConfig
from flannel_dp.reconcile.resource import Done, Resource, Result

if TYPE_CHECKING:
    from flannel_dp.kernel.host import Host
    from flannel_dp.reconcile.report import Report

log = logging.getLogger(__name__)

NAME = "subnet file"


class DesiredFile(Struct, frozen=True):
    """What the file has to say: subnets and MTUs (in bytes) by family, 4 or 6.

    An MTU is the external interface's; that of the family's vxlan device comes before it.
    ``kept`` are the families that cannot be synced now: what the file says of them stays.
    """

    subnets: Mapping[int, str]
    mtus: Mapping[int, int]
    kept: frozenset[int] = frozenset()


class FileChange(Struct, frozen=True):
    """The ``text`` to write to ``path``; None where the file says it already.

    ``is_whole`` is False where a family could not be read.
    """

    path: str
    text: str | None = None
    is_whole: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has to be written."""
        return self.text is None

    def lines(self) -> Iterator[str]:
        """Yield one line for each key of the new file."""
        yield from (f"~ {self.path}: {line}" for line in (self.text or "").splitlines())


class SubnetFileResource(Resource[DesiredFile, FileChange]):
    """The subnet.env at ``path`` for the network ``config``; ``ip_masq`` is written down as
    ``FLANNEL_IPMASQ``.

    One MTU serves both families, so it is the smaller one's. ``clean`` leaves the file: it says
    which subnet this node takes when it starts again.

    Raises ConfigError when there is a FIFO, a socket or a device at ``path``.
    """

    name = NAME
    after = ("device4", "device6")

    def __init__(self, path: str, config: NetworkConfig, *, ip_masq: bool = False) -> None:
        from flannel_dp.cluster.subnet_env import require_regular

        require_regular(path)
        self._path, self._config, self._ip_masq = path, config, ip_masq

    def desired(self, view: Any) -> DesiredFile:
        """Return the subnets of this node, by the facts of its families."""
        return DesiredFile(
            {family.number: family.admission.node.subnet for family in view.families},
            {family.number: family.uplink_mtu for family in view.families},
            frozenset(view.errors),
        )

    def compare(self, host: Host, desired: DesiredFile | None, done: Done) -> FileChange:
        """Read the file. Raises ConfigError for a subnet that cannot be written down."""
        if desired is None:
            return FileChange(self._path, is_whole=False)
        from flannel_dp.cluster.subnet_env import holds, subnet_env_text

        lost = {number for number in desired.subnets if _is_lost(done, number)}
        known = desired.subnets.keys() - lost
        if not known:
            return FileChange(self._path, is_whole=False)
        stays = desired.kept | lost
        kept, kept_mtus = self._kept(stays) if stays else ({}, ())
        mtus = [_mtu(done, number, desired.mtus[number]) for number in known]
        text = subnet_env_text(
            self._config,
            subnets=kept | {number: desired.subnets[number] for number in known},
            mtu=min((*mtus, *kept_mtus)),
            ipmasq=self._ip_masq,
        )
        there = holds(self._path, text)
        return FileChange(self._path, None if there else text, is_whole=not stays)

    def _kept(self, families: frozenset[int]) -> tuple[dict[int, str], tuple[int, ...]]:
        """Return what the file says of these families: their subnets, and its MTU."""
        from flannel_dp.cluster.subnet_env import previous_subnets, read_subnet_env

        before = previous_subnets(self._path, self._config)
        kept = {number: before[number] for number in families if number in before}
        mtu = read_subnet_env(self._path).mtu if kept else None
        return kept, (mtu,) if mtu else ()

    def apply(self, host: Host, change: FileChange) -> Result:
        """Replace the file in one step. Raises KernelError, which names the path."""
        from flannel_dp.cluster.subnet_env import replace_file

        if change.text is not None:
            replace_file(change.path, change.text)
        return Result()

    def record(self, report: Report, change: FileChange | None, outcome: Result) -> None:
        """Name the file where it was written; see ``Resource.record``."""
        super().record(report, change, outcome)
        if outcome.error is not None:
            log.error("subnet.env was not written: %(error)s", {"error": outcome.error})
        elif change is not None:
            if not change.is_empty:
                report.subnet_file = change.path
            if change.is_whole:
                report.looked.add(self.name)


def _mtu(done: Done, number: int, mtu: int) -> int:
    """Return the MTU of a family's vxlan device, else ``mtu``."""
    outcome = done.get(f"device{number}")
    return int(outcome.facts.get("mtu", mtu)) if outcome is not None else mtu


def _is_lost(done: Done, number: int) -> bool:
    """Return whether a family's vxlan device could not be read, so that its MTU is not
    known."""
    outcome = done.get(f"device{number}")
    return outcome is not None and outcome.error is not None and "mtu" not in outcome.facts
