"""Embed DataPlane in a loop of your own, which follows a file of leases until a signal ends it.

::

    python examples/embed_dataplane.py --leases examples/leases.json \
        --net-conf examples/net-conf.json --iface eth0

The first pass is a ``sync``: whatever the kernel holds, it ends up equal to the leases.
After that only changes are applied with ``update``, whose cost does not grow with the
cluster. A version of the file that cannot be read leaves everything as it is. SIGTERM and
SIGINT end the program; the kernel continues to forward.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from flannel_dp import (
    DataPlane,
    FileSource,
    FlannelDPError,
    Lease,
    NetworkConfig,
    Report,
    SourceError,
    Unavailable,
)

Known = dict[str, Lease]


def log(what: str, report: Report) -> None:
    """One line for what was done, one for each thing that went wrong."""
    print(f"{what}: {report.writes} writes in {report.seconds['total'] * 1000:.1f} ms", flush=True)
    for rejection in report.rejected:
        print(f"rejected {rejection.lease}: {rejection.detail}", file=sys.stderr)
    for outcome in report.failures:
        print(f"failed: {outcome.message()}", file=sys.stderr)
    for wanted, foreign in report.conflicts:
        print(f"conflict: {wanted} conflicts with the existing {foreign}", file=sys.stderr)
    for error in report.family_errors.values():
        print(f"failed: {error}", file=sys.stderr)


def read(path: str) -> Known:
    """The leases of a file by name. Raises Unavailable when it cannot be accepted."""
    claims = FileSource(path).snapshot().claims
    if claims.bad:
        raise Unavailable(f"{path}: {claims.bad[0].name}: {claims.bad[0].detail}")
    return {lease.label: lease for lease in claims.leases}


def follow(dataplane: DataPlane, old: Known, new: Known) -> None:
    """Apply the difference of two lists of leases."""
    added = [lease for name, lease in new.items() if old.get(name) != lease]
    removed = [lease for name, lease in old.items() if name not in new]
    try:
        log("update", dataplane.update(added=added, removed=removed))
    except SourceError:  # this node's lease has changed, and the device with it
        log("sync", dataplane.sync(new.values()))


def stamp(path: str) -> tuple[int, int, int]:
    """Return what differs between two versions of a file; zeros while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_mtime_ns, status.st_size


def run(dataplane: DataPlane, path: str, stop: threading.Event, interval: float) -> None:
    """Sync, then check the file every ``interval`` seconds until ``stop`` is set."""
    seen, known = stamp(path), read(path)
    log("sync", dataplane.sync(known.values()))
    while not stop.wait(interval):
        if (now := stamp(path)) == seen:
            continue
        seen = now
        try:
            new = read(path)
            follow(dataplane, known, new)
            known = new
        except FlannelDPError as error:
            print(f"nothing changed: {error}", file=sys.stderr)


def main() -> int:
    """Read the arguments and run; 1 when the first sync cannot be done."""
    parser = argparse.ArgumentParser(description="Follow a file of leases.")
    parser.add_argument("--leases", required=True)
    parser.add_argument("--net-conf", required=True)
    parser.add_argument("--iface", help="external interface (default: the default route's)")
    parser.add_argument("--netns", help="network namespace (default: this one)")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between checks")
    args = parser.parse_args()

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = NetworkConfig.from_file(args.net_conf)
        with DataPlane(config, iface=args.iface, netns=args.netns) as dataplane:
            run(dataplane, args.leases, stop, args.interval)
    except FlannelDPError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
