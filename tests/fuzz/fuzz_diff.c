/* SPDX-License-Identifier: Apache-2.0
 *
 * Changes to a table, and its difference from rows fed one after the other,
 * against arrays that are searched from end to end.
 *
 * Input: the kind, then three bytes for each step.
 */
#include "fuzz.h"
#include "table.h"

#include <errno.h>

#define MOST 64

struct model {
    union fdp_row rows[MOST];
    uint32_t count;
};

struct fed {
    union fdp_row row;
    enum fdp_owner owner;
};

static const struct fdp_layout *layout;

/* Few keys and few values, so that they meet. The bytes of a row that belong to
 * nothing stay zero. */
static union fdp_row row_of(uint8_t kind, uint8_t key, uint8_t value)
{
    union fdp_row row;

    memset(&row, 0, sizeof row);
    switch (kind) {
    case FDP_NEIGHBOUR:
        row.neighbour.ifindex = 1 + (key & 1);
        row.neighbour.address[3] = key >> 1 & 15;
        row.neighbour.mac[5] = value & 3;
        row.neighbour.state = value & 4 ? 0x80 : 0x40;
        row.neighbour.tag = value;
        break;
    case FDP_FDB:
        row.fdb.ifindex = 1 + (key & 1);
        row.fdb.mac[5] = key >> 1 & 15;
        row.fdb.endpoint[3] = value & 3;
        row.fdb.state = value & 4 ? 0x80 : 0xc0;
        row.fdb.tag = value;
        break;
    case FDP_FDB_ANY:
        row.fdb_any.ifindex = 1;
        row.fdb_any.mac[0] = key & 1;
        row.fdb_any.mac[4] = 2;
        row.fdb_any.mac[5] = key >> 1 & 1;
        row.fdb_any.place = key & 128 ? FDP_MASTER : FDP_SELF;
        row.fdb_any.vlan = row.fdb_any.place == FDP_MASTER ? key >> 5 & 1 : 0;
        row.fdb_any.nexthop = value & 16 ? 1 + (value & 1) : 0;
        row.fdb_any.state = value & 4 ? 0x80 : 0x40;
        row.fdb_any.flags = value & 8 ? FDP_LEARNED : 0;
        fdp_fdb_settle(&row.fdb_any, &(struct fdp_remote){.vni = value & 3});
        row.fdb_any.tag = value;
        break;
    case FDP_NEXTHOP:
        row.nexthop.id = 1 + (key & 31);
        row.nexthop.gateway[3] = value & 3;
        row.nexthop.protocol = value & 4;
        row.nexthop.tag = value;
        break;
    default:
        row.route.prefix[2] = key & 15;
        row.route.metric = key >> 4 & 1;
        row.route.nexthop = value & 3;
        row.route.onlink = value >> 2 & 1;
        row.route.tag = value;
    }
    return row;
}

static uint32_t place_of(const struct model *model, const union fdp_row *row)
{
    uint32_t i = 0;

    while (i < model->count && memcmp(&model->rows[i], row, layout->key) != 0)
        i++;
    return i;
}

static void check_table(const struct fdp_table *table, const struct model *model)
{
    CHECK(table->count == model->count);
    for (uint32_t i = 0; i < model->count; i++) {
        CHECK(memcmp(fdp_table_row(table, i), &model->rows[i], layout->row) == 0);
        CHECK(fdp_table_find(table, &model->rows[i]) == i);
    }
}

static void change(struct fdp_table *table, struct model *model, const union fdp_row *row, int put)
{
    const uint32_t at = place_of(model, row);
    const int known = at < model->count;

    CHECK(fdp_table_find(table, row) == (known ? (int64_t)at : -1));
    if (put) {
        CHECK(fdp_table_put(table, row) == !known);
        model->rows[at] = *row;
        model->count += !known;
    } else {
        CHECK(fdp_table_remove(table, row) == known);
        if (known)
            model->rows[at] = model->rows[--model->count];
    }
}

static int is(const union fdp_row *a, const union fdp_row *b, size_t from, size_t size)
{
    return memcmp((const uint8_t *)a + from, (const uint8_t *)b + from, size) == 0;
}

/* Whether an entry of a bridge without a VLAN is removed, and this one with it. */
static int goes_with_vlans(const struct fdp_diff *diff, const union fdp_row *wanted)
{
    int goes = 0;

    for (uint32_t i = diff->writes; i < diff->writes + diff->removes; i++) {
        const union fdp_row *old = (const void *)fdp_diff_old(diff, diff->ops[i].old);

        goes |= diff->desired->kind == FDP_FDB_ANY && old->fdb_any.place == FDP_MASTER &&
                wanted->fdb_any.place == FDP_MASTER && !old->fdb_any.vlan &&
                old->fdb_any.ifindex == wanted->fdb_any.ifindex &&
                memcmp(old->fdb_any.mac, wanted->fdb_any.mac, 6) == 0;
    }
    return goes;
}

/* What the kernel holds of one wanted row's key decides what becomes of it. Where
 * several values may stand under a key, the last row that leads where the wanted
 * one does counts, else the last row of all. A foreign row that came first keeps
 * the place, unless one of ours already leads where it should. */
static void check_wanted(const struct fdp_diff *diff, const struct fed *fed, uint32_t count,
                         uint32_t number, const struct fdp_op *op)
{
    const union fdp_row *wanted = (const void *)fdp_table_row(diff->desired, number);
    int same_key = 0, foreign_first = 0, on_target = 0, equal = 0, goes = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (!is(&fed[i].row, wanted, 0, layout->key))
            continue;
        foreign_first |= !same_key && fed[i].owner == FDP_FOREIGN;
        same_key = 1;
        if (fed[i].owner == FDP_FOREIGN)
            continue;
        const int there = is(&fed[i].row, wanted, layout->key, layout->target);

        goes |= fdp_row_must_go(diff->desired->kind, &fed[i].row, wanted);
        on_target |= there;
        if (there || !layout->many)
            equal = is(&fed[i].row, wanted, layout->key, layout->value);
    }
    if (goes && !foreign_first) /* or what came before it is a conflict */
        CHECK(op && op->kind == FDP_ADD && op->old == FDP_NONE && diff->removes_first);
    else if (goes || goes_with_vlans(diff, wanted))
        CHECK(!op || op->kind == FDP_ADD || op->kind == FDP_REPLACE);
    else if (!same_key)
        CHECK(op && op->kind == FDP_ADD && op->old == FDP_NONE);
    else if (equal || (foreign_first && !on_target))
        CHECK(!op); /* right already, or a conflict */
    else
        CHECK(op && op->kind == FDP_REPLACE);
    if (op && op->kind == FDP_REPLACE) {
        const union fdp_row *old = (const void *)fdp_diff_old(diff, op->old);

        CHECK(is(old, wanted, 0, layout->key));
        CHECK(!is(old, wanted, layout->key, layout->value));
    }
}

/* A row of ours goes when its key is not wanted, or when the kernel holds
 * several values under its key and this one leads elsewhere. Nobody else's does. */
static void check_removal(const struct fdp_diff *diff, const struct fed *fed, uint32_t count,
                          const struct fdp_op *op)
{
    const union fdp_row *old = (const void *)fdp_diff_old(diff, op->old);
    const int64_t number = fdp_table_find(diff->desired, old);
    int fed_as_ours = 0;

    CHECK(op->kind == FDP_REMOVE && op->desired == FDP_NONE);
    for (uint32_t i = 0; i < count; i++)
        fed_as_ours |= is(&fed[i].row, old, 0, layout->row) &&
                       (fed[i].owner == FDP_OURS || (number >= 0 && fed[i].owner == FDP_YIELDS));
    CHECK(fed_as_ours);
    if (number >= 0) {
        const union fdp_row *wanted = (const void *)fdp_table_row(diff->desired, (uint32_t)number);

        if (fdp_row_must_go(diff->desired->kind, old, wanted)) {
            CHECK(diff->removes_first); /* and it is added after that */
            return;
        }
        CHECK(layout->many);
        /* Or the removal would take what the write has just put there. */
        CHECK(!is(old, wanted, layout->key, layout->target));
    }
}

static void check_diff(const struct fdp_diff *diff, const struct fed *fed, uint32_t count)
{
    const uint32_t total = diff->writes + diff->removes;
    uint32_t at = 0, unwanted = 0, removed_unwanted = 0, conflicts = 0;

    CHECK(diff->observed == count);
    for (uint32_t number = 0; number < diff->desired->count; number++) {
        const int here = at < diff->writes && diff->ops[at].desired == number;

        check_wanted(diff, fed, count, number, here ? &diff->ops[at] : NULL);
        at += (uint32_t)here;
    }
    CHECK(at == diff->writes); /* in the order of the table, each once */
    for (; at < total; at++) {
        check_removal(diff, fed, count, &diff->ops[at]);
        CHECK(at == diff->writes || diff->ops[at - 1].old < diff->ops[at].old);
        removed_unwanted += fdp_table_find(diff->desired, fdp_diff_old(diff, diff->ops[at].old)) < 0;
    }
    for (uint32_t i = 0; i < count; i++)
        unwanted += fed[i].owner == FDP_OURS && fdp_table_find(diff->desired, &fed[i].row) < 0;
    CHECK(unwanted == removed_unwanted);
    CHECK(diff->adds + diff->unchanged + diff->conflicts <= diff->desired->count);
    CHECK(diff->writes + diff->unchanged + diff->conflicts == diff->desired->count);
    for (at = fdp_diff_next_conflict(diff, 0); at != FDP_NONE;
         at = fdp_diff_next_conflict(diff, at + 1))
        conflicts++;
    CHECK(conflicts >= diff->conflicts);
}

/* What is named is something that the diff would change. */
static void check_misfit(const struct fdp_diff *diff)
{
    const uint8_t *row = NULL, *second = NULL;
    const struct fdp_layout *layout = diff->desired->layout;
    int found = fdp_diff_misfit(diff, &row, &second), changed = 0;

    CHECK(found == 0 || found == 1);
    for (uint32_t i = 0; found && i < diff->writes + diff->removes; i++)
        changed |= diff->ops[i].old != FDP_NONE && fdp_diff_old(diff, diff->ops[i].old) == row;
    CHECK(!found || changed);
    CHECK(!found || !second || (layout->many && memcmp(row, second, layout->key) == 0 &&
                                fdp_rows_differ(layout, row, second)));
    CHECK(!found || second || fdp_row_misfits(diff->desired->kind, row));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    const uint8_t kind = take(&input) % FDP_KINDS;
    const uint64_t seed = take(&input);
    struct fdp_table table;
    struct fdp_diff diff;
    struct model model = {.count = 0};
    struct fed fed[2 * MOST];
    uint8_t owners[2 * MOST];
    uint32_t fed_count = 0;

    layout = &fdp_layouts[kind];
    fdp_table_init(&table, kind, seed, fuzz_realloc);
    for (uint8_t steps = take(&input); steps > 0 && input.at < input.end; steps--) {
        const uint8_t key = take(&input), value = take(&input), how = take(&input);
        const union fdp_row row = row_of(kind, key, value);

        if (how & 8)
            CHECK(fdp_table_reserve(&table, how) == 0);
        change(&table, &model, &row, how & 7);
    }
    check_table(&table, &model);

    CHECK(fdp_diff_begin(&diff, &table, fuzz_realloc) == 0);
    if (seed & 1) { /* a dump that is repeated */
        for (uint32_t i = 0; i < model.count; i++)
            CHECK(fdp_diff_feed(&diff, &model.rows[i], FDP_FOREIGN) == 0);
        CHECK(fdp_diff_finish(&diff) == 0);
        fdp_diff_restart(&diff);
    }
    while (input.at < input.end && fed_count < 2 * MOST) {
        const uint8_t key = take(&input), value = take(&input), how = take(&input);
        struct fed *one = &fed[fed_count++];

        one->row = row_of(kind, key, value);
        one->owner = how % 8 == 0 ? FDP_FOREIGN : how % 8 == 1 ? FDP_YIELDS : FDP_OURS;
        owners[fed_count - 1] = (uint8_t)one->owner;
        if (seed & 2)
            CHECK(fdp_diff_feed(&diff, &one->row, one->owner) == 0);
    }
    if (!(seed & 2)) /* in groups, which must come to the same */
        CHECK(fdp_diff_feed_many(&diff, fed, sizeof *fed, owners, fed_count) == 0);
    CHECK(fdp_diff_finish(&diff) == 0);
    check_diff(&diff, fed, fed_count);
    check_misfit(&diff);
    check_table(&table, &model);
    fdp_diff_free(&diff);
    fdp_table_free(&table);
    return 0;
}
