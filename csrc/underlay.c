/* SPDX-License-Identifier: Apache-2.0 */
#include "claim.h"

#include <errno.h>
#include <string.h>

enum { UNICAST = 1 };

/* Routes by prefix alone, of several metrics the one that the kernel takes. */
static int index_prefixes(const struct fdp_table *underlay, struct fdp_table *best,
                          uint8_t lengths[129])
{
    for (uint32_t i = 0; i < underlay->count; i++) {
        struct fdp_route route;

        memcpy(&route, fdp_table_row(underlay, i), sizeof route);
        if (route.tos)
            continue;
        route.tag = route.metric;
        route.metric = route.table = 0;
        int64_t known = fdp_table_find(best, &route);
        if (known >= 0) {
            const struct fdp_route *other = (void *)fdp_table_row(best, (uint32_t)known);

            if (other->tag <= route.tag)
                continue;
        }
        int err = fdp_table_put(best, &route);
        if (err < 0)
            return err;
        lengths[route.length] = 1;
    }
    return 0;
}

static int is_direct(const struct fdp_route *route, uint32_t uplink)
{
    return route->type == UNICAST && !route->gateway_family && !route->nexthop &&
           !(route->other & FDP_ELSEWHERE) && route->ifindex == uplink;
}

int fdp_ways(const struct fdp_table *underlay, const struct fdp_claim *claims, uint32_t count,
             uint8_t family, uint32_t uplink, uint8_t *ways, fdp_realloc_fn realloc)
{
    struct fdp_table best;
    uint8_t used[129] = {0}, lengths[129];
    unsigned length_count = 0;

    fdp_table_init(&best, FDP_ROUTE, underlay->seed, realloc);
    int err = index_prefixes(underlay, &best, used);
    for (int length = 128; length >= 0; length--)
        if (used[length])
            lengths[length_count++] = (uint8_t)length;

    for (uint32_t i = 0; !err && i < count; i++) {
        struct fdp_route key = {.family = family};
        int64_t found = -1;

        for (unsigned j = 0; j < length_count && found < 0; j++) {
            key.length = lengths[j];
            fdp_mask(claims[i].endpoint, lengths[j], key.prefix);
            found = fdp_table_find(&best, &key);
        }
        ways[i] = found >= 0 && is_direct((void *)fdp_table_row(&best, (uint32_t)found), uplink)
                      ? FDP_DIRECT
                      : FDP_TUNNEL;
    }
    fdp_table_free(&best);
    return err;
}
