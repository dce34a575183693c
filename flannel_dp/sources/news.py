"""What a source tells: everything it knows, or what changed since."""

from __future__ import annotations

from msgspec import Struct

from flannel_dp.cluster.lease import BadClaim, Claims, Lease


class Snapshot(Struct, frozen=True):
    """All claims a source knew at one moment.

    ``origin`` names the source in messages; ``seconds`` is the time it took
    to read and decode them. ``consistent`` is True for a store's complete list
    as of one revision, which may be asked for again. ``afresh`` says why the
    store is another one than before, or at an earlier state: "" when it is not.
    """

    claims: Claims
    origin: str
    seconds: float
    consistent: bool = False
    afresh: str = ""


class Change(Struct, frozen=True):
    """What changed since the snapshot or change before it.

    ``added`` are new and changed leases, ``removed`` the names of those that
    are gone (``Lease.name``, or the subnet key where they have none), ``bad``
    claims whose new form is broken: they are no leases any more.
    """

    added: tuple[Lease, ...] = ()
    removed: tuple[str, ...] = ()
    bad: tuple[BadClaim, ...] = ()
