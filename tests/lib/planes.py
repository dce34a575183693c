"""What a data plane sends, plans and publishes."""

from __future__ import annotations

from typing import Any

from flannel_dp import BackendData, DataPlane
from tests.lib.leases import mac

PEERS = range(1, 31)


def sent(dp: DataPlane) -> int:
    """How many messages ``dp`` has sent to the kernel."""
    return dp.kernel.channel.messages_sent


def counts(document: dict[str, Any], word: str) -> dict[str, int]:
    """One column of a plan or report in JSON, by table."""
    return {table: row[word] for table, row in document["tables"].items()}


def vtep(family: int, number: int) -> BackendData:
    """What node ``number`` publishes of its vxlan device."""
    return BackendData(1, mac(family, number))
