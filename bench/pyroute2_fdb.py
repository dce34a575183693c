"""pyroute2 appending FDB entries, a call for each; the time goes to standard output.

    python -m bench.pyroute2_fdb IFINDEX FILE

FILE has lines of `bridge -batch`. Neither importing pyroute2 nor reading the file is part of the
time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

_SELF, _PERMANENT = 0x02, 0x80


def main(index: int, path: Path) -> None:
    from pyroute2 import IPRoute

    calls = []
    for line in path.read_text().splitlines():
        words = line.split()
        value = dict(zip(words[7::2], words[8::2], strict=True))
        calls.append((words[2], value["dst"], int(value["vni"]), int(value["src_vni"])))
    with IPRoute() as ipr:
        started = time.perf_counter()
        for mac, there, vni, source in calls:
            ipr.fdb(
                "append",
                ifindex=index,
                lladdr=mac,
                dst=there,
                vni=vni,
                src_vni=source,
                flags=_SELF,
                state=_PERMANENT,
            )
        print(time.perf_counter() - started)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
