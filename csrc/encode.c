/* SPDX-License-Identifier: Apache-2.0
 *
 * What the kernel is asked and told: requests for dumps, and rows to messages.
 */
#include "rtnl.h"
#include "wire.h"

#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/nexthop.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <string.h>

struct writer {
    uint8_t *start, *at;
};

static INLINE struct writer begin(uint8_t *to, uint16_t type, uint16_t flags, uint32_t seq)
{
    struct nlmsghdr head = {.nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags,
                            .nlmsg_seq = seq};

    memcpy(to, &head, sizeof head);
    return (struct writer){to, to + sizeof head};
}

static INLINE void put(struct writer *writer, const void *data, size_t size)
{
    memcpy(writer->at, data, size);
    memset(writer->at + size, 0, ALIGN(size) - size);
    writer->at += ALIGN(size);
}

static INLINE void put_attribute(struct writer *writer, uint16_t type, const void *data, size_t size)
{
    struct rtattr head = {(uint16_t)(sizeof head + size), type};

    put(writer, &head, sizeof head);
    put(writer, data, size);
}

static INLINE void put_address(struct writer *writer, uint16_t type, const uint8_t *address,
                               uint8_t family)
{
    if (family == AF_INET6)
        put_attribute(writer, type, address, 16);
    else
        put_attribute(writer, type, address, 4);
}

static INLINE void put_u32(struct writer *writer, uint16_t type, uint32_t value)
{
    if (value)
        put_attribute(writer, type, &value, sizeof value);
}

static INLINE size_t finish(struct writer *writer)
{
    uint32_t length = (uint32_t)(writer->at - writer->start);

    memcpy(writer->start, &length, sizeof length);
    return length;
}

size_t fdp_encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    struct writer writer;

    switch (scope->kind) {
    case FDP_NEIGHBOUR: {
        struct ndmsg head = {.ndm_family = scope->family};

        writer = begin(to, RTM_GETNEIGH, NLM_F_DUMP, seq);
        put(&writer, &head, sizeof head);
        put_u32(&writer, NDA_IFINDEX, scope->ifindex);
        break;
    }
    case FDP_FDB: {
        /* Strict checking wants the device in the header here, and there as an
         * attribute (net/core/rtnetlink.c valid_fdb_dump_strict). */
        struct ndmsg head = {.ndm_family = AF_BRIDGE, .ndm_ifindex = (int)scope->ifindex};

        writer = begin(to, RTM_GETNEIGH, NLM_F_DUMP, seq);
        put(&writer, &head, sizeof head);
        break;
    }
    case FDP_NEXTHOP: {
        struct nhmsg head = {.nh_family = scope->ifindex ? AF_UNSPEC : scope->family};

        writer = begin(to, RTM_GETNEXTHOP, NLM_F_DUMP, seq);
        put(&writer, &head, sizeof head);
        put_u32(&writer, NHA_OIF, scope->ifindex);
        break;
    }
    default: {
        struct rtmsg head = {.rtm_family = scope->family,
                             .rtm_protocol = scope->marked ? scope->protocol : 0,
                             .rtm_type = scope->type};

        writer = begin(to, RTM_GETROUTE, NLM_F_DUMP, seq);
        put(&writer, &head, sizeof head);
        put_u32(&writer, RTA_TABLE, scope->table);
        put_u32(&writer, RTA_OIF, scope->ifindex);
        break;
    }
    }
    return finish(&writer);
}

static size_t encode_neighbour(enum fdp_op_kind op, const struct fdp_neighbour *row, uint32_t seq,
                               uint16_t flags, uint8_t *to)
{
    const int remove = op == FDP_REMOVE;
    struct ndmsg head = {.ndm_family = row->family, .ndm_ifindex = (int)row->ifindex,
                         .ndm_state = remove ? 0 : row->state, .ndm_type = RTN_UNICAST};
    struct writer writer = begin(to, remove ? RTM_DELNEIGH : RTM_NEWNEIGH,
                                 flags | (remove ? 0 : NLM_F_CREATE | NLM_F_REPLACE), seq);

    put(&writer, &head, sizeof head);
    put_address(&writer, NDA_DST, row->address, row->family);
    if (!remove)
        put_attribute(&writer, NDA_LLADDR, row->mac, sizeof row->mac);
    return finish(&writer);
}

static size_t encode_fdb(enum fdp_op_kind op, const struct fdp_fdb *row, uint32_t seq,
                         uint16_t flags, uint8_t *to)
{
    const int remove = op == FDP_REMOVE;
    struct ndmsg head = {.ndm_family = AF_BRIDGE, .ndm_ifindex = (int)row->ifindex,
                         .ndm_state = row->state, .ndm_flags = NTF_SELF};
    struct writer writer = begin(to, remove ? RTM_DELNEIGH : RTM_NEWNEIGH,
                                 flags | (remove ? 0 : NLM_F_CREATE | NLM_F_REPLACE), seq);

    put(&writer, &head, sizeof head);
    put_attribute(&writer, NDA_LLADDR, row->mac, sizeof row->mac);
    /* A removal names the remote, so that only this one of several goes. */
    if (row->family)
        put_address(&writer, NDA_DST, row->endpoint, row->family);
    if (row->port) {
        uint8_t port[2] = {(uint8_t)(row->port >> 8), (uint8_t)row->port};

        put_attribute(&writer, NDA_PORT, port, sizeof port);
    }
    put_u32(&writer, NDA_VNI, row->vni);
    put_u32(&writer, NDA_IFINDEX, row->via);
    if (!remove)
        put_u32(&writer, NDA_NH_ID, row->nexthop);
    else
        put_u32(&writer, NDA_SRC_VNI, row->src_vni); /* part of the key; we never add any */
    return finish(&writer);
}

static size_t encode_nexthop(enum fdp_op_kind op, const struct fdp_nexthop *row, uint32_t seq,
                             uint16_t flags, uint8_t *to)
{
    const int remove = op == FDP_REMOVE;
    struct nhmsg head = {.nh_family = remove ? AF_UNSPEC : row->family,
                         .nh_protocol = remove ? 0 : row->protocol,
                         .nh_flags = !remove && row->onlink ? RTNH_F_ONLINK : 0};
    struct writer writer = begin(to, remove ? RTM_DELNEXTHOP : RTM_NEWNEXTHOP, flags, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, NHA_ID, row->id);
    if (!remove) {
        put_address(&writer, NHA_GATEWAY, row->gateway, row->family);
        put_u32(&writer, NHA_OIF, row->ifindex);
    }
    return finish(&writer);
}

static size_t encode_route(enum fdp_op_kind op, const struct fdp_route *row, uint32_t seq,
                           uint16_t flags, uint8_t *to)
{
    const int remove = op == FDP_REMOVE;
    struct rtmsg head = {
        .rtm_family = row->family,
        .rtm_dst_len = row->length,
        .rtm_tos = row->tos,
        .rtm_table = row->table < 256 ? (uint8_t)row->table : RT_TABLE_COMPAT,
        .rtm_protocol = row->protocol,
        .rtm_scope = remove ? RT_SCOPE_NOWHERE : RT_SCOPE_UNIVERSE,
        .rtm_type = remove ? RTN_UNSPEC : row->type,
        .rtm_flags = !remove && row->onlink ? RTNH_F_ONLINK : 0,
    };
    struct writer writer = begin(to, remove ? RTM_DELROUTE : RTM_NEWROUTE, flags, seq);

    if (row->gateway_family == 0 && !row->nexthop && !remove && row->type == RTN_UNICAST)
        head.rtm_scope = RT_SCOPE_LINK;
    put(&writer, &head, sizeof head);
    put_address(&writer, RTA_DST, row->prefix, row->family);
    if (row->table >= 256)
        put_u32(&writer, RTA_TABLE, row->table);
    put_u32(&writer, RTA_PRIORITY, row->metric);
    if (row->nexthop) {
        put_u32(&writer, RTA_NH_ID, row->nexthop);
    } else if (!row->other || !remove) {
        if (row->gateway_family)
            put_address(&writer, RTA_GATEWAY, row->gateway, row->gateway_family);
        put_u32(&writer, RTA_OIF, row->ifindex);
    }
    return finish(&writer);
}

size_t fdp_encode(enum fdp_kind kind, enum fdp_op_kind op, const void *row, uint32_t seq,
                  uint16_t more_flags, uint8_t *to)
{
    uint16_t how = op == FDP_ADD       ? NLM_F_CREATE | NLM_F_EXCL
                   : op == FDP_REPLACE ? NLM_F_CREATE | NLM_F_REPLACE
                                       : 0;

    switch (kind) {
    case FDP_NEIGHBOUR:
        return encode_neighbour(op, row, seq, more_flags, to);
    case FDP_FDB:
        return encode_fdb(op, row, seq, more_flags, to);
    case FDP_NEXTHOP:
        return encode_nexthop(op, row, seq, how | more_flags, to);
    default:
        return encode_route(op, row, seq, how | more_flags, to);
    }
}

size_t fdp_encode_get(enum fdp_kind kind, const void *row, uint32_t seq, uint8_t *to)
{
    struct writer writer;

    if (kind == FDP_NEXTHOP) {
        struct nhmsg head = {.nh_family = AF_UNSPEC};

        writer = begin(to, RTM_GETNEXTHOP, NLM_F_ACK, seq);
        put(&writer, &head, sizeof head);
        put_u32(&writer, NHA_ID, ((const struct fdp_nexthop *)row)->id);
    } else if (kind == FDP_FDB) {
        const struct fdp_fdb *fdb = row;
        /* Strict checking takes the MAC and nothing else, or EINVAL
         * (tests/kernel/test_core.py::test_get_one_entry). */
        struct ndmsg head = {.ndm_family = AF_BRIDGE, .ndm_ifindex = (int)fdb->ifindex,
                             .ndm_flags = NTF_SELF};

        writer = begin(to, RTM_GETNEIGH, NLM_F_ACK, seq);
        put(&writer, &head, sizeof head);
        put_attribute(&writer, NDA_LLADDR, fdb->mac, sizeof fdb->mac);
    } else {
        const struct fdp_neighbour *neighbour = row;
        struct ndmsg head = {.ndm_family = neighbour->family,
                             .ndm_ifindex = (int)neighbour->ifindex};

        writer = begin(to, RTM_GETNEIGH, NLM_F_ACK, seq);
        put(&writer, &head, sizeof head);
        put_address(&writer, NDA_DST, neighbour->address, neighbour->family);
    }
    return finish(&writer);
}
