# FDB entries in all forms (csrc/fdb_any.c); included by _core.pyx.

cdef dict _FDB_FLAGS = {"extern_learn": FDP_LEARNED, "router": FDP_ROUTER, "sticky": FDP_STICKY}
cdef dict _FDB_OWNERS = {"": 0, "all": 0, "plain": 1, "extern_learn": 2}
cdef dict _FDB_SIDES = {"": FDP_SELF | FDP_MASTER, "self": FDP_SELF, "master": FDP_MASTER}


cdef object _any_fdb_entry(fdp_fdb_any *row):
    cdef fdp_remote *remote = fdp_fdb_remote(row)
    flags = ",".join([word for word, bit in _FDB_FLAGS.items() if row.flags & bit])
    return Fdb(row.ifindex, _mac_text(row.mac), _address_text(remote.family, remote.endpoint),
               remote.vni, remote.port, remote.via, row.nexthop, row.state, row.src_vni,
               _other(FDP_FDB_ANY, row.shown), flags, row.vlan, row.master)


cdef int _fill_any_fdb(object entry, fdp_fdb_any *row) except -1:
    cdef fdp_remote remote
    memset(&remote, 0, sizeof(remote))
    row.ifindex = entry.device
    _read_mac(entry.mac, row.mac)
    row.vlan, row.src_vni, row.master = entry.vlan, entry.src_vni, entry.master
    row.place = FDP_MASTER if entry.master else FDP_SELF
    if entry.endpoint:
        remote.family = _read_address(entry.endpoint, remote.endpoint)
    remote.vni, remote.via, remote.port = entry.vni, entry.via, entry.port
    row.nexthop = entry.nexthop
    for word in entry.flags.split(",") if entry.flags else ():
        if word not in _FDB_FLAGS:
            raise ValueError(f"flags: {word!r} is none of " + ", ".join(_FDB_FLAGS))
        row.flags |= _FDB_FLAGS[word]
    row.state = fdp_fdb_state(entry.state)
    if entry.master and row.flags & FDP_LEARNED:
        row.state = 2  # NUD_REACHABLE, whatever is asked for (br_fdb_external_learn_add)
    fdp_fdb_settle(row, &remote)
    return 0


cdef int _require_plain(str kind, object entry) except -1:
    """Raise Unsupported for what is not all of a row of this kind."""
    if isinstance(entry, Peer) or not isinstance(entry, tuple):
        return 0
    if (getattr(entry, "other", "") or isinstance(entry, Fdb)
            and (entry.src_vni or entry.flags or entry.vlan or entry.master)):
        what = "leave out other"
        if isinstance(entry, Fdb):
            what = 'use Table("fdb_any") or fdb_table()'
        raise Unsupported(f"a {kind} table cannot hold {entry}", hint=what)
    return 0


cdef int _require_lasting(object entry, fdp_fdb_any *row) except -1:
    """Raise for an FDB entry that the kernel would not keep as it is given: Unsupported for one
    that ages or is the kernel's own, ConfigError for one that it takes from nobody."""
    cdef fdp_remote *remote = fdp_fdb_remote(row)
    cdef bint tunnel = remote.family or remote.vni or remote.via or remote.port or row.src_vni
    entry = entry if isinstance(entry, Fdb) else Fdb(*entry)
    if entry.other:
        raise Unsupported(f"no table can hold {entry}", hint="leave out other: nobody can set it")
    if row.place == FDP_MASTER and (tunnel or row.nexthop):
        raise ConfigError(f"{entry} is in a bridge, which has no tunnels",
                          hint="with master, leave out endpoint, vni, port, via, nexthop, src_vni")
    if row.place == FDP_MASTER and row.state & 0x80:
        raise Unsupported(f"{entry} would be an address of the bridge itself",
                          hint="state: give NUD_NOARP (static)")
    if row.place == FDP_MASTER and row.flags & FDP_ROUTER:
        raise ConfigError(f"{entry} is in a bridge, which has no routers", hint="leave out router")
    if row.place == FDP_SELF and row.vlan:
        raise ConfigError(f"{entry} has a VLAN, which a vxlan device has not",
                          hint="vlan: give master too, the bridge's ifindex")
    if not (row.state & 0xc0 or row.place == FDP_MASTER and row.flags & FDP_LEARNED):
        raise Unsupported(f"{entry} would age by itself",
                          hint="state: give NUD_PERMANENT, or NUD_NOARP (static)")
    if row.place == FDP_SELF and not row.nexthop and not remote.family:
        raise ConfigError(f"{entry} leads nowhere", hint="give endpoint, nexthop or master")
    if row.nexthop and (entry.endpoint or entry.vni or entry.port or entry.via):
        raise ConfigError(f"{entry} leads to a nexthop group and elsewhere",
                          hint="with nexthop, leave out endpoint, vni, port and via")
    if row.vlan > 4094 or remote.vni >> 24 or row.src_vni >> 24:
        raise ConfigError(f"{entry} has a number that is too large",
                          hint="a VLAN is at most 4094, a VNI at most 16777215")
    return 0


cdef int _read_fdb_scope(object scope, str kind, fdp_scope *to) except -1:
    owner, side = scope.owner, scope.side
    if owner not in _FDB_OWNERS:
        raise ConfigError(f"owner {_shown(owner)} of {_shown(scope)} is unknown",
                          hint='owner: give "all", "plain" or "extern_learn"')
    if side not in _FDB_SIDES:
        raise ConfigError(f"side {_shown(side)} of {_shown(scope)} is unknown",
                          hint='side: give "self", "master", or "" for both')
    if kind == "fdb" and side != "self":
        raise ConfigError(f"{_shown(scope)} is of a bridge, whose entries a fdb table cannot hold",
                          hint='kind: give "fdb_any"')
    to.owner, to.sides = _FDB_OWNERS[owner], _FDB_SIDES[side]
    return 0


def has_lists(const uint8_t[:, :] macs):
    """Return whether one of these MACs is zero or a group's: one that may have several
    destinations."""
    cdef Py_ssize_t i, j
    cdef uint8_t mac[6]
    if macs.shape[1] != 6:
        raise ValueError(f"a MAC has 6 bytes, the column {macs.shape[1]}")
    for i in range(macs.shape[0]):
        for j in range(6):
            mac[j] = macs[i, j]
        if fdp_has_list(mac):
            return True
    return False


def table_has_lists(Table table not None):
    """Return whether a table of kind "fdb" has a MAC that may have several destinations."""
    cdef uint32_t i
    if table.table.kind != FDP_FDB:
        raise ValueError(f"this is a {table.kind} table")
    table._look()
    for i in range(table.table.count):
        if fdp_has_list((<fdp_fdb *>fdp_table_row(&table.table, i)).mac):
            return True
    return False


def widen(Table table not None):
    """Return an FDB table of kind "fdb" as one of kind "fdb_any", with the same tags."""
    cdef Table wide = Table("fdb_any")
    cdef fdp_row row
    cdef uint32_t i
    if table.table.kind != FDP_FDB:
        raise ValueError(f"this is a {table.kind} table")
    table._look()
    _check(fdp_table_reserve(&wide.table, table.table.count))
    for i in range(table.table.count):
        fdp_fdb_widen(<fdp_fdb *>fdp_table_row(&table.table, i), &row.fdb_any)
        _check(fdp_table_put(&wide.table, &row))
    return wide


def fdb_devices(Table table not None):
    """Return ``{ifindex: bits}`` of the devices of an fdb_any table about which more has to be
    known: 1 where their VNI or port is named, 2 a source VNI, 4 a bridge and no VLAN."""
    cdef dict found = {}
    cdef fdp_fdb_any *row
    cdef fdp_remote *remote
    cdef uint32_t i, last = 0
    cdef int told = 0, named
    if table.table.kind != FDP_FDB_ANY:
        raise ValueError(f"this is a {table.kind} table")
    table._look()
    for i in range(table.table.count):
        row = <fdp_fdb_any *>fdp_table_row(&table.table, i)
        remote = fdp_fdb_remote(row)
        named = (1 if remote.vni or remote.port else 0) | (2 if row.src_vni else 0)
        if row.place == FDP_MASTER and not row.vlan:
            named |= 4
        if not named or (row.ifindex == last and told & named == named):
            continue
        last, told = row.ifindex, named | found.get(row.ifindex, 0)
        found[last] = told
    return found


def settle_fdb(Table table not None, uint32_t device, uint32_t vni, uint16_t port):
    """Return an fdb_any table, with the same tags, in which no entry of ``device`` names its own
    VNI and port: the kernel leaves them out. The same table where none does."""
    cdef Table settled
    cdef fdp_row row
    cdef fdp_remote remote
    cdef fdp_remote *at
    cdef uint32_t i, hits = 0
    if table.table.kind != FDP_FDB_ANY:
        raise ValueError(f"this is a {table.kind} table")
    table._look()
    for i in range(table.table.count):
        at = fdp_fdb_remote(<fdp_fdb_any *>fdp_table_row(&table.table, i))
        hits += (at.vni and at.vni == vni) or (at.port and at.port == port)
    if not hits:
        return table
    settled = Table("fdb_any")
    for i in range(table.table.count):
        memcpy(&row, fdp_table_row(&table.table, i), table.table.layout.row)
        if row.fdb_any.ifindex == device:
            memcpy(&remote, fdp_fdb_remote(&row.fdb_any), sizeof(remote))
            remote.vni = 0 if remote.vni == vni else remote.vni
            remote.port = 0 if remote.port == port else remote.port
            fdp_fdb_settle(&row.fdb_any, &remote)
        _check(fdp_table_put(&settled.table, &row))
    return settled
