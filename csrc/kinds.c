/* SPDX-License-Identifier: Apache-2.0
 *
 * From rows to messages and back, whatever their kind.
 */
#include "wire.h"

const struct fdp_kind_ops *const fdp_kinds[FDP_KINDS] = {
    [FDP_NEIGHBOUR] = &fdp_neighbour_ops,
    [FDP_FDB] = &fdp_fdb_ops,
    [FDP_NEXTHOP] = &fdp_nexthop_ops,
    [FDP_ROUTE] = &fdp_route_ops,
    [FDP_PEER] = &fdp_peer_ops,
    [FDP_FDB_ANY] = &fdp_fdb_any_ops,
};

int fdp_next_message(const uint8_t **at, const uint8_t *end, struct fdp_message *message)
{
    struct nlmsghdr head;
    size_t left = (size_t)(end - *at);

    if (left < sizeof head)
        return left ? -EBADMSG : 0;
    memcpy(&head, *at, sizeof head);
    if (head.nlmsg_len < sizeof head || head.nlmsg_len > left)
        return -EBADMSG;
    message->type = head.nlmsg_type;
    message->flags = head.nlmsg_flags;
    message->seq = head.nlmsg_seq;
    message->port = head.nlmsg_pid;
    message->body = *at + sizeof head;
    message->size = head.nlmsg_len - (uint32_t)sizeof head;
    size_t step = ALIGN((size_t)head.nlmsg_len);
    *at += step < left ? step : left;
    return 1;
}

size_t fdp_encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    const struct fdp_kind_ops *ops = fdp_kinds[scope->kind];

    return ops->encode_dump ? ops->encode_dump(scope, seq, to) : 0;
}

size_t fdp_encode_get(enum fdp_kind kind, const void *row, uint32_t seq, uint8_t *to)
{
    const struct fdp_kind_ops *ops = fdp_kinds[kind];

    return ops->encode_get ? ops->encode_get(row, seq, to) : 0;
}

int fdp_decode(const struct fdp_scope *scope, const struct fdp_message *message,
               union fdp_row *row)
{
    const struct fdp_kind_ops *ops = fdp_kinds[scope->kind];

    if (message->type != ops->message || !ops->decode)
        return FDP_SKIP;
    if (message->size < ops->head)
        return -EBADMSG;
    memset(row, 0, fdp_layouts[scope->kind].row);
    return ops->decode(scope, message, row);
}
