/* SPDX-License-Identifier: Apache-2.0
 *
 * A page as the kernel would send it, read as a table of each kind, in both
 * families: no byte outside the page is read, every row taken is one the
 * encoder can send, and reading what was encoded gives the same row.
 *
 * Input: one byte that chooses the scope, then the page.
 */
#include "fuzz.h"
#include "kinds.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <sys/socket.h>

static struct fdp_scope scope_of(uint8_t kind, uint8_t choice)
{
    struct fdp_scope scope = {.kind = kind, .family = choice & 1 ? AF_INET6 : AF_INET,
                              .id_last = UINT32_MAX};

    if (choice & 2)
        scope.protocol = 138;
    if (choice & 4)
        scope.exclusive = 1;
    if (choice & 8)
        scope.ifindex = 7;
    if (choice & 16) {
        scope.length = choice & 1 ? 121 : 13;
        memset(scope.prefix, choice, sizeof scope.prefix);
    }
    if (choice & 32)
        scope.table = 254;
    if (choice & 64)
        scope.id_first = 8;
    scope.owner = choice % 3;
    scope.sides = choice & 1 ? FDP_SELF | FDP_MASTER : choice & 2;
    return scope;
}

/* Nothing beyond what tells rows of the kind apart and what they hold. */
static void check_row(uint8_t kind, const union fdp_row *row)
{
    switch (kind) {
    case FDP_NEIGHBOUR:
        CHECK(row->neighbour.family == AF_INET || row->neighbour.family == AF_INET6);
        break;
    case FDP_FDB:
        CHECK(row->fdb.family == 0 || row->fdb.family == AF_INET || row->fdb.family == AF_INET6);
        break;
    case FDP_FDB_ANY: {
        const struct fdp_fdb_any *any = &row->fdb_any;
        static const struct fdp_remote nowhere;

        CHECK(any->place == FDP_SELF || any->place == FDP_MASTER);
        CHECK((any->many != FDP_ONE) == fdp_has_list(any->mac));
        CHECK(any->many == FDP_LISTED || memcmp(&any->listed, &nowhere, sizeof nowhere) == 0);
        CHECK(any->many == FDP_ONE || memcmp(&any->remote, &nowhere, sizeof nowhere) == 0);
        CHECK(!any->nexthop || any->many != FDP_LISTED);
        CHECK(any->state == fdp_fdb_state(any->state));
        break;
    }
    case FDP_NEXTHOP:
        CHECK(row->nexthop.id);
        break;
    default:
        CHECK(row->route.length <= (row->route.family == AF_INET6 ? 128 : 32));
        CHECK(!row->route.nexthop || (!row->route.ifindex && !row->route.gateway_family));
    }
}

/* Rows of ours must be possible to send; what is sent is read as the same row,
 * unless it holds more than we ever set. */
static void check_round_trip(const struct fdp_scope *scope, const union fdp_row *row)
{
    const struct fdp_layout *layout = &fdp_layouts[scope->kind];
    struct fdp_scope any = {.kind = scope->kind, .family = scope->family, .id_last = UINT32_MAX,
                            .sides = FDP_SELF | FDP_MASTER};
    uint8_t page[FDP_MESSAGE_MAX];
    struct fdp_message message;
    union fdp_row again;

    for (int op = FDP_ADD; op <= FDP_REMOVE; op++) {
        size_t size = fdp_encode(scope->kind, op, row, 1, 0, page);
        const uint8_t *at = page;

        CHECK(size >= sizeof(struct nlmsghdr) && size <= FDP_MESSAGE_MAX && size % 4 == 0);
        CHECK(fdp_next_message(&at, page + size, &message) == 1 && at == page + size);
        if (op == FDP_REMOVE || fdp_decode(&any, &message, &again) <= 0)
            continue;
        CHECK(!(scope->kind == FDP_NEXTHOP && row->nexthop.other) ||
              again.nexthop.id == row->nexthop.id);
        if ((scope->kind == FDP_NEXTHOP && row->nexthop.other) ||
            (scope->kind == FDP_FDB && row->fdb.src_vni) ||
            (scope->kind == FDP_NEXTHOP && row->nexthop.family != AF_INET &&
             row->nexthop.family != AF_INET6) ||
            (scope->kind == FDP_ROUTE && (row->route.other || row->route.type > 1)))
            continue;
        CHECK(memcmp(&again, row, layout->key) == 0);
        CHECK(scope->kind != FDP_ROUTE || again.route.mtu == row->route.mtu);
        CHECK(scope->kind != FDP_FDB_ANY ||
              memcmp((uint8_t *)&again + layout->key, (const uint8_t *)row + layout->key,
                     layout->value) == 0);
    }
    CHECK(scope->kind == FDP_ROUTE || fdp_encode_get(scope->kind, row, 1, page) <= sizeof page);
}

static int count_rows(void *context, const union fdp_row *rows, const uint8_t *owners,
                      uint32_t count)
{
    uint32_t *left = context;

    CHECK(count > 0);
    for (uint32_t i = 0; i < count; i++) {
        CHECK(rows[i].bytes[0] == rows[i].bytes[0]);
        CHECK(owners[i] > FDP_SKIP && owners[i] <= FDP_SHARED);
    }
    return (*left)-- ? 0 : -ENOMEM;
}

/* The page as a part of a dump: with its end, errors and the kernel's words. */
static void check_page(const struct fdp_scope *scope, const uint8_t *page, size_t size)
{
    uint32_t left = 3, seq = 0;
    int interrupted = 0;

    if (size >= sizeof(struct nlmsghdr))
        memcpy(&seq, page + offsetof(struct nlmsghdr, nlmsg_seq), sizeof seq);
    struct fdp_socket sock = {.fd = -1, .seq = seq};
    memset(sock.text, 'x', sizeof sock.text - 1);
    int state = fdp_take_page(&sock, scope, page, size, count_rows, &left, &interrupted);
    CHECK(state <= 1 && state >= -4095);
    CHECK(strnlen(sock.text, sizeof sock.text) < sizeof sock.text);
}

/* One route sorted into several scopes: what it is in each, and the row, as if it was read for
 * that one alone. */
static void check_sorted(const struct fdp_message *message, uint8_t choice)
{
    struct fdp_scope scopes[FDP_SCOPES];
    uint8_t owners[FDP_SCOPES];
    const uint32_t count = 1 + choice % FDP_SCOPES;
    union fdp_row sorted, alone;

    for (uint32_t i = 0; i < count; i++) {
        scopes[i] = scope_of(FDP_ROUTE, (uint8_t)((choice & 1) | i << 1));
        scopes[i].marked = i & 1;
    }
    int state = fdp_route_sort(scopes, count, message, &sorted.route, owners), some = 0;
    CHECK(state == 0 || state == 1 || state == -EBADMSG || state == -ENODATA);
    for (uint32_t i = 0; state == 1 && i < count; i++) {
        CHECK(owners[i] == FDP_SKIP || owners[i] == FDP_OURS || owners[i] == FDP_FOREIGN);
        if (owners[i] == FDP_SKIP)
            continue;
        some = 1;
        CHECK(fdp_decode(&scopes[i], message, &alone) == owners[i]);
        CHECK(memcmp(&alone, &sorted, fdp_layouts[FDP_ROUTE].row) == 0);
    }
    CHECK(state != 1 || some);

    const uint8_t protocols[] = {3, 4, choice};
    const uint32_t devices[] = {7, choice};
    state = fdp_route_is_written(message, protocols, sizeof protocols, devices, 2);
    CHECK(state == 0 || state == 1 || state == -EBADMSG);
}

/* All of a page as a dump of a whole routing table, in which each message counts. */
static void check_replay(const uint8_t *page, size_t size, uint8_t choice)
{
    struct fdp_scope scopes[3] = {scope_of(FDP_ROUTE, choice), scope_of(FDP_ROUTE, choice ^ 12),
                                  scope_of(FDP_ROUTE, choice & 1)};
    uint32_t left = 3;
    struct fdp_pages pages = {.data = (uint8_t *)(uintptr_t)page, .used = size, .room = size};

    if (size >= sizeof(struct nlmsghdr))
        memcpy(&pages.seq, page + offsetof(struct nlmsghdr, nlmsg_seq), sizeof pages.seq);
    int state = fdp_replay_routes(&pages, scopes, choice % 4u, count_rows, &left);
    CHECK(state <= 0 && state >= -4095);
    pages.interrupted = 1;
    CHECK(fdp_replay_routes(&pages, scopes, 3, count_rows, &left) == -EINTR);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    for (uint8_t kind = 0; kind < FDP_KINDS; kind++) {
        struct fdp_scope scope = scope_of(kind, data[0]);
        const uint8_t *at = data + 1, *end = data + size;
        struct fdp_message message;
        uint8_t request[FDP_MESSAGE_MAX];
        int more;

        CHECK(fdp_encode_dump(&scope, 1, request) <= sizeof request);
        if (kind == FDP_FDB || kind == FDP_FDB_ANY)
            scope.family = AF_BRIDGE;
        while ((more = fdp_next_message(&at, end, &message)) > 0) {
            union fdp_row row;
            int owner = fdp_decode(&scope, &message, &row);

            CHECK(owner == -EBADMSG || (owner >= FDP_SKIP && owner <= FDP_SHARED));
            if (kind == FDP_ROUTE && message.type == RTM_NEWROUTE)
                check_sorted(&message, data[0]);
            if (owner <= 0)
                continue;
            check_row(kind, &row);
            check_round_trip(&scope, &row);
        }
        check_page(&scope, data + 1, size - 1);
        if (kind == FDP_ROUTE)
            check_replay(data + 1, size - 1, data[0]);
        CHECK(more == 0 || more == -EBADMSG);
        CHECK(at <= end && (more || at == end));
    }
    return 0;
}
