/* SPDX-License-Identifier: Apache-2.0
 *
 * Claims out of bytes, judged by fdp_admit() and by a model that compares every
 * claim with every other. What must hold besides: accepted claims overlap
 * neither each other nor anything of this node's, whatever was claimed.
 *
 * Input: two bytes of choices, then nine bytes for each claim.
 */
#include "claim.h"
#include "fuzz.h"

#include <errno.h>
#include <sys/socket.h>

#define MOST 24
#define NAME 4 /* u16 length, two letters */

struct world {
    struct fdp_policy policy;
    struct fdp_prefix locals[4];
    uint8_t own[1][16], no_hosts[2][16];
    struct fdp_claim rows[MOST];
    uint8_t names[MOST * NAME];
    struct fdp_claims claims;
};

static struct fdp_prefix prefix_of(uint8_t family, const char *v4, const char *v6)
{
    const char *text = family == AF_INET ? v4 : v6;
    struct fdp_prefix prefix;

    CHECK(fdp_parse_prefix(family, text, strlen(text), &prefix) == 0);
    return prefix;
}

static void set_address(uint8_t family, const char *v4, const char *v6, uint8_t to[16])
{
    const char *text = family == AF_INET ? v4 : v6;

    CHECK(fdp_parse_address(family, text, strlen(text), to) == 0);
}

static void set_policy(struct world *world, uint8_t choice, uint8_t more)
{
    const uint8_t family = choice & 1 ? AF_INET6 : AF_INET;
    struct fdp_policy *policy = &world->policy;

    *policy = (struct fdp_policy){.family = family, .need_mac = !(choice & 2),
                                  .has_own_subnet = !(choice & 4), .has_own_mac = !(choice & 8),
                                  .own_mac = {2, 0, 0, 0, 0, 3}, .locals = world->locals};
    policy->network = prefix_of(family, "10.244.0.0/16", "fd00:10:244::/48");
    policy->own_subnet = prefix_of(family, "10.244.3.0/24", "fd00:10:244:3::/64");
    world->locals[0] = prefix_of(family, "10.244.200.3/32", "fd00:10:244:c8::3/128");
    world->locals[1] = prefix_of(family, "192.0.2.0/24", "2001:db8::/64");
    world->locals[2] = prefix_of(family, "10.244.128.0/22", "fd00:10:244:80::/62");
    world->locals[3] = prefix_of(family, "10.244.64.0/20", "fd00:10:244:40::/60");
    world->locals[3].over = 1;
    policy->local_count = choice & 32 ? 0 : 4;
    policy->own = (const void *)world->own;
    policy->no_hosts = (const void *)world->no_hosts;
    set_address(family, "10.244.200.3", "fd00:10:244:c8::3", world->own[0]);
    set_address(family, "192.0.2.0", "2001:db8::", world->no_hosts[0]);
    set_address(family, "192.0.2.255", "2001:db8::ff", world->no_hosts[1]);
    policy->own_count = choice & 16 ? 0 : 1;
    policy->no_host_count = more & 1 ? 0 : 2;
    policy->link_local = more >> 1 & 1;
    policy->subnet_length = more & 4 ? 0 : family == AF_INET ? 24 : 64;
    policy->has_pods = !(more & 8);
    set_address(family, "10.244.4.0", "fd00:10:244:4::", policy->pods_first);
    set_address(family, "10.244.127.255", "fd00:10:244:7f:ffff:ffff:ffff:ffff",
                policy->pods_last);
    fdp_policy_seal(policy);
}

/* Most claims are near each other, so that they meet; some are anywhere. */
static void read_claim(struct world *world, struct input *input)
{
    const uint8_t family = world->policy.family;
    const uint32_t number = world->claims.count++;
    struct fdp_claim *claim = &world->rows[number];
    uint8_t *name = &world->names[number * NAME];
    struct fdp_prefix subnet = world->policy.network, masked;
    char text[64];
    const uint8_t where = take(input), length = take(input), endpoint = take(input);
    const uint8_t mac = take(input), flags = take(input);
    const uint16_t size = flags >> 6 > 2 ? 2 : flags >> 6;

    memset(claim, 0, sizeof *claim);
    memset(name, 0, NAME);
    if (flags & 1)
        memset(subnet.address, where, sizeof subnet.address);
    subnet.address[family == AF_INET ? 2 : 7] = where;
    subnet.address[family == AF_INET ? 3 : 15] = take(input);
    subnet.length = family == AF_INET ? length % 33 : length % 129;
    if (!(flags & 2))
        subnet.length = (uint8_t)((family == AF_INET ? 20 : 60) + length % 8);
    if (family == AF_INET)
        snprintf(text, sizeof text, "%u.%u.%u.%u/%u", subnet.address[0], subnet.address[1],
                 subnet.address[2], subnet.address[3], subnet.length);
    else
        snprintf(text, sizeof text, "%x:%x:%x:%x::%x/%u",
                 subnet.address[0] << 8 | subnet.address[1],
                 subnet.address[2] << 8 | subnet.address[3],
                 subnet.address[4] << 8 | subnet.address[5],
                 subnet.address[6] << 8 | subnet.address[7], subnet.address[15], subnet.length);
    CHECK(fdp_parse_prefix(family, text, strlen(text), &masked) == 0);
    memcpy(claim->subnet, masked.address, sizeof claim->subnet);
    claim->length = masked.length;
    memcpy(claim->endpoint, flags & 4 ? world->policy.network.address : world->locals[1].address,
           sizeof claim->endpoint);
    if (flags & 8)
        memset(claim->endpoint, endpoint, family == AF_INET ? 4 : 16);
    claim->endpoint[family == AF_INET ? 3 : 15] = endpoint;
    if (flags & 4) /* of nodes or of pods */
        claim->endpoint[family == AF_INET ? 2 : 7] = take(input);
    memcpy(claim->mac, (uint8_t[6]){flags & 16, 0, 0, 0, 0, mac % 8}, sizeof claim->mac);
    claim->revision = take(input) % 3;
    claim->moved = take(input) % 5;
    memcpy(name, &size, sizeof size);
    memcpy(name + 2, (uint8_t[2]){take(input) % 3, number % 2}, size);
    claim->name = number * NAME;
    claim->origin = number;
    claim->rival = FDP_NONE;
    if (flags & 32)
        claim->reason = where & 1 ? FDP_OWN : FDP_WRONG_VNI;
}

static int before(const struct world *world, const struct fdp_claim *a, const struct fdp_claim *b)
{
    const uint8_t *left = world->names + a->name, *right = world->names + b->name;
    uint16_t left_size, right_size;
    int order;

    if (a->odd != b->odd)
        return b->odd;
    if (a->stale != b->stale)
        return b->stale;
    if (a->revision != b->revision)
        return a->revision < b->revision;
    memcpy(&left_size, left, 2);
    memcpy(&right_size, right, 2);
    order = memcmp(left + 2, right + 2, left_size < right_size ? left_size : right_size);
    if (!order)
        order = (int)left_size - (int)right_size;
    if (!order)
        order = memcmp(a->endpoint, b->endpoint, 16);
    if (!order)
        order = memcmp(a->mac, b->mac, 6);
    if (!order)
        order = memcmp(a->subnet, b->subnet, 16);
    if (!order)
        order = (int)a->length - (int)b->length;
    return order ? order < 0 : a->moved > b->moved;
}

static int same(const struct world *world, const struct fdp_claim *a, const struct fdp_claim *b)
{
    return !before(world, a, b) && !before(world, b, a);
}

static int overlap(const struct fdp_claim *a, const struct fdp_claim *b)
{
    return fdp_prefix_overlaps(a->subnet, a->length, b->subnet, b->length);
}

/* One after the other in the order of priority, each against all accepted. */
static void judge_plainly(struct world *world, uint8_t reasons[MOST])
{
    const uint32_t count = world->claims.count;
    uint32_t order[MOST];

    for (uint32_t i = 0; i < count; i++)
        reasons[i] = (uint8_t)fdp_claim_check(&world->policy, &world->rows[i]);
    for (uint32_t i = 0; i < count; i++)
        world->rows[i].odd = world->policy.subnet_length &&
                             world->rows[i].length != world->policy.subnet_length;
    for (uint32_t i = 0; i < count && world->policy.need_mac; i++)
        for (uint32_t j = 0; j < count; j++)
            if (reasons[i] == FDP_ACCEPTED && reasons[j] == FDP_ACCEPTED && world->rows[i].moved &&
                world->rows[i].moved < world->rows[j].revision &&
                world->rows[i].revision < world->rows[j].revision &&
                memcmp(world->rows[i].mac, world->rows[j].mac, 6) == 0)
                world->rows[i].stale = 1;
    for (uint32_t i = 0; i < count && world->policy.has_pods; i++)
        for (uint32_t j = 0; j < count; j++)
            if (reasons[i] == FDP_ACCEPTED &&
                (reasons[j] == FDP_ACCEPTED || reasons[j] == FDP_HOLDS_NODES) &&
                fdp_prefix_holds(world->rows[i].subnet, world->rows[i].length,
                                 world->rows[j].endpoint))
                reasons[i] = FDP_HOLDS_NODES;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = i;

        for (; at && before(world, &world->rows[i], &world->rows[order[at - 1]]); at--)
            order[at] = order[at - 1];
        order[at] = i;
    }
    for (uint32_t i = 0; i < count; i++) {
        const struct fdp_claim *claim = &world->rows[order[i]];
        uint8_t *reason = &reasons[order[i]];

        if (*reason != FDP_ACCEPTED)
            continue;
        for (uint32_t j = 0; j < i; j++)
            if (reasons[order[j]] == FDP_ACCEPTED && overlap(claim, &world->rows[order[j]]))
                *reason = FDP_OVERLAP;
        for (uint32_t j = 0; j < i && *reason == FDP_ACCEPTED; j++)
            if (world->policy.need_mac && reasons[order[j]] == FDP_ACCEPTED &&
                memcmp(claim->mac, world->rows[order[j]].mac, 6) == 0)
                *reason = FDP_DUPLICATE_MAC;
    }
}

static void check_accepted(const struct world *world, const struct fdp_claim *claim)
{
    const struct fdp_policy *policy = &world->policy;

    CHECK(claim->length > policy->network.length);
    CHECK(fdp_prefix_holds(policy->network.address, policy->network.length, claim->subnet));
    CHECK(policy->has_pods ||
          !fdp_prefix_holds(policy->network.address, policy->network.length, claim->endpoint));
    for (uint32_t i = 0; i < policy->no_host_count; i++)
        CHECK(memcmp(policy->no_hosts[i], claim->endpoint, 16) != 0);
    for (uint32_t i = 0; i < world->claims.count; i++)
        CHECK(world->rows[i].reason != FDP_ACCEPTED ||
              !fdp_prefix_holds(claim->subnet, claim->length, world->rows[i].endpoint));
    CHECK(!policy->has_own_subnet ||
          !fdp_prefix_overlaps(policy->own_subnet.address, policy->own_subnet.length,
                               claim->subnet, claim->length));
    for (uint32_t i = 0; i < policy->local_count; i++)
        CHECK(!fdp_prefix_overlaps(policy->locals[i].address, policy->locals[i].length,
                                   claim->subnet, claim->length) ||
              (policy->locals[i].over && claim->length <= policy->locals[i].length));
    if (policy->need_mac) {
        CHECK(!(claim->mac[0] & 1) && memcmp(claim->mac, (uint8_t[6]){0}, 6) != 0);
        CHECK(!policy->has_own_mac || memcmp(claim->mac, policy->own_mac, 6) != 0);
    }
}

static void check_refused(const struct world *world, const struct fdp_claim *claim)
{
    if (claim->reason != FDP_OVERLAP && claim->reason != FDP_DUPLICATE_MAC) {
        CHECK(claim->rival == FDP_NONE);
        return;
    }
    CHECK(claim->rival < world->claims.count);
    const struct fdp_claim *rival = &world->rows[claim->rival];
    CHECK(rival->reason == FDP_ACCEPTED && rival->winner);
    CHECK(same(world, rival, claim) || before(world, rival, claim));
    CHECK(claim->reason == FDP_OVERLAP ? overlap(rival, claim)
                                       : memcmp(rival->mac, claim->mac, 6) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct world world;
    struct input input = {data, data + size};
    uint32_t order[MOST + 1], accepted, found = 0;
    uint8_t reasons[MOST];

    memset(&world, 0, sizeof world);
    const uint8_t choice = take(&input);

    set_policy(&world, choice, take(&input));
    world.claims = (struct fdp_claims){.rows = world.rows, .names = world.names};
    while (input.at < input.end && world.claims.count < MOST)
        read_claim(&world, &input);
    judge_plainly(&world, reasons);

    CHECK(fdp_admit(&world.policy, &world.claims, size, order, &accepted, fuzz_realloc) == 0);

    for (uint32_t i = 0; i < world.claims.count; i++) {
        const struct fdp_claim *claim = &world.rows[i];
        int twin = claim->reason == reasons[i];

        /* Of claims that are alike in everything, either may stand. */
        for (uint32_t j = 0; j < world.claims.count && !twin; j++)
            twin = j != i && same(&world, claim, &world.rows[j]);
        CHECK(twin);
        if (claim->reason == FDP_ACCEPTED)
            check_accepted(&world, claim);
        else
            check_refused(&world, claim);
        found += claim->reason == FDP_ACCEPTED;
    }
    CHECK(found == accepted);
    for (uint32_t i = 0; i < accepted; i++) {
        CHECK(order[i] < world.claims.count);
        CHECK(world.rows[order[i]].reason == FDP_ACCEPTED);
        for (uint32_t j = i + 1; j < accepted; j++)
            CHECK(!overlap(&world.rows[order[i]], &world.rows[order[j]]));
        CHECK(!i || memcmp(world.rows[order[i - 1]].subnet, world.rows[order[i]].subnet, 16) < 0);
    }
    return 0;
}
