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

enum fdp_kind { FDP_NEIGHBOUR, FDP_FDB, FDP_NEXTHOP, FDP_ROUTE, FDP_PEER, FDP_KINDS };

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
    uint8_t other, pad3; /* flags that we never set: NTF_EXT_LEARNED, NTF_ROUTER */
    uint32_t tag;
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
    FDP_DRESSED = 1, /* a source address or metrics */
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
    uint8_t other, pad3[3]; /* what we never set: enum fdp_other_route */
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
    uint8_t bytes[80];
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
