/* SPDX-License-Identifier: Apache-2.0
 *
 * Admission of all claims: each alone (claim.c), then against each other.
 */
#include "claim.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int by_subnet(const void *a, const void *b, void *context)
{
    const struct fdp_claims *claims = context;
    const struct fdp_claim *left = &claims->rows[*(const uint32_t *)a];
    const struct fdp_claim *right = &claims->rows[*(const uint32_t *)b];

    for (size_t i = 0; i < sizeof left->subnet; i += 8) {
        const uint64_t mine = fdp_half(left->subnet + i), other = fdp_half(right->subnet + i);

        if (mine != other)
            return mine < other ? -1 : 1;
    }
    return (int)left->length - (int)right->length;
}

static int compare_names(const struct fdp_claims *claims, uint32_t a, uint32_t b)
{
    uint16_t a_size, b_size;

    memcpy(&a_size, claims->names + a, 2);
    memcpy(&b_size, claims->names + b, 2);
    int order = memcmp(claims->names + a + 2, claims->names + b + 2,
                       a_size < b_size ? a_size : b_size);
    return order ? order : (int)a_size - (int)b_size;
}

enum { SUBNET_BYTES = 17 }; /* the address and, last, its length */

static inline uint8_t subnet_byte(const struct fdp_claim *claim, unsigned place)
{
    return place < 16 ? claim->subnet[place] : claim->length;
}

/* Which bytes differ at all: of ten thousand subnets of one network two or three. */
static void varying_bytes(const struct fdp_claims *claims, const uint32_t *order, uint32_t count,
                          uint8_t varying[SUBNET_BYTES])
{
    const struct fdp_claim *first = &claims->rows[order[0]];
    uint64_t high = 0, low = 0;
    uint8_t length = 0;

    for (uint32_t i = 1; i < count; i++) {
        const struct fdp_claim *claim = &claims->rows[order[i]];

        high |= fdp_half(claim->subnet) ^ fdp_half(first->subnet);
        low |= fdp_half(claim->subnet + 8) ^ fdp_half(first->subnet + 8);
        length |= claim->length ^ first->length;
    }
    for (unsigned i = 0; i < 8; i++) {
        varying[i] = (uint8_t)(high >> (56 - 8 * i));
        varying[8 + i] = (uint8_t)(low >> (56 - 8 * i));
    }
    varying[16] = length;
}

/* By one byte, what is equal there in the order it had. */
static void sort_by_byte(const struct fdp_claims *claims, unsigned place, const uint32_t *from,
                         uint32_t *to, uint32_t count)
{
    uint32_t start[257] = {0};

    for (uint32_t i = 0; i < count; i++)
        start[subnet_byte(&claims->rows[from[i]], place) + 1]++;
    for (unsigned i = 1; i < 256; i++)
        start[i] += start[i - 1];
    for (uint32_t i = 0; i < count; i++)
        to[start[subnet_byte(&claims->rows[from[i]], place)]++] = from[i];
}

static int is_sorted(struct fdp_claims *claims, const uint32_t *order, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++)
        if (by_subnet(&order[i - 1], &order[i], claims) > 0)
            return 0;
    return 1;
}

static void sort_by_subnet(struct fdp_claims *claims, uint32_t *order, uint32_t *spare,
                           uint32_t count)
{
    uint8_t varying[SUBNET_BYTES];
    uint32_t *from = order, *to = spare;

    if (is_sorted(claims, order, count))
        return;
    varying_bytes(claims, order, count, varying);
    for (unsigned place = SUBNET_BYTES; place-- > 0;) {
        if (!varying[place])
            continue;
        uint32_t *sorted = to;

        sort_by_byte(claims, place, from, sorted, count);
        to = from;
        from = sorted;
    }
    if (from != order)
        memcpy(order, from, count * sizeof *order);
}

/* Who goes first. Nothing in here depends on where a claim stood in the
 * source's list: every node comes to the same winner. */
static int by_priority(const void *a, const void *b, void *context)
{
    const struct fdp_claims *claims = context;
    const struct fdp_claim *left = &claims->rows[*(const uint32_t *)a];
    const struct fdp_claim *right = &claims->rows[*(const uint32_t *)b];
    int order;

    if (left->odd != right->odd)
        return left->odd < right->odd ? -1 : 1;
    if (left->stale != right->stale)
        return left->stale < right->stale ? -1 : 1;
    if (left->revision != right->revision)
        return left->revision < right->revision ? -1 : 1;
    if ((order = compare_names(claims, left->name, right->name)))
        return order;
    if ((order = memcmp(left->endpoint, right->endpoint, sizeof left->endpoint)))
        return order;
    if ((order = memcmp(left->mac, right->mac, sizeof left->mac)))
        return order;
    if ((order = by_subnet(a, b, context)))
        return order;
    return (left->moved < right->moved) - (left->moved > right->moved);
}

/* Candidates by subnet, as the forest of their prefixes: equal subnets share a
 * node, a node's parent is the next wider subnet that holds it. A chain of
 * parents is never longer than an address has bits. */
struct node {
    uint32_t parent;  /* FDP_NONE */
    uint32_t holder;  /* accepted claim of this very subnet */
    uint32_t inside;  /* some accepted claim below this node */
    uint32_t claim;   /* one of its claims */
    uint32_t nodes;   /* whether a public address of a node is in its subnet */
};

struct admission {
    struct fdp_claims *claims;
    uint32_t *order;   /* candidates by subnet */
    uint32_t *rank;    /* candidates by priority */
    uint32_t *node_of; /* per claim */
    struct node *nodes;
    uint32_t *macs;    /* hash of accepted (or, at first, of all) MACs: claim + 1 */
    uint64_t seed;
    uint32_t mac_mask, count, node_count;
    int contested;
};

static uint32_t *mac_slot(struct admission *work, const uint8_t mac[6])
{
    uint64_t word = 0;

    memcpy(&word, mac, 6);
    __uint128_t wide = (__uint128_t)(word ^ work->seed) * 0xd6e8feb86659fd93u;
    for (uint32_t at = (uint32_t)(wide >> 64) ^ (uint32_t)wide;; at++) {
        uint32_t *slot = &work->macs[at & work->mac_mask];

        if (!*slot || memcmp(work->claims->rows[*slot - 1].mac, mac, 6) == 0)
            return slot;
    }
}

static void build_tree(struct admission *work)
{
    uint32_t open = FDP_NONE; /* the innermost node that may still hold the next one */

    for (uint32_t i = 0; i < work->count; i++) {
        const struct fdp_claim *claim = &work->claims->rows[work->order[i]];

        if (i && by_subnet(&work->order[i - 1], &work->order[i], work->claims) == 0) {
            work->node_of[work->order[i]] = work->node_count - 1;
            work->contested = 1;
            continue;
        }
        while (open != FDP_NONE) {
            const struct fdp_claim *wide = &work->claims->rows[work->nodes[open].claim];

            if (fdp_prefix_holds(wide->subnet, wide->length, claim->subnet))
                break;
            open = work->nodes[open].parent;
        }
        work->contested |= open != FDP_NONE;
        work->nodes[work->node_count] =
            (struct node){open, FDP_NONE, FDP_NONE, work->order[i], 0};
        work->node_of[work->order[i]] = open = work->node_count++;
    }
}

/* The innermost node whose subnet may hold an address: that of the last claim by subnet whose
 * first address is not above it. */
static uint32_t node_below(const struct admission *work, const uint8_t *address)
{
    uint32_t low = 0, high = work->count;

    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;

        if (memcmp(work->claims->rows[work->order[middle]].subnet, address, 16) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? work->node_of[work->order[low - 1]] : FDP_NONE;
}

/* Nodes and pods share the network: a subnet with nodes' public addresses in it is no pods',
 * whichever lease claims it. */
static void reject_subnets_of_nodes(const struct fdp_policy *policy, struct admission *work)
{
    const struct fdp_prefix *network = &policy->network;
    struct fdp_claim *rows = work->claims->rows;

    for (uint32_t i = 0; i < work->count; i++) {
        const uint8_t *endpoint = rows[work->order[i]].endpoint;

        if (!fdp_prefix_holds(network->address, network->length, endpoint))
            continue;
        for (uint32_t at = node_below(work, endpoint); at != FDP_NONE;
             at = work->nodes[at].parent) {
            const struct fdp_claim *claim = &rows[work->nodes[at].claim];

            if (work->nodes[at].nodes)
                break;
            work->nodes[at].nodes = fdp_prefix_holds(claim->subnet, claim->length, endpoint);
        }
    }
    for (uint32_t i = 0; i < work->count; i++)
        if (work->nodes[work->node_of[work->order[i]]].nodes)
            rows[work->order[i]].reason = FDP_HOLDS_NODES;
}

static void reject(struct admission *work, uint32_t number, int reason, uint32_t rival)
{
    work->claims->rows[number].reason = (uint8_t)reason;
    work->claims->rows[number].rival = rival;
    work->claims->rows[rival].winner = 1;
}

static void judge(struct admission *work, uint32_t number, int need_mac)
{
    struct fdp_claim *claim = &work->claims->rows[number];
    const uint32_t own = work->node_of[number];

    if (claim->reason != FDP_ACCEPTED)
        return;
    if (work->nodes[own].inside != FDP_NONE) {
        reject(work, number, FDP_OVERLAP, work->nodes[own].inside);
        return;
    }
    for (uint32_t at = own; at != FDP_NONE; at = work->nodes[at].parent)
        if (work->nodes[at].holder != FDP_NONE) {
            reject(work, number, FDP_OVERLAP, work->nodes[at].holder);
            return;
        }
    if (need_mac) {
        uint32_t *slot = mac_slot(work, claim->mac);

        if (*slot) {
            reject(work, number, FDP_DUPLICATE_MAC, *slot - 1);
            return;
        }
        *slot = number + 1;
    }
    work->nodes[own].holder = number;
    for (uint32_t at = work->nodes[own].parent; at != FDP_NONE; at = work->nodes[at].parent)
        if (work->nodes[at].inside == FDP_NONE)
            work->nodes[at].inside = number;
}

static int same_mac_twice(struct admission *work)
{
    int found = 0;

    for (uint32_t i = 0; i < work->count && !found; i++) {
        uint32_t *slot = mac_slot(work, work->claims->rows[work->order[i]].mac);

        found = *slot != 0;
        *slot = work->order[i] + 1;
    }
    memset(work->macs, 0, ((size_t)work->mac_mask + 1) * sizeof *work->macs);
    return found;
}

/* A node that comes to another lease under its old MAC leaves one behind, which no node
 * writes again, until it expires. A claim is stale if one with its MAC was made after its node last
 * wrote it. If that node lives it writes again, and age decides as it does for all: nothing here
 * goes by age alone. */
static void find_stale(struct admission *work)
{
    struct fdp_claim *rows = work->claims->rows;

    for (uint32_t i = 0; i < work->count; i++) {
        const uint32_t number = work->order[i];
        uint32_t *slot = mac_slot(work, rows[number].mac);

        if (!*slot || rows[*slot - 1].revision < rows[number].revision)
            *slot = number + 1;
    }
    for (uint32_t i = 0; i < work->count; i++) {
        struct fdp_claim *claim = &rows[work->order[i]];
        const uint64_t newest = rows[*mac_slot(work, claim->mac) - 1].revision;

        claim->stale = claim->moved && claim->moved < newest && claim->revision < newest;
    }
    memset(work->macs, 0, ((size_t)work->mac_mask + 1) * sizeof *work->macs);
}

static int start_work(struct admission *work, uint32_t all, fdp_realloc_fn realloc)
{
    uint32_t slots = 8;

    while (slots < work->count * 2)
        slots *= 2;
    work->mac_mask = slots - 1;
    work->rank = realloc(NULL, (size_t)work->count * sizeof *work->rank + 1);
    work->node_of = realloc(NULL, (size_t)all * sizeof *work->node_of + 1);
    work->nodes = realloc(NULL, (size_t)work->count * sizeof *work->nodes + 1);
    work->macs = realloc(NULL, (size_t)slots * sizeof *work->macs);
    if (!work->rank || !work->node_of || !work->nodes || !work->macs)
        return -ENOMEM;
    memset(work->macs, 0, (size_t)slots * sizeof *work->macs);
    return 0;
}

static void free_work(struct admission *work, fdp_realloc_fn realloc)
{
    void *blocks[] = {work->rank, work->node_of, work->nodes, work->macs};

    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (blocks[i])
            realloc(blocks[i], 0);
}

int fdp_admit(const struct fdp_policy *policy, struct fdp_claims *claims, uint64_t seed,
              uint32_t *order, uint32_t *accepted, fdp_realloc_fn realloc)
{
    struct admission work = {.claims = claims, .order = order, .seed = seed};

    *accepted = 0;
    for (uint32_t i = 0; i < claims->count; i++) {
        struct fdp_claim *claim = &claims->rows[i];

        claim->reason = (uint8_t)fdp_claim_check(policy, claim);
        claim->rival = FDP_NONE;
        claim->winner = 0;
        claim->stale = 0;
        claim->odd = policy->subnet_length && claim->length != policy->subnet_length;
        if (claim->reason == FDP_ACCEPTED)
            order[work.count++] = i;
    }

    int err = start_work(&work, claims->count, realloc);
    if (err) {
        free_work(&work, realloc);
        return err;
    }
    sort_by_subnet(claims, order, work.rank, work.count);
    build_tree(&work);
    if (policy->has_pods)
        reject_subnets_of_nodes(policy, &work);
    const int twice = policy->need_mac && same_mac_twice(&work);

    if (twice)
        find_stale(&work);
    if (work.contested || twice) {
        memcpy(work.rank, order, (size_t)work.count * sizeof *order);
        qsort_r(work.rank, work.count, sizeof *work.rank, by_priority, claims);
        for (uint32_t i = 0; i < work.count; i++)
            judge(&work, work.rank[i], policy->need_mac);
    }
    for (uint32_t i = 0; i < work.count; i++)
        if (claims->rows[order[i]].reason == FDP_ACCEPTED)
            order[(*accepted)++] = order[i];
    free_work(&work, realloc);
    return 0;
}
