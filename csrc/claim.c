/* SPDX-License-Identifier: Apache-2.0 */
#include "claim.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* ---- text ------------------------------------------------------------- */

/* inet_pton() without the copy and the call: what a list of leases is full of. */
static int parse_ipv4(const char *text, size_t size, uint8_t to[4])
{
    unsigned octet = 0, digits = 0, dots = 0;

    for (size_t i = 0; i < size; i++) {
        if (text[i] >= '0' && text[i] <= '9') {
            if (digits && !octet)
                return -EINVAL; /* 010 is 8 to some, 10 to others, and nothing to us */
            octet = octet * 10 + (unsigned)(text[i] - '0');
            if (octet > 255)
                return -EINVAL;
            digits++;
        } else if (text[i] == '.' && digits && dots < 3) {
            to[dots++] = (uint8_t)octet;
            octet = digits = 0;
        } else {
            return -EINVAL;
        }
    }
    to[dots] = (uint8_t)octet;
    return digits && dots == 3 ? 0 : -EINVAL;
}

/* By table: which digits of a MAC are letters is nothing a processor could foresee. */
static int hex(char digit)
{
    static const int8_t values[256] = {
        ['0'] = 1, ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
        ['8'] = 9, ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
        ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
    };

    return values[(uint8_t)digit] - 1;
}

/* The same for the form that IPv6 addresses are written in, hexadecimal groups
 * with at most one gap. 1 for anything else, which inet_pton() has to judge. */
static int parse_ipv6(const char *text, size_t size, uint8_t to[16])
{
    unsigned words = 0, gap = 16, digits = 0, word = 0;

    for (size_t i = 0; i < size; i++) {
        int digit = hex(text[i]);

        if (digit >= 0) {
            if (++digits > 4 || words > 7)
                return 1;
            word = word << 4 | (unsigned)digit;
            continue;
        }
        if (text[i] != ':')
            return 1;
        if (digits) {
            to[words * 2] = (uint8_t)(word >> 8);
            to[words * 2 + 1] = (uint8_t)word;
            words++;
            digits = word = 0;
            if (i + 1 == size)
                return 1; /* ends in a lone colon */
            if (text[i + 1] != ':')
                continue;
            i++;
        } else if (i || size < 2 || text[++i] != ':') {
            return 1;
        }
        if (gap != 16)
            return 1;
        gap = words;
    }
    if (digits) {
        to[words * 2] = (uint8_t)(word >> 8);
        to[words * 2 + 1] = (uint8_t)word;
        words++;
    }
    if (gap == 16)
        return words != 8;
    if (words > 7)
        return 1;
    memmove(to + 16 - (words - gap) * 2, to + gap * 2, (words - gap) * 2);
    memset(to + gap * 2, 0, (8 - words) * 2);
    return 0;
}

int fdp_parse_address(uint8_t family, const char *text, size_t size, uint8_t to[16])
{
    char copy[INET6_ADDRSTRLEN];

    memset(to, 0, 16);
    if (family == AF_INET)
        return parse_ipv4(text, size, to);
    if (parse_ipv6(text, size, to) == 0)
        return 0;
    memset(to, 0, 16);
    if (!size || size >= sizeof copy || memchr(text, 0, size))
        return -EINVAL;
    memcpy(copy, text, size);
    copy[size] = 0;
    return inet_pton(family, copy, to) == 1 ? 0 : -EINVAL;
}

void fdp_mask(const uint8_t *address, unsigned length, uint8_t to[16])
{
    const unsigned whole = length / 8, bits = length % 8;
    const uint8_t part = bits ? address[whole] & (uint8_t)(0xff00u >> bits) : 0;

    memmove(to, address, whole);
    memset(to + whole, 0, 16 - whole);
    if (bits)
        to[whole] = part;
}

int fdp_parse_prefix(uint8_t family, const char *text, size_t size, struct fdp_prefix *to)
{
    const char *slash = memchr(text, '/', size);
    unsigned length = 0;

    if (!slash)
        return -EINVAL;
    size_t digits = size - (size_t)(slash - text) - 1;
    if (digits < 1 || digits > 3 || (digits > 1 && slash[1] == '0'))
        return -EINVAL;
    for (size_t i = 1; i <= digits; i++) {
        if (slash[i] < '0' || slash[i] > '9')
            return -EINVAL;
        length = length * 10 + (unsigned)(slash[i] - '0');
    }
    if (length > (family == AF_INET6 ? 128 : 32))
        return -EINVAL;
    memset(to, 0, sizeof *to);
    to->length = (uint8_t)length;
    int err = fdp_parse_address(family, text, (size_t)(slash - text), to->address);
    /* Host bits are dropped, as Go's net.ParseCIDR does for flannel. */
    fdp_mask(to->address, length, to->address);
    return err;
}

int fdp_parse_mac(const char *text, size_t size, uint8_t to[6])
{
    if (size != 17 || (text[2] != ':' && text[2] != '-'))
        return -EINVAL;
    for (int i = 0; i < 6; i++) {
        int high = hex(text[i * 3]), low = hex(text[i * 3 + 1]);

        if (high < 0 || low < 0 || (i < 5 && text[i * 3 + 2] != text[2]))
            return -EINVAL;
        to[i] = (uint8_t)(high << 4 | low);
    }
    return 0;
}

/* ---- one claim -------------------------------------------------------- */

/* Half of an address, as the number that it is. */
static inline uint64_t half(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, sizeof word);
    return be64toh(word);
}

int fdp_prefix_holds(const uint8_t *prefix, uint8_t length, const uint8_t *address)
{
    const uint64_t high = half(prefix) ^ half(address);

    if (length <= 64)
        return !length || !(high >> (64 - length));
    return !high && !((half(prefix + 8) ^ half(address + 8)) >> (128 - length));
}

int fdp_prefix_overlaps(const uint8_t *a, uint8_t a_length, const uint8_t *b, uint8_t b_length)
{
    return fdp_prefix_holds(a, a_length < b_length ? a_length : b_length, b);
}

static int is_host(uint8_t family, const uint8_t *address)
{
    static const uint8_t none[16];
    static const uint8_t loopback[16] = {[15] = 1};

    if (family == AF_INET) /* 0/8, 127/8 and everything from multicast up */
        return address[0] != 0 && address[0] != 127 && address[0] < 224;
    /* Link-local addresses mean nothing on another link; a mapped one is IPv4. */
    if (memcmp(address, none, 10) == 0 && address[10] == 0xff && address[11] == 0xff)
        return 0;
    return memcmp(address, none, 16) != 0 && memcmp(address, loopback, 16) != 0 &&
           address[0] != 0xff && !(address[0] == 0xfe && (address[1] & 0xc0) == 0x80);
}

static int check_mac(const struct fdp_policy *policy, const uint8_t mac[6])
{
    static const uint8_t none[6];

    if (memcmp(mac, none, 6) == 0 || (mac[0] & 1))
        return FDP_BAD_MAC;
    if (policy->has_own_mac && memcmp(mac, policy->own_mac, 6) == 0)
        return FDP_OWN_MAC;
    return FDP_ACCEPTED;
}

int fdp_claim_check(const struct fdp_policy *policy, const struct fdp_claim *claim)
{
    const struct fdp_prefix *network = &policy->network;

    if (claim->reason != FDP_ACCEPTED)
        return claim->reason;
    if (claim->length <= network->length ||
        !fdp_prefix_holds(network->address, network->length, claim->subnet))
        return FDP_OUTSIDE_NETWORK;
    if (!is_host(policy->family, claim->endpoint))
        return FDP_BAD_PUBLIC_IP;
    if (fdp_prefix_holds(network->address, network->length, claim->endpoint))
        return FDP_ENDPOINT_IN_OVERLAY;
    for (uint32_t i = 0; i < policy->own_count; i++)
        if (memcmp(policy->locals[i].address, claim->endpoint, 16) == 0)
            return FDP_OWN_PUBLIC_IP;
    if (policy->has_own_subnet &&
        fdp_prefix_overlaps(policy->own_subnet.address, policy->own_subnet.length, claim->subnet,
                            claim->length))
        return FDP_OWN_SUBNET;
    for (uint32_t i = 0; i < policy->local_count; i++)
        if (fdp_prefix_overlaps(policy->locals[i].address, policy->locals[i].length,
                                claim->subnet, claim->length))
            return FDP_UNDERLAY;
    return policy->need_mac ? check_mac(policy, claim->mac) : FDP_ACCEPTED;
}

/* ---- all claims ------------------------------------------------------- */

static int by_subnet(const void *a, const void *b, void *context)
{
    const struct fdp_claims *claims = context;
    const struct fdp_claim *left = &claims->rows[*(const uint32_t *)a];
    const struct fdp_claim *right = &claims->rows[*(const uint32_t *)b];

    for (size_t i = 0; i < sizeof left->subnet; i += 8) {
        const uint64_t mine = half(left->subnet + i), other = half(right->subnet + i);

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

        high |= half(claim->subnet) ^ half(first->subnet);
        low |= half(claim->subnet + 8) ^ half(first->subnet + 8);
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
            /* `inside` holds a claim of the node until all nodes stand */
            const struct fdp_claim *wide = &work->claims->rows[work->nodes[open].inside];
            if (fdp_prefix_holds(wide->subnet, wide->length, claim->subnet))
                break;
            open = work->nodes[open].parent;
        }
        work->contested |= open != FDP_NONE;
        work->nodes[work->node_count] = (struct node){open, FDP_NONE, work->order[i]};
        work->node_of[work->order[i]] = open = work->node_count++;
    }
    for (uint32_t i = 0; i < work->node_count; i++)
        work->nodes[i].inside = FDP_NONE;
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

/* A node that comes to another lease under its old MAC leaves one behind, which nobody writes
 * any more, until it expires. A claim is stale if one with its MAC was made after its node last
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
