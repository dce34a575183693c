/* SPDX-License-Identifier: Apache-2.0
 *
 * The hot loops of the core alone, to be counted instruction by instruction:
 * `kernels NAME` prepares 10,000 peers, and calls measured() once.
 * callgrind collects inside measured() only (bench/instructions.py).
 */
#include "claim.h"
#include "events.h"
#include "heap.h"
#include "kinds.h"

#include <arpa/inet.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PEERS = 10000, DEVICE = 7, PAGE = PEERS * FDP_MESSAGE_MAX };

static struct fdp_table desired;
static union fdp_row rows[PEERS];
static uint8_t *page;
static size_t page_size;
static struct fdp_scope scope;
static struct fdp_claim claims[PEERS];
static volatile uint64_t sink;

static void *need(void *memory)
{
    if (!memory)
        abort();
    return memory;
}

static uint32_t mixed(uint32_t n)
{
    return n * 2654435761u;
}

/* Peer n of each table, IPv4 or IPv6. */
static void fill(enum fdp_kind kind, uint8_t family, uint32_t n, union fdp_row *row)
{
    const uint32_t subnet = htonl(0x0a000000u + (n << 8)), id = 0x5a000000u + (n << 8);
    const uint32_t mac = mixed(n);

    memset(row, 0, sizeof *row);
    switch (kind) {
    case FDP_NEIGHBOUR:
        row->neighbour = (struct fdp_neighbour){.ifindex = DEVICE, .family = family, .state = 0x80};
        memcpy(row->neighbour.address + (family == AF_INET6 ? 4 : 0), &subnet, 4);
        memcpy(row->neighbour.mac + 2, &mac, 4);
        break;
    case FDP_FDB:
        row->fdb = (struct fdp_fdb){.ifindex = DEVICE, .family = family, .state = 0x80};
        memcpy(row->fdb.mac + 2, &mac, 4);
        memcpy(row->fdb.endpoint, &subnet, 4);
        break;
    case FDP_NEXTHOP:
        row->nexthop = (struct fdp_nexthop){.id = id, .ifindex = DEVICE, .family = family,
                                            .onlink = 1, .protocol = 138};
        memcpy(row->nexthop.gateway, &subnet, 4);
        break;
    default:
        row->route = (struct fdp_route){.family = family, .length = family == AF_INET ? 24 : 64,
                                        .table = RT_TABLE_MAIN, .protocol = 138,
                                        .type = RTN_UNICAST};
        memcpy(row->route.prefix + (family == AF_INET6 ? 4 : 0), &subnet, 4);
        if (family == AF_INET) {
            row->route.nexthop = id;
        } else {
            row->route.metric = 1024;
            row->route.ifindex = DEVICE;
            row->route.gateway_family = family;
            row->route.onlink = 1;
            memcpy(row->route.gateway + 4, &subnet, 4);
        }
    }
}

static void prepare_table(enum fdp_kind kind, uint8_t family)
{
    fdp_table_init(&desired, kind, 0x0123456789abcdefu, fdp_heap);
    for (uint32_t n = 0; n < PEERS; n++) {
        fill(kind, family, n, &rows[n]);
        *fdp_row_tag(desired.layout, &rows[n]) = n;
        if (fdp_table_put(&desired, &rows[n]) < 0)
            abort();
    }
    scope = (struct fdp_scope){.kind = kind, .family = kind == FDP_FDB ? AF_BRIDGE : family,
                               .protocol = 138, .exclusive = kind == FDP_ROUTE,
                               .ifindex = kind == FDP_ROUTE ? 0 : DEVICE, .table = RT_TABLE_MAIN,
                               .id_last = UINT32_MAX};
}

/* The messages that would write the table look as those of its dump do. */
static void prepare_page(void)
{
    page = need(malloc(PAGE));
    page_size = 0;
    for (uint32_t n = 0; n < desired.count; n++)
        page_size += fdp_encode(desired.kind, FDP_ADD, fdp_table_row(&desired, n), n + 1, 0,
                                page + page_size);
}

static void shuffle(void)
{
    for (uint32_t n = PEERS - 1; n > 0; n--) {
        const uint32_t other = mixed(n) % (n + 1);
        const union fdp_row kept = rows[n];

        rows[n] = rows[other];
        rows[other] = kept;
    }
}

static void run_diff(void)
{
    struct fdp_diff diff;

    if (fdp_diff_begin(&diff, &desired, fdp_heap) ||
        fdp_diff_feed_many(&diff, rows, sizeof *rows, NULL, PEERS) || fdp_diff_finish(&diff))
        abort();
    sink = diff.unchanged;
    fdp_diff_free(&diff);
}

static void run_encode(void)
{
    size_t at = 0;

    for (uint32_t n = 0; n < desired.count; n++)
        at += fdp_encode(desired.kind, FDP_ADD, fdp_table_row(&desired, n), n + 1, 0, page + at);
    sink = at;
}

static void run_decode(void)
{
    const uint8_t *at = page;
    struct fdp_message message;
    union fdp_row row;
    uint32_t found = 0;

    while (fdp_next_message(&at, page + page_size, &message) > 0)
        found += fdp_decode(&scope, &message, &row) > 0;
    if (found != PEERS)
        abort();
    sink = found;
}

static void run_events(void)
{
    const uint8_t *at = page;
    struct fdp_table touched;
    struct fdp_message message;
    struct fdp_watched watched = {.desired = &desired, .scopes = &scope, .scope_count = 1,
                                  .touched = &touched};

    fdp_table_init(&touched, desired.kind, 1, fdp_heap);
    while (fdp_next_message(&at, page + page_size, &message) > 0)
        if (fdp_watch_message(&watched, &message) < 0)
            abort();
    sink = watched.events;
    fdp_table_free(&touched);
}

static void run_admit(void)
{
    static uint32_t order[PEERS];
    struct fdp_policy policy = {.family = AF_INET, .need_mac = 1,
                                .network = {.address = {10}, .length = 8}};
    struct fdp_claims all = {claims, (const uint8_t *)"\1\0n", PEERS};
    uint32_t accepted;

    if (fdp_admit(&policy, &all, 1, order, &accepted, fdp_heap) || accepted != PEERS)
        abort();
    sink = accepted;
}

static void prepare_claims(void)
{
    for (uint32_t n = 0; n < PEERS; n++) {
        const uint32_t at = (mixed(n) >> 8) % PEERS, subnet = htonl(0x0a000000u + (n << 8));
        const uint32_t endpoint = htonl(0xac100001u + n), mac = mixed(n);
        struct fdp_claim *claim = &claims[at];

        while (claim->length) /* in no order, as they come */
            claim = &claims[(claim - claims + 1) % PEERS];
        claim->length = 24;
        claim->rival = FDP_NONE;
        claim->mac[0] = 2;
        memcpy(claim->subnet, &subnet, 4);
        memcpy(claim->endpoint, &endpoint, 4);
        memcpy(claim->mac + 2, &mac, 4);
    }
}

static void (*run)(void);

__attribute__((noinline)) void measured(void)
{
    run();
}

int main(int count, char **words)
{
    static const char *const kinds[] = {"neighbour", "fdb", "nexthop", "route"};
    static const struct {
        const char *name;
        void (*run)(void);
    } runs[] = {{"diff", run_diff}, {"shuffled", run_diff}, {"encode", run_encode},
                {"decode", run_decode}, {"events", run_events}, {"admit", run_admit}};
    const uint8_t family = count == 4 && !strcmp(words[3], "6") ? AF_INET6 : AF_INET;
    enum fdp_kind kind = FDP_KINDS;

    for (size_t i = 0; count == 4 && i < sizeof runs / sizeof *runs; i++)
        if (!strcmp(words[1], runs[i].name))
            run = runs[i].run;
    for (size_t i = 0; count == 4 && i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(words[2], kinds[i]))
            kind = (enum fdp_kind)i;
    if (!run || kind == FDP_KINDS) {
        fprintf(stderr, "kernels diff|shuffled|encode|decode|events|admit TABLE 4|6\n");
        return 2;
    }
    prepare_table(kind, family);
    prepare_page();
    if (!strcmp(words[1], "shuffled"))
        shuffle();
    prepare_claims();
    measured();
    return 0;
}
