/* SPDX-License-Identifier: Apache-2.0
 *
 * Packed tables: fixed-size rows in one block of memory, found by key through
 * an open-addressing index, and the difference between such a table and a
 * stream of rows that the kernel holds.
 *
 * A row is  key | value | tag.  Keys are what the kernel keys the object by.
 * The tag says whose row it is: the caller's number of the peer or entry.
 * All bytes of a row that carry nothing are zero, so that memcmp() decides.
 *
 * Nothing here allocates on its own: memory comes from the realloc function
 * the caller hands over (size 0 frees), nothing knows about Python or sockets.
 */
#ifndef FDP_TABLE_H
#define FDP_TABLE_H

#include <stddef.h>
#include <stdint.h>

typedef void *(*fdp_realloc_fn)(void *old, size_t bytes);

enum fdp_kind {
    FDP_NEIGHBOUR,
    FDP_FDB, /* as flannel has it: one destination a MAC */
    FDP_NEXTHOP,
    FDP_ROUTE,
    FDP_PEER,
    FDP_FDB_ANY, /* as the kernel has it */
    FDP_KINDS,
};

/* One entry of the ARP/ND table: `ip neigh`. */
struct fdp_neighbour {
    uint32_t ifindex;
    uint8_t family, pad[3];
    uint8_t address[16];
    /* value */
    uint8_t mac[6];
    uint16_t state;
    uint32_t tag;
    uint8_t other, pad2[3]; /* flags that we never set; no part of the value */
};

/* One remote of a vxlan forwarding entry: `bridge fdb`. */
struct fdp_fdb {
    uint32_t ifindex;
    uint8_t mac[6], on_nexthop, pad;
    uint32_t src_vni; /* of a device with several VNIs; in no table of ours */
    /* value; the entry's state is not part of where it points to */
    uint8_t endpoint[16];
    uint32_t vni;     /* 0: the device's */
    uint32_t via;     /* underlay ifindex, 0: the device's */
    uint32_t nexthop; /* fdb nexthop group, 0: none */
    uint16_t port;    /* host order, 0: the device's */
    uint8_t family, pad2;
    uint16_t state;
    uint8_t other, pad3; /* flags that we never set: NTF_EXT_LEARNED, NTF_ROUTER, NTF_STICKY */
    uint32_t tag;
};

/* Where an FDB entry leads to. All zero: by a nexthop group, or out of the port itself. */
struct fdp_remote {
    uint8_t endpoint[16];
    uint32_t vni;  /* 0: the device's */
    uint32_t via;  /* underlay ifindex, 0: the device's */
    uint16_t port; /* host order, 0: the device's */
    uint8_t family, pad;
};

/* One destination of any FDB entry, of a vxlan device or of a bridge: `bridge fdb`. The kernel
 * keeps one destination of a unicast MAC, and a list of a group's MAC and of the zero MAC
 * (vxlan_fdb_update_existing), whose destinations are told apart by where they lead to. */
struct fdp_fdb_any {
    uint32_t ifindex;
    uint8_t mac[6];
    uint16_t vlan;            /* of a bridge; 0: none */
    uint32_t src_vni;         /* of a device with several VNIs */
    struct fdp_remote listed; /* of a list's MAC */
    uint8_t place;            /* enum fdp_place */
    uint8_t many, pad[2];     /* enum fdp_many */
    /* value */
    struct fdp_remote remote; /* of any other MAC */
    uint32_t nexthop;         /* fdb nexthop group, 0: none */
    uint16_t state;           /* as fdp_fdb_state() has it */
    uint8_t flags, pad2;      /* enum fdp_fdb_flags */
    uint32_t tag;
    uint32_t master;      /* the bridge; it follows from the port, and is no part of the value */
    uint8_t shown, pad3[3]; /* what nobody can set: enum fdp_fdb_shown */
};

enum fdp_place { FDP_SELF = 1, FDP_MASTER = 2 };

/* Of a MAC that may have several destinations. */
enum fdp_many { FDP_ONE = 0, FDP_LISTED = 1, FDP_LIST_ON_NEXTHOP = 2 };

/* NTF_EXT_LEARNED, NTF_STICKY, NTF_ROUTER of linux/neighbour.h. */
enum fdp_fdb_flags { FDP_LEARNED = 0x10, FDP_STICKY = 0x40, FDP_ROUTER = 0x80 };

enum fdp_fdb_shown {
    FDP_UNREAD = 1, /* an attribute that is not known here */
    FDP_LOCKED = 2,
    FDP_ACTIVITY = 4,
    FDP_INACTIVE = 8,
    FDP_OFFLOADED = 0x20, /* NTF_OFFLOADED */
};

/* One nexthop object: `ip nexthop`. */
struct fdp_nexthop {
    uint32_t id, pad;
    /* value */
    uint8_t gateway[16];
    uint32_t ifindex;
    uint8_t family, onlink, protocol, other; /* other: enum fdp_other_nexthop */
    uint32_t tag, pad2;
};

enum fdp_other_nexthop {
    FDP_GROUP = 1,
    FDP_BLACKHOLE = 2,
    FDP_NEXTHOP_ENCAP = 4,
    FDP_FOR_FDB = 8,
};

enum fdp_other_route {
    FDP_DRESSED = 1, /* a source address, or metrics other than an MTU */
    FDP_PATHS = 2,   /* several paths */
    FDP_VIA = 4,     /* a gateway of the other family */
    FDP_ENCAP = 8,
    FDP_FROM = 16,   /* for some sources only */
    FDP_ELSEWHERE = FDP_PATHS | FDP_VIA | FDP_ENCAP | FDP_FROM,
};

/* One route: `ip route`. */
struct fdp_route {
    uint8_t family, length, tos, pad;
    uint32_t table;
    uint32_t metric;
    uint8_t prefix[16];
    uint32_t pad2;
    /* value */
    uint8_t gateway[16];
    uint32_t nexthop; /* nexthop object's id; then gateway and ifindex are 0 */
    uint32_t ifindex;
    uint8_t gateway_family, onlink, protocol, type;
    uint8_t other, pad3; /* what we never set: enum fdp_other_route */
    uint16_t mtu;        /* of the route itself; 0: the device's */
    uint32_t tag, pad4;
};

/* One peer in a BPF map: the program on the device forwards by it. */
struct fdp_peer {
    uint32_t map; /* descriptor of the map, which is of one family */
    uint8_t family, length, pad[2];
    uint8_t prefix[16];
    /* value, as it stands in the map */
    uint8_t endpoint[16];
    uint8_t mac[6];
    uint8_t endpoint_family, pad2;
    uint32_t tag, pad3;
};

union fdp_row {
    struct fdp_neighbour neighbour;
    struct fdp_fdb fdb;
    struct fdp_nexthop nexthop;
    struct fdp_route route;
    struct fdp_peer peer;
    struct fdp_fdb_any fdb_any;
    uint8_t bytes[96];
};

struct fdp_layout {
    uint16_t key;    /* bytes, from 0; a multiple of 8 */
    uint16_t target; /* bytes of the value that say where it leads */
    uint16_t value;  /* bytes of the whole value */
    uint16_t row;    /* bytes of a row */
    uint8_t many;    /* the kernel may hold several values under one key */
};

extern const struct fdp_layout fdp_layouts[FDP_KINDS];

struct fdp_table {
    const struct fdp_layout *layout;
    fdp_realloc_fn realloc;
    uint8_t *rows;
    uint32_t *slots; /* row number + 1; 0 is free */
    uint64_t seed;
    uint32_t count, room, mask;
    uint8_t kind;
};

void fdp_table_init(struct fdp_table *table, enum fdp_kind kind, uint64_t seed,
                    fdp_realloc_fn realloc);
void fdp_table_free(struct fdp_table *table);

/* Make room for `count` rows in all. 0 or -ENOMEM. */
int fdp_table_reserve(struct fdp_table *table, uint32_t count);

/* Insert, or overwrite the row of the same key. 1 new, 0 overwritten, -ENOMEM. */
int fdp_table_put(struct fdp_table *table, const void *row);

/* Row number of a key, or -1. */
int64_t fdp_table_find(const struct fdp_table *table, const void *key);

/* Remove a key; the last row takes its place. 1 removed, 0 was not there. */
int fdp_table_remove(struct fdp_table *table, const void *key);

static inline uint8_t *fdp_table_row(const struct fdp_table *table, uint32_t number)
{
    return table->rows + (size_t)number * table->layout->row;
}

/* The tag of a row of this layout. */
static inline uint32_t *fdp_row_tag(const struct fdp_layout *layout, void *row)
{
    return (uint32_t *)((uint8_t *)row + layout->key + layout->value);
}

/* What a row read from the kernel is to us. */
enum fdp_owner {
    FDP_SKIP = 0,    /* not a row of this table */
    FDP_OURS = 1,    /* goes unless it is wanted */
    FDP_FOREIGN = 2, /* stays, even where it conflicts with ours */
    FDP_YIELDS = 3,  /* stays, unless it conflicts with ours */
    FDP_SHARED = 4,  /* ours where it is as we want it, else foreign */
};

enum fdp_op_kind { FDP_ADD = 1, FDP_REPLACE = 2, FDP_REMOVE = 3 };

#define FDP_NONE UINT32_MAX

struct fdp_op {
    uint32_t kind;    /* enum fdp_op_kind */
    uint32_t desired; /* row of the desired table; FDP_NONE in a removal */
    uint32_t old;     /* row of fdp_diff.old; FDP_NONE in an addition */
};

struct fdp_diff {
    const struct fdp_table *desired;
    fdp_realloc_fn realloc;
    uint32_t *seen;   /* per desired row, see table.c */
    uint8_t *old;     /* rows that differ or have to go, as the kernel has them */
    uint8_t *fate;    /* per old row, see table.c */
    struct fdp_op *ops;
    uint32_t old_count, old_room;
    uint32_t writes;  /* ops[0..writes) add or replace */
    uint32_t removes; /* ops[writes..writes+removes) remove */
    uint32_t adds, unchanged, observed, foreign, conflicts;
    uint8_t removes_first; /* the kernel takes some of the writes only after the removals */
};

/* Begin. The desired table must not change until the diff is freed. 0 or -ENOMEM. */
int fdp_diff_begin(struct fdp_diff *diff, const struct fdp_table *desired, fdp_realloc_fn realloc);

/* Forget what was fed, keep the memory: for a dump that has to be repeated. */
void fdp_diff_restart(struct fdp_diff *diff);

/* Feed one row that the kernel holds. 0 or -ENOMEM. */
int fdp_diff_feed(struct fdp_diff *diff, const void *row, enum fdp_owner owner);

/* Feed several, `stride` bytes apart; owners NULL: all ours. The memory of many
 * rows is asked for before the first of them is read. 0 or -ENOMEM. */
int fdp_diff_feed_many(struct fdp_diff *diff, const void *rows, size_t stride,
                       const uint8_t *owners, uint32_t count);

/* Everything was fed: work out ops. 0 or -ENOMEM. */
int fdp_diff_finish(struct fdp_diff *diff);

/* Old rows that hold the place of a desired row and are not ours: call with
 * `from` 0, then the answer + 1; FDP_NONE when there are no more. */
uint32_t fdp_diff_next_conflict(const struct fdp_diff *diff, uint32_t from);

/* Whether a row read from the kernel holds what no table can. */
int fdp_row_misfits(enum fdp_kind kind, const void *row);

/* What fdp_diff_finish() would have changed though no table can hold it: the first old
 * row that misfits (`second` is NULL), or one of several values under a key that the
 * kernel may hold several under (`second` is another). 1 found, 0 there is none, -ENOMEM. */
int fdp_diff_misfit(const struct fdp_diff *diff, const uint8_t **row, const uint8_t **second);

/* Whether the kernel cannot change an old row into the wanted one of its key: it has to be
 * removed and added. */
int fdp_row_must_go(enum fdp_kind kind, const void *old, const void *wanted);

/* The state of an FDB entry as the kernel treats it: NUD_PERMANENT, or NUD_NOARP for what does
 * not age either, whatever other bits there are (vxlan_cleanup, br_fdb_cleanup). */
static inline uint16_t fdp_fdb_state(uint16_t state)
{
    return state & 0x80 ? 0x80 : state & 0x40 ? 0x40 : state;
}

/* Whether the kernel may keep several destinations of a MAC. */
static inline int fdp_has_list(const uint8_t mac[6])
{
    return mac[0] & 1 || !(mac[0] | mac[1] | mac[2] | mac[3] | mac[4] | mac[5]);
}

/* The same entry as a row of any FDB. */
void fdp_fdb_widen(const struct fdp_fdb *row, struct fdp_fdb_any *to);

/* Put the destination where the key of this MAC has it; place, mac and nexthop are set. */
void fdp_fdb_settle(struct fdp_fdb_any *row, const struct fdp_remote *remote);

/* The destination of a row. */
static inline struct fdp_remote *fdp_fdb_remote(struct fdp_fdb_any *row)
{
    return row->many == FDP_LISTED ? &row->listed : &row->remote;
}

/* Whether two rows of one key lead to different places. */
int fdp_rows_differ(const struct fdp_layout *layout, const void *row, const void *other);

/* That old row is ours to replace after all; fdp_diff_finish() has to follow. */
void fdp_diff_adopt(struct fdp_diff *diff, uint32_t old);

void fdp_diff_free(struct fdp_diff *diff);

static inline uint8_t *fdp_diff_old(const struct fdp_diff *diff, uint32_t number)
{
    return diff->old + (size_t)number * diff->desired->layout->row;
}

#endif
