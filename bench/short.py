"""What ``make bench`` leaves to ``make bench-full``, so that it takes less than ten minutes.

IPv4 and IPv6 share one code path. Where only the main figures are wanted, the long cases are
measured for one of them; the stages, the syncs and the peers are measured for both.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Patterns of ``file::test[case]``, as fnmatch has them; a bracket is one of ``[[]`` and ``[]]``.
PATTERNS = (
    "test_agent_memory.py::test_growth[[]ipv6-*",
    "test_agent_memory.py::test_resident[[]ipv6-*",
    "test_command.py::test_sync_beside_memory[[]ipv6-*",
    "test_counters.py::test_cost_of_a_packet[[]ipv6[]]",
    "test_counters.py::test_what_traffic_notices*",
    "test_counters.py::test_memory_of_an_agent*",
    "test_etcd.py::*[[]ipv6-*",
    "test_etcd.py::test_cold_start[[]ipv4-1000[]]",
    "test_etcd.py::test_renewals*one by one[]]",
    "test_fdb.py::test_*[[]ipv?-10000[]]",
    "test_fdb.py::*[[]ipv6*",
    "test_forwarding.py::test_changing_over[[]ipv?-1000[]]",
    "test_forwarding.py::test_changing_over[[]ipv6-*",
    "test_forwarding.py::test_packets_by_either*",
    "test_forwarding.py::test_sync_into_the_map[[]ipv6-100000[]]",
    "test_kube_start.py::*[[]ipv6-*",
    "test_kube_start.py::*[[]ipv4-1000[]]",
    "test_memory.py::test_bytes_per_peer[[]ipv6-50000[]]",
    "test_memory.py::test_growth_over_1000_syncs*",
    "test_peers.py::test_installing[[]*-300[]]",
    "test_peers.py::test_installing[[]vxlan-ipv6-3000[]]",
    "test_peers.py::test_installing[[]host-gw-ipv6-*",
    "test_peers.py::test_reading[[]*-300[]]",
    "test_peers.py::test_reading[[]vxlan-ipv6-*",
    "test_probe.py::*ipv6-*",
    "test_probe.py::test_rest[[]each second-*",
    "test_probe.py::test_join*-ipv4-1000[]]",
    "test_simulate.py::*[[]ipv6-*",
    "test_stages.py::*[[]ipv6-50000[]]",
    "test_sync.py::*[[]*-ipv?-100[]]",
    "test_sync.py::*[[]*-ipv?-1000[]]",
    "test_sync.py::*[[]*-ipv?-50000[]]",
    "test_sync.py::*[[]direct-ipv6-*",
    "test_sync.py::*[[]host-gw-ipv6-*",
    "test_sync.py::*[[]ipv6-50000[]]",
    "test_traffic.py::*[[]ipv4-1000[]]",
    "test_traffic.py::*[[]ipv6-*",
    "test_update.py::*[[]ipv?-100-*",
    "test_update.py::*[[]ipv4-50000-*-named[]]",
    "test_update.py::*[[]ipv6-50000-*",
    "test_update.py::*[[]ipv6-*-named[]]",
    "test_watch.py::test_flap[[]ipv?-1000[]]",
    "test_watch.py::test_foreign_routes[[]ipv?-1000[]]",
    "test_watch.py::test_foreign_routes[[]ipv6-*",
    "test_watch.py::test_idle[[]ipv?-1000[]]",
    "test_watch.py::test_idle[[]ipv6-*",
)


def is_long(test: str) -> bool:
    """Whether ``file::test[case]`` is left to the full run."""
    return any(fnmatchcase(test, pattern) for pattern in PATTERNS)
