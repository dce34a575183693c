/* SPDX-License-Identifier: Apache-2.0
 *
 * From claims to rows: how a table of peers makes its entry of a peer. One recipe makes the table
 * of a whole cluster and the entries of one peer that changed.
 */
#ifndef FDP_ROWS_H
#define FDP_ROWS_H

#include "claim.h"

/* What an entry of a peer that is reached this way leads to. */
struct fdp_leg {
    uint8_t used;        /* such peers have an entry */
    uint8_t onlink;
    uint8_t to_endpoint; /* the gateway is the peer's public address, else its subnet's first */
    uint8_t pad;
    uint32_t ifindex;
};

struct fdp_recipe {
    uint8_t kind, family, protocol;
    uint8_t by_object; /* routes name a nexthop object */
    uint32_t base;     /* a nexthop's id is this plus the low 28 bits of the subnet's address */
    uint32_t map;      /* descriptor of the map that peers are in */
    uint32_t table;    /* routing table */
    struct fdp_leg legs[2]; /* by enum fdp_way */
};

/* The row of a claim; 0 where the table has none of a peer that is reached this way. */
int fdp_make_row(const struct fdp_recipe *recipe, const struct fdp_claim *claim, enum fdp_way way,
                 uint32_t tag, union fdp_row *row);

/* Put the rows of all claims into a table, tagged by their numbers. `ways` has an enum fdp_way for
 * each; NULL: all are reached the same way, the first that the recipe has. 0 or -ENOMEM. */
int fdp_fill_table(const struct fdp_recipe *recipe, const struct fdp_claim *claims, uint32_t count,
                   const uint8_t *ways, struct fdp_table *table);

/* The way of claim `number`; see fdp_fill_table(). */
static inline enum fdp_way fdp_way_of(const struct fdp_recipe *recipe, const uint8_t *ways,
                                      uint32_t number)
{
    if (ways)
        return ways[number] == FDP_DIRECT ? FDP_DIRECT : FDP_TUNNEL;
    return recipe->legs[FDP_TUNNEL].used ? FDP_TUNNEL : FDP_DIRECT;
}

#endif
