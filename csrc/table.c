/* SPDX-License-Identifier: Apache-2.0 */
#include "table.h"

#include <errno.h>
#include <string.h>

#define SIZE_OF(type, member) sizeof(((struct type *)0)->member)
#define FROM_TO(type, first, last) \
    (offsetof(struct type, last) + SIZE_OF(type, last) - offsetof(struct type, first))

#define LAYOUT(type, value_first, target_last, value_last, many_values)                     \
    {                                                                                       \
        .key = offsetof(struct type, value_first),                                          \
        .target = FROM_TO(type, value_first, target_last),                                  \
        .value = FROM_TO(type, value_first, value_last), .row = sizeof(struct type),        \
        .many = many_values,                                                                \
    }

const struct fdp_layout fdp_layouts[FDP_KINDS] = {
    [FDP_NEIGHBOUR] = LAYOUT(fdp_neighbour, mac, mac, state, 0),
    [FDP_FDB] = LAYOUT(fdp_fdb, endpoint, pad2, pad3, 1),
    [FDP_NEXTHOP] = LAYOUT(fdp_nexthop, gateway, other, other, 0),
    [FDP_ROUTE] = LAYOUT(fdp_route, gateway, mtu, mtu, 1),
    [FDP_PEER] = LAYOUT(fdp_peer, endpoint, pad2, pad2, 0),
    [FDP_FDB_ANY] = LAYOUT(fdp_fdb_any, remote, nexthop, pad2, 0),
};

_Static_assert(offsetof(struct fdp_neighbour, mac) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(offsetof(struct fdp_fdb, endpoint) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(offsetof(struct fdp_nexthop, gateway) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(offsetof(struct fdp_route, gateway) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(offsetof(struct fdp_peer, endpoint) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(offsetof(struct fdp_fdb_any, remote) % 8 == 0, "keys are hashed by 8 bytes");
_Static_assert(sizeof(struct fdp_neighbour) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(sizeof(struct fdp_fdb) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(sizeof(struct fdp_nexthop) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(sizeof(struct fdp_route) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(sizeof(struct fdp_peer) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(sizeof(struct fdp_fdb_any) % 8 == 0, "rows are copied by 8 bytes");
_Static_assert(offsetof(struct fdp_neighbour, tag) == 32, "the tag follows the value");
_Static_assert(offsetof(struct fdp_fdb, tag) == 16 + FROM_TO(fdp_fdb, endpoint, pad3), "as above");
_Static_assert(offsetof(struct fdp_nexthop, tag) == 32, "as above");
_Static_assert(offsetof(struct fdp_peer, tag) == 48, "as above");
_Static_assert(offsetof(struct fdp_fdb_any, tag) == 48 + FROM_TO(fdp_fdb_any, remote, pad2), "as above");
_Static_assert(offsetof(struct fdp_route, tag) == 32 + FROM_TO(fdp_route, gateway, mtu), "as above");

void fdp_table_init(struct fdp_table *table, enum fdp_kind kind, uint64_t seed,
                    fdp_realloc_fn realloc)
{
    memset(table, 0, sizeof *table);
    table->layout = &fdp_layouts[kind];
    table->kind = (uint8_t)kind;
    table->seed = seed;
    table->realloc = realloc;
}

void fdp_table_free(struct fdp_table *table)
{
    if (table->rows)
        table->realloc(table->rows, 0);
    if (table->slots)
        table->realloc(table->slots, 0);
    table->rows = NULL;
    table->slots = NULL;
    table->count = table->room = table->mask = 0;
}

/* Multiply and fold, eight bytes at a time. The seed is the table's own, so
 * that no author of leases can choose keys that collide. */
static inline uint32_t hash_key(const struct fdp_table *table, const uint8_t *key)
{
    uint64_t hash = table->seed;

    for (uint32_t i = 0; i < table->layout->key; i += 8) {
        uint64_t word;

        memcpy(&word, key + i, 8);
        __uint128_t wide = (__uint128_t)(word ^ hash ^ 0x9e3779b97f4a7c15u) * 0xd6e8feb86659fd93u;
        hash = (uint64_t)wide ^ (uint64_t)(wide >> 64);
    }
    return (uint32_t)(hash ^ (hash >> 32));
}

/* memcmp() == 0 without the call: keys and values are a few words long. */
static inline int same_bytes(const uint8_t *a, const uint8_t *b, size_t size)
{
    uint64_t left, right;

    for (; size >= 8; size -= 8, a += 8, b += 8) {
        memcpy(&left, a, 8);
        memcpy(&right, b, 8);
        if (left != right)
            return 0;
    }
    for (; size; size--, a++, b++)
        if (*a != *b)
            return 0;
    return 1;
}

/* memcpy() of whole words without the call. */
static inline void copy_words(uint8_t *to, const uint8_t *from, size_t size)
{
    for (; size >= 8; size -= 8, to += 8, from += 8)
        memcpy(to, from, 8);
}

static void rebuild_index(struct fdp_table *table)
{
    memset(table->slots, 0, ((size_t)table->mask + 1) * sizeof *table->slots);
    for (uint32_t i = 0; i < table->count; i++) {
        uint32_t at = hash_key(table, fdp_table_row(table, i)) & table->mask;

        while (table->slots[at])
            at = (at + 1) & table->mask;
        table->slots[at] = i + 1;
    }
}

int fdp_table_reserve(struct fdp_table *table, uint32_t count)
{
    if (count <= table->room)
        return 0;
    if (count > (1u << 30))
        return -ENOMEM;

    uint8_t *rows = table->realloc(table->rows, (size_t)count * table->layout->row);
    if (!rows)
        return -ENOMEM;
    table->rows = rows;

    uint32_t slots = 8;
    while (slots < count * 2)
        slots *= 2;
    if (slots != table->mask + 1 || !table->slots) {
        uint32_t *index = table->realloc(table->slots, (size_t)slots * sizeof *index);
        if (!index)
            return -ENOMEM; /* the old index went with realloc's contract: still valid */
        table->slots = index;
        table->mask = slots - 1;
        rebuild_index(table);
    }
    table->room = count;
    return 0;
}

/* The slot that holds the key, or the free slot where it would go. */
static inline uint32_t probe(const struct fdp_table *table, const uint8_t *key)
{
    const size_t size = table->layout->key;
    uint32_t at = hash_key(table, key) & table->mask;

    while (table->slots[at] &&
           !same_bytes(fdp_table_row(table, table->slots[at] - 1), key, size))
        at = (at + 1) & table->mask;
    return at;
}

int64_t fdp_table_find(const struct fdp_table *table, const void *key)
{
    if (!table->count)
        return -1;
    return (int64_t)table->slots[probe(table, key)] - 1;
}

int fdp_table_put(struct fdp_table *table, const void *row)
{
    if (table->count == table->room) {
        int err = fdp_table_reserve(table, table->room < 4 ? 8 : table->room + table->room / 2);
        if (err)
            return err;
    }

    uint32_t at = probe(table, row);
    uint32_t number = table->slots[at];
    if (number) {
        copy_words(fdp_table_row(table, number - 1), row, table->layout->row);
        return 0;
    }
    copy_words(fdp_table_row(table, table->count), row, table->layout->row);
    table->slots[at] = ++table->count;
    return 1;
}

/* Close the hole at `hole`: move back every later entry of its probe run that
 * would not be found across the hole. */
static void close_hole(struct fdp_table *table, uint32_t hole)
{
    uint32_t at = hole;

    for (;;) {
        at = (at + 1) & table->mask;
        if (!table->slots[at])
            break;
        uint32_t home = hash_key(table, fdp_table_row(table, table->slots[at] - 1)) & table->mask;
        if (((at - home) & table->mask) >= ((at - hole) & table->mask)) {
            table->slots[hole] = table->slots[at];
            hole = at;
        }
    }
    table->slots[hole] = 0;
}

int fdp_table_remove(struct fdp_table *table, const void *key)
{
    if (!table->count)
        return 0;
    uint32_t at = probe(table, key);
    if (!table->slots[at])
        return 0;

    uint32_t number = table->slots[at] - 1, last = table->count - 1;
    close_hole(table, at);
    if (number != last) {
        uint8_t *moved = fdp_table_row(table, last);

        table->slots[probe(table, moved)] = number + 1;
        memcpy(fdp_table_row(table, number), moved, table->layout->row);
    }
    table->count = last;
    return 1;
}

/* fdp_diff.seen holds, per desired row: */
enum {
    UNSEEN = 0,
    EQUAL = 1,
    FOREIGN = 2,
    GOES = 3,    /* the old row is removed, then the wanted one is added */
    DIFFERS = 4, /* + number of the old row */
};

/* fdp_diff.fate holds, per old row: */
enum { DROPPED, REPLACED, REMOVED, CONFLICT };

int fdp_diff_begin(struct fdp_diff *diff, const struct fdp_table *desired, fdp_realloc_fn realloc)
{
    memset(diff, 0, sizeof *diff);
    diff->desired = desired;
    diff->realloc = realloc;
    if (desired->count) {
        diff->seen = realloc(NULL, desired->count * sizeof *diff->seen);
        if (!diff->seen)
            return -ENOMEM;
    }
    fdp_diff_restart(diff);
    return 0;
}

void fdp_diff_restart(struct fdp_diff *diff)
{
    if (diff->seen)
        memset(diff->seen, 0, diff->desired->count * sizeof *diff->seen);
    diff->old_count = diff->writes = diff->removes = 0;
    diff->adds = diff->unchanged = diff->observed = diff->foreign = diff->conflicts = 0;
    diff->removes_first = 0;
}

static int keep_old(struct fdp_diff *diff, const void *row, uint8_t fate)
{
    const size_t size = diff->desired->layout->row;

    if (diff->old_count == diff->old_room) {
        uint32_t room = diff->old_room ? diff->old_room * 2 : 64;
        uint8_t *old = diff->realloc(diff->old, (size_t)room * size);
        if (!old)
            return -ENOMEM;
        diff->old = old;
        uint8_t *fates = diff->realloc(diff->fate, room);
        if (!fates)
            return -ENOMEM;
        diff->fate = fates;
        diff->old_room = room;
    }
    memcpy(diff->old + (size_t)diff->old_count * size, row, size);
    diff->fate[diff->old_count++] = fate;
    return 0;
}

/* What became of the row that a later one of its key makes obsolete. One that
 * leads where the wanted row does is the same object, which the dump showed
 * twice: to remove it would be to remove what is wanted. */
static void drop_old(struct fdp_diff *diff, uint32_t old, const uint8_t *wanted)
{
    const struct fdp_layout *layout = diff->desired->layout;
    const uint8_t *value = fdp_diff_old(diff, old) + layout->key;

    diff->fate[old] =
        layout->many && !same_bytes(value, wanted, layout->target) ? REMOVED : DROPPED;
}

/* A second value under one key. Where the kernel really holds several (FDB
 * remotes, appended routes) the ones that lead elsewhere have to go; where it
 * cannot, the dump caught the entry twice while it changed, and the last word
 * counts. */
static int feed_known(struct fdp_diff *diff, uint32_t number, const uint8_t *row)
{
    const struct fdp_layout *layout = diff->desired->layout;
    const uint8_t *value = row + layout->key;
    const uint8_t *wanted = fdp_table_row(diff->desired, number) + layout->key;
    uint32_t *seen = &diff->seen[number];
    int err;

    if (*seen == GOES)
        return 0; /* whatever a dump of a table that is being changed shows of it now */
    if (fdp_row_must_go((enum fdp_kind)diff->desired->kind, row,
                        fdp_table_row(diff->desired, number))) {
        *seen = GOES;
        diff->removes_first = 1;
        return keep_old(diff, row, REMOVED);
    }
    if (same_bytes(value, wanted, layout->target)) {
        if (*seen >= DIFFERS)
            drop_old(diff, *seen - DIFFERS, wanted);
        if (same_bytes(value, wanted, layout->value)) {
            *seen = EQUAL;
            return 0;
        }
        *seen = DIFFERS + diff->old_count;
        return keep_old(diff, row, REPLACED);
    }
    if (*seen == UNSEEN || (*seen == EQUAL && !layout->many)) {
        err = keep_old(diff, row, REPLACED);
        if (!err)
            *seen = DIFFERS + diff->old_count - 1;
        return err;
    }
    return layout->many ? keep_old(diff, row, REMOVED) : 0;
}

static int is_as_wanted(const struct fdp_diff *diff, uint32_t number, const uint8_t *row)
{
    const struct fdp_layout *layout = diff->desired->layout;

    return same_bytes(fdp_table_row(diff->desired, number) + layout->key, row + layout->key,
                      layout->value);
}

int fdp_diff_feed(struct fdp_diff *diff, const void *row, enum fdp_owner owner)
{
    int64_t number = fdp_table_find(diff->desired, row);

    diff->observed++;
    if (owner == FDP_SHARED)
        owner = number >= 0 && is_as_wanted(diff, (uint32_t)number, row) ? FDP_OURS : FDP_FOREIGN;
    if (number >= 0 && owner != FDP_FOREIGN)
        return feed_known(diff, (uint32_t)number, row);
    if (owner == FDP_OURS)
        return keep_old(diff, row, REMOVED);

    diff->foreign++;
    if (number < 0 || diff->seen[number] != UNSEEN)
        return 0; /* no conflict */
    diff->seen[number] = FOREIGN;
    return keep_old(diff, row, CONFLICT);
}

/* What the kernel shows comes in its own order: with a large table every look
 * is a cache miss, first in the index and then in the rows. Rows are taken in
 * groups, so that the misses of a group overlap. */
enum { GROUP = 32 };

static int feed_group(struct fdp_diff *diff, const uint8_t *rows, size_t stride,
                      const uint8_t *owners, uint32_t count)
{
    const struct fdp_table *desired = diff->desired;
    const size_t whole = (size_t)desired->layout->key + desired->layout->value;
    uint32_t at[GROUP];

    for (uint32_t i = 0; i < count; i++) {
        at[i] = hash_key(desired, rows + i * stride) & desired->mask;
        __builtin_prefetch(&desired->slots[at[i]]);
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = desired->slots[at[i]];

        if (number) {
            const uint8_t *row = fdp_table_row(desired, number - 1);

            __builtin_prefetch(row);
            __builtin_prefetch(row + 63);
            __builtin_prefetch(&diff->seen[number - 1], 1);
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t number = desired->slots[at[i]];
        const uint8_t *row = rows + i * stride;
        enum fdp_owner owner = owners ? (enum fdp_owner)owners[i] : FDP_OURS;

        /* The usual case: in its place, ours, and right. */
        if (number && owner != FDP_FOREIGN && diff->seen[number - 1] == UNSEEN &&
            same_bytes(fdp_table_row(desired, number - 1), row, whole)) {
            diff->observed++;
            diff->seen[number - 1] = EQUAL;
            continue;
        }
        int err = fdp_diff_feed(diff, row, owner);
        if (err)
            return err;
    }
    return 0;
}

int fdp_diff_feed_many(struct fdp_diff *diff, const void *rows, size_t stride,
                       const uint8_t *owners, uint32_t count)
{
    const uint8_t *at = rows;

    if (!diff->desired->count) {
        for (uint32_t i = 0; i < count; i++) {
            int err = fdp_diff_feed(diff, at + i * stride,
                                    owners ? (enum fdp_owner)owners[i] : FDP_OURS);
            if (err)
                return err;
        }
        return 0;
    }
    for (uint32_t from = 0; from < count; from += GROUP) {
        uint32_t some = count - from < GROUP ? count - from : GROUP;
        int err = feed_group(diff, at + from * stride, stride, owners ? owners + from : NULL, some);

        if (err)
            return err;
    }
    return 0;
}

/* Whether a list of destinations becomes a nexthop group or the reverse, or is marked as learned:
 * both are of the MAC, and the kernel keeps what it has while a destination is left. */
static int list_is_replaced(const struct fdp_diff *diff)
{
    int writes = 0, removes = 0;

    for (uint32_t i = 0; i < diff->writes; i++) {
        const union fdp_row *row = (const void *)fdp_table_row(diff->desired, diff->ops[i].desired);

        writes |= row->fdb_any.many;
        writes |= row->fdb_any.many && row->fdb_any.flags & FDP_LEARNED ? FDP_LIST_ON_NEXTHOP : 0;
    }
    for (uint32_t i = diff->writes; i < diff->writes + diff->removes; i++)
        removes |= ((const union fdp_row *)(const void *)fdp_diff_old(diff, diff->ops[i].old))
                       ->fdb_any.many;
    return writes && removes && (writes | removes) & FDP_LIST_ON_NEXTHOP;
}

/* An entry of a bridge without a VLAN is removed together with those of every VLAN of its port
 * (br_fdb_delete): what of them is wanted has to be added again. */
static void follow_to_vlans(struct fdp_diff *diff)
{
    for (uint32_t i = 0; i < diff->old_count; i++) {
        const union fdp_row *old = (const void *)fdp_diff_old(diff, i);

        if (diff->fate[i] != REMOVED || old->fdb_any.place != FDP_MASTER || old->fdb_any.vlan)
            continue;
        for (uint32_t number = 0; number < diff->desired->count; number++) {
            const union fdp_row *row = (const void *)fdp_table_row(diff->desired, number);

            if (diff->seen[number] != EQUAL || row->fdb_any.place != FDP_MASTER ||
                row->fdb_any.ifindex != old->fdb_any.ifindex ||
                memcmp(row->fdb_any.mac, old->fdb_any.mac, sizeof row->fdb_any.mac) != 0)
                continue;
            diff->seen[number] = GOES;
            diff->removes_first = 1;
        }
    }
}

int fdp_diff_finish(struct fdp_diff *diff)
{
    const uint32_t count = diff->desired->count;
    uint32_t needed = diff->old_count;

    if (diff->desired->kind == FDP_FDB_ANY)
        follow_to_vlans(diff);
    for (uint32_t i = 0; i < count; i++)
        needed += diff->seen[i] != EQUAL;
    struct fdp_op *ops = diff->realloc(diff->ops, ((size_t)needed + 1) * sizeof *ops);
    if (!ops)
        return -ENOMEM;
    diff->ops = ops;

    diff->adds = diff->unchanged = diff->conflicts = 0;
    for (uint32_t i = 0; i < count; i++) {
        switch (diff->seen[i]) {
        case UNSEEN:
        case GOES:
            *ops++ = (struct fdp_op){FDP_ADD, i, FDP_NONE};
            diff->adds++;
            break;
        case EQUAL:
            diff->unchanged++;
            break;
        case FOREIGN:
            diff->conflicts++;
            break;
        default:
            *ops++ = (struct fdp_op){FDP_REPLACE, i, diff->seen[i] - DIFFERS};
        }
    }
    diff->writes = (uint32_t)(ops - diff->ops);
    for (uint32_t i = 0; i < diff->old_count; i++)
        if (diff->fate[i] == REMOVED)
            *ops++ = (struct fdp_op){FDP_REMOVE, FDP_NONE, i};
    diff->removes = (uint32_t)(ops - diff->ops) - diff->writes;
    if (diff->desired->kind == FDP_FDB_ANY && !diff->removes_first)
        diff->removes_first = (uint8_t)list_is_replaced(diff);
    return 0;
}

uint32_t fdp_diff_next_conflict(const struct fdp_diff *diff, uint32_t from)
{
    for (uint32_t i = from; i < diff->old_count; i++)
        if (diff->fate[i] == CONFLICT)
            return i;
    return FDP_NONE;
}

int fdp_row_misfits(enum fdp_kind kind, const void *row)
{
    const union fdp_row *any = row;

    switch (kind) {
    case FDP_NEIGHBOUR:
        return any->neighbour.other != 0;
    case FDP_FDB:
        return any->fdb.other || any->fdb.src_vni;
    case FDP_FDB_ANY:
        return any->fdb_any.shown & FDP_UNREAD;
    case FDP_NEXTHOP:
        return any->nexthop.other != 0;
    case FDP_ROUTE:
        return (any->route.other & FDP_ELSEWHERE) != 0;
    default:
        return 0;
    }
}

int fdp_row_must_go(enum fdp_kind kind, const void *old, const void *wanted)
{
    const struct fdp_fdb_any *row = old, *want = wanted;

    if (kind != FDP_FDB_ANY)
        return 0;
    const int dressed = row->state != want->state || row->flags != want->flags;
    /* A bridge adds flags to an entry and takes none away (fdb_add_entry,
     * br_fdb_external_learn_add); of a vxlan device what a user added is marked as learned only
     * where it is new, and then keeps its state, and a nexthop group and a destination do not
     * replace each other (vxlan_fdb_update_existing). */
    if (row->place == FDP_MASTER || want->flags & FDP_LEARNED)
        return dressed;
    return !row->nexthop != !want->nexthop || (row->many && row->nexthop != want->nexthop);
}

int fdp_rows_differ(const struct fdp_layout *layout, const void *row, const void *other)
{
    return !same_bytes((const uint8_t *)row + layout->key, (const uint8_t *)other + layout->key,
                       layout->target);
}

/* Another value under the key of a row that is to be removed, or NULL. `gone` has the
 * rows of that kind before it, tagged with their numbers. */
static const uint8_t *other_value(const struct fdp_diff *diff, const struct fdp_table *gone,
                                  const uint8_t *row)
{
    const int64_t number = fdp_table_find(diff->desired, row), at = fdp_table_find(gone, row);
    const uint8_t *others[2] = {NULL, NULL};

    if (number >= 0 && diff->seen[number] == EQUAL)
        others[0] = fdp_table_row(diff->desired, (uint32_t)number);
    if (number >= 0 && diff->seen[number] >= DIFFERS)
        others[0] = fdp_diff_old(diff, diff->seen[number] - DIFFERS);
    if (at >= 0)
        others[1] = fdp_diff_old(diff, *fdp_row_tag(gone->layout,
                                                    fdp_table_row(gone, (uint32_t)at)));
    for (int i = 0; i < 2; i++) /* not the same one, which the dump showed twice */
        if (others[i] && fdp_rows_differ(gone->layout, others[i], row))
            return others[i];
    return NULL;
}

int fdp_diff_misfit(const struct fdp_diff *diff, const uint8_t **row, const uint8_t **second)
{
    const struct fdp_layout *layout = diff->desired->layout;
    struct fdp_table gone;
    int found = 0;

    fdp_table_init(&gone, (enum fdp_kind)diff->desired->kind, diff->desired->seed, diff->realloc);
    for (uint32_t i = 0; !found && i < diff->old_count; i++) {
        if (diff->fate[i] != REPLACED && diff->fate[i] != REMOVED)
            continue;
        *row = fdp_diff_old(diff, i);
        *second = NULL;
        found = fdp_row_misfits((enum fdp_kind)diff->desired->kind, *row);
        if (found || diff->fate[i] != REMOVED || !layout->many)
            continue;
        *second = other_value(diff, &gone, *row);
        found = *second != NULL;
        if (!found) {
            union fdp_row copy;

            memcpy(&copy, *row, layout->row);
            *fdp_row_tag(layout, &copy) = i;
            int err = fdp_table_put(&gone, &copy);
            if (err < 0)
                found = err;
        }
    }
    fdp_table_free(&gone);
    return found;
}

void fdp_diff_adopt(struct fdp_diff *diff, uint32_t old)
{
    int64_t number = fdp_table_find(diff->desired, fdp_diff_old(diff, old));

    if (number < 0 || diff->fate[old] != CONFLICT || diff->seen[number] != FOREIGN)
        return;
    diff->fate[old] = REPLACED;
    diff->seen[number] = DIFFERS + old;
}

void fdp_diff_free(struct fdp_diff *diff)
{
    void *blocks[] = {diff->seen, diff->old, diff->fate, diff->ops};

    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i])
            diff->realloc(blocks[i], 0);
    diff->seen = NULL;
    diff->old = diff->fate = NULL;
    diff->ops = NULL;
    diff->old_count = diff->old_room = 0;
}
