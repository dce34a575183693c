/* SPDX-License-Identifier: Apache-2.0 */
#include "rows.h"

#include <errno.h>
#include <sys/socket.h>

enum { PERMANENT = 0x80, UNICAST = 1, METRIC6 = 1024 /* IP6_RT_PRIO_USER */ };

static void make_neighbour(const struct fdp_recipe *recipe, const struct fdp_leg *leg,
                           const struct fdp_claim *claim, struct fdp_neighbour *row)
{
    row->ifindex = leg->ifindex;
    row->family = recipe->family;
    memcpy(row->address, claim->subnet, sizeof row->address);
    memcpy(row->mac, claim->mac, sizeof row->mac);
    row->state = PERMANENT;
}

static void make_fdb(const struct fdp_recipe *recipe, const struct fdp_leg *leg,
                     const struct fdp_claim *claim, struct fdp_fdb *row)
{
    row->ifindex = leg->ifindex;
    memcpy(row->mac, claim->mac, sizeof row->mac);
    memcpy(row->endpoint, claim->endpoint, sizeof row->endpoint);
    row->family = recipe->family;
    row->state = PERMANENT;
}

static uint32_t object_of(const struct fdp_recipe *recipe, const struct fdp_claim *claim)
{
    const uint8_t *at = claim->subnet;

    return recipe->base + ((uint32_t)(at[0] & 15) << 24 | (uint32_t)at[1] << 16 |
                           (uint32_t)at[2] << 8 | at[3]);
}

static void make_nexthop(const struct fdp_recipe *recipe, const struct fdp_leg *leg,
                         const struct fdp_claim *claim, struct fdp_nexthop *row)
{
    row->id = object_of(recipe, claim);
    memcpy(row->gateway, leg->to_endpoint ? claim->endpoint : claim->subnet, sizeof row->gateway);
    row->ifindex = leg->ifindex;
    row->family = recipe->family;
    row->onlink = leg->onlink;
    row->protocol = recipe->protocol;
}

static void make_route(const struct fdp_recipe *recipe, const struct fdp_leg *leg,
                       const struct fdp_claim *claim, struct fdp_route *row)
{
    row->family = recipe->family;
    row->length = claim->length;
    row->table = recipe->table;
    row->metric = recipe->family == AF_INET6 ? METRIC6 : 0;
    memcpy(row->prefix, claim->subnet, sizeof row->prefix);
    row->protocol = recipe->protocol;
    row->type = UNICAST;
    if (recipe->by_object) {
        row->nexthop = object_of(recipe, claim);
        return;
    }
    memcpy(row->gateway, leg->to_endpoint ? claim->endpoint : claim->subnet, sizeof row->gateway);
    row->gateway_family = recipe->family;
    row->ifindex = leg->ifindex;
    row->onlink = leg->onlink;
}

static void make_peer(const struct fdp_recipe *recipe, const struct fdp_claim *claim,
                      struct fdp_peer *row)
{
    row->map = recipe->map;
    row->family = recipe->family;
    row->length = claim->length;
    memcpy(row->prefix, claim->subnet, sizeof row->prefix);
    memcpy(row->endpoint, claim->endpoint, sizeof row->endpoint);
    memcpy(row->mac, claim->mac, sizeof row->mac);
    row->endpoint_family = recipe->family;
}

int fdp_make_row(const struct fdp_recipe *recipe, const struct fdp_claim *claim, enum fdp_way way,
                 uint32_t tag, union fdp_row *row)
{
    const struct fdp_leg *leg = &recipe->legs[way];

    if (!leg->used)
        return 0;
    memset(row, 0, sizeof *row);
    switch ((enum fdp_kind)recipe->kind) {
    case FDP_NEIGHBOUR:
        make_neighbour(recipe, leg, claim, &row->neighbour);
        break;
    case FDP_FDB:
        make_fdb(recipe, leg, claim, &row->fdb);
        break;
    case FDP_NEXTHOP:
        make_nexthop(recipe, leg, claim, &row->nexthop);
        break;
    case FDP_ROUTE:
        make_route(recipe, leg, claim, &row->route);
        break;
    case FDP_PEER:
        make_peer(recipe, claim, &row->peer);
        break;
    case FDP_FDB_ANY: /* no layout of a network has one */
    case FDP_KINDS:
        return 0;
    }
    *fdp_row_tag(&fdp_layouts[recipe->kind], row) = tag;
    return 1;
}

int fdp_fill_table(const struct fdp_recipe *recipe, const struct fdp_claim *claims, uint32_t count,
                   const uint8_t *ways, struct fdp_table *table)
{
    union fdp_row row;

    if (!recipe->legs[FDP_TUNNEL].used && !recipe->legs[FDP_DIRECT].used)
        return 0;
    if (fdp_table_reserve(table, table->count + count))
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++) {
        if (!fdp_make_row(recipe, &claims[i], fdp_way_of(recipe, ways, i), i, &row))
            continue;
        if (fdp_table_put(table, &row) < 0)
            return -ENOMEM;
    }
    return 0;
}
