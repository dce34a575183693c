/* SPDX-License-Identifier: Apache-2.0
 *
 * Notifications as the kernel, or anybody, might send them, compared with desired
 * tables: no byte outside is read, a key is touched only with what was told of it, and
 * what is wanted and was told to be so is touched no more.
 *
 * Input: one byte that chooses the family, then the messages; the first half of those
 * that can be read are also what is wanted.
 */
#include "events.h"
#include "fuzz.h"

#include <linux/rtnetlink.h>
#include <sys/socket.h>

enum { SEEN = 16 };

static void check_touched(const struct fdp_watched *watched)
{
    const struct fdp_table *touched = watched->touched;
    const struct fdp_layout *layout = touched->layout;

    for (uint32_t i = 0; i < touched->count; i++) {
        uint8_t *row = fdp_table_row(touched, i);
        const uint32_t tag = *fdp_row_tag(layout, row), owner = fdp_touched_owner(tag);
        const int64_t at = fdp_table_find(watched->desired, row);

        CHECK(tag >> 3 <= watched->port_count && watched->port_count <= FDP_AUTHORS);
        CHECK(!(tag >> 3) == !fdp_touched_port(watched->ports, tag));
        CHECK(owner <= FDP_SHARED);
        CHECK(owner == FDP_OURS || at >= 0); /* what is not ours matters in our place only */
        if (owner == FDP_OURS && at >= 0)
            CHECK(memcmp(fdp_table_row(watched->desired, (uint32_t)at) + layout->key,
                         row + layout->key, layout->value));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    const uint8_t choice = take(&input);
    struct fdp_table desired[FDP_KINDS], touched[FDP_KINDS];
    struct fdp_scope scopes[FDP_KINDS];
    struct fdp_watched watched[FDP_KINDS];
    struct fdp_message message;
    const uint8_t *at = input.at;
    int seen = 0;

    for (uint8_t kind = 0; kind < FDP_KINDS; kind++) {
        scopes[kind] = (struct fdp_scope){.kind = kind, .protocol = 138, .id_last = UINT32_MAX,
                                          .family = choice & 1 ? AF_INET6 : AF_INET,
                                          .exclusive = (choice & 2) != 0,
                                          .ifindex = choice & 4 ? 7 : 0};
        fdp_table_init(&desired[kind], kind, 1, fuzz_realloc);
        fdp_table_init(&touched[kind], kind, 2, fuzz_realloc);
        watched[kind] = (struct fdp_watched){&desired[kind], &scopes[kind], 1, &touched[kind], 0, {0}, 0};
    }
    while (seen < SEEN && fdp_next_message(&at, input.end, &message) > 0) {
        for (uint8_t kind = 0; kind < FDP_KINDS; kind++) {
            union fdp_row row;

            if (seen < SEEN / 2 && fdp_decode(&scopes[kind], &message, &row) > 0)
                CHECK(fdp_table_put(&desired[kind], &row) >= 0);
        }
        seen++;
    }
    at = input.at;
    while (fdp_next_message(&at, input.end, &message) > 0) {
        for (uint8_t kind = 0; kind < FDP_KINDS; kind++) {
            (void)fdp_watch_message(&watched[kind], &message);
            check_touched(&watched[kind]);
        }
        (void)fdp_route_names_device(&message);
    }
    CHECK(fdp_watch_orphans(&watched[FDP_NEXTHOP], &watched[FDP_ROUTE]) == 0);
    for (uint8_t kind = 0; kind < FDP_KINDS; kind++) {
        fdp_table_free(&desired[kind]);
        fdp_table_free(&touched[kind]);
    }
    return 0;
}
