"""Keep a plain ``{mac: vtep}`` map in the FDB of a vxlan device.

For programs that know their peers from somewhere else and have no flannel leases::

    python examples/fdb_from_dict.py vxlan0 peers.json

where peers.json is ``{"02:00:00:00:00:07": "192.0.2.7", ...}``; ``-`` is standard input.
The device has to be there and is taken to be ours alone: what is not in the map is removed,
what is right already is not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from flannel_dp import Kernel, Plan, TablePlan, fdb_scope, fdb_table


def keep(device: str, vteps: Mapping[str, str], netns: str | None = None) -> list[str]:
    """Make the FDB of ``device`` equal to ``vteps``; return what failed, a line for each.

    ``bridge fdb replace MAC dst VTEP dev DEVICE self permanent`` for what is missing or
    different, ``bridge fdb del`` for what is stale. Raises ConfigError when there is no
    such device, ValueError for a text that is no MAC or no address, KernelError.
    """
    with Kernel(netns) as kernel:
        index = kernel.ifindex(device)
        ours = fdb_scope(index)
        diff = kernel.diff(fdb_table(index, vteps), ours)
        plan = Plan((TablePlan(diff, (ours,), {index: device}),))
        print(plan)
        (result,) = kernel.apply(plan)
        return [outcome.message({index: device}) for outcome in result.failures()]


def main() -> int:
    """Read the arguments, keep the map once; 1 when an entry failed."""
    parser = argparse.ArgumentParser(description="Keep a {mac: vtep} map in a device's FDB.")
    parser.add_argument("device", help="a vxlan device")
    parser.add_argument("peers", help="a JSON file with the map, or -")
    parser.add_argument("--netns", help="network namespace (default: this one)")
    args = parser.parse_args()
    with sys.stdin if args.peers == "-" else open(args.peers, encoding="utf-8") as file:
        vteps = json.load(file)
    failures = keep(args.device, vteps, args.netns)
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
