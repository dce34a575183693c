/* SPDX-License-Identifier: Apache-2.0 */
#include "rtnl.h"

#include <errno.h>
#include <linux/if_ether.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/nexthop.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <string.h>

#define ALIGN(n) (((n) + 3u) & ~3u)

/* Sizes are constants where these are called: inlined, a message is a few moves. */
#define INLINE inline __attribute__((always_inline))

/* ---- reading ---------------------------------------------------------- */

struct cursor {
    const uint8_t *at, *end;
};

struct attribute {
    uint16_t type, size;
    const uint8_t *data;
};

/* The only place where attribute lengths are believed or not. 1, 0 at the end,
 * -EBADMSG. */
static INLINE int next_attribute(struct cursor *cursor, struct attribute *attribute)
{
    struct rtattr head;
    size_t left = (size_t)(cursor->end - cursor->at);

    if (left < sizeof head)
        return left ? -EBADMSG : 0;
    memcpy(&head, cursor->at, sizeof head);
    if (head.rta_len < sizeof head || head.rta_len > left)
        return -EBADMSG;
    attribute->type = head.rta_type & NLA_TYPE_MASK;
    attribute->size = (uint16_t)(head.rta_len - sizeof head);
    attribute->data = cursor->at + sizeof head;
    cursor->at += ALIGN(head.rta_len) < left ? ALIGN(head.rta_len) : left;
    return 1;
}

static INLINE int read_u32(const struct attribute *attribute, uint32_t *to)
{
    if (attribute->size < 4)
        return -EBADMSG;
    memcpy(to, attribute->data, 4);
    return 0;
}

/* 4 or 16 bytes, each of which is a move or two. */
static INLINE void copy_address(uint8_t *to, const uint8_t *from, size_t size)
{
    if (size == 16)
        memcpy(to, from, 16);
    else
        memcpy(to, from, 4);
}

static INLINE size_t address_size(uint8_t family)
{
    return family == AF_INET6 ? 16 : 4;
}

/* An address attribute; its family follows from its size. */
static INLINE int read_address(const struct attribute *attribute, uint8_t to[16], uint8_t *family)
{
    if (attribute->size != 4 && attribute->size != 16)
        return -EBADMSG;
    copy_address(to, attribute->data, attribute->size);
    if (family)
        *family = attribute->size == 4 ? AF_INET : AF_INET6;
    return 0;
}

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
    message->body = *at + sizeof head;
    message->size = head.nlmsg_len - (uint32_t)sizeof head;
    size_t step = ALIGN((size_t)head.nlmsg_len);
    *at += step < left ? step : left;
    return 1;
}

/* Both neighbour tables come as ndmsg: ARP/ND with an address as key, the
 * vxlan fdb (AF_BRIDGE) with a MAC as key. */
static int decode_neighbour(const struct fdp_scope *scope, const struct ndmsg *head,
                            struct cursor cursor, struct fdp_neighbour *row)
{
    struct attribute attribute;
    int more, has_address = 0;

    if (head->ndm_family != scope->family || (head->ndm_flags & NTF_PROXY))
        return FDP_SKIP;
    row->ifindex = (uint32_t)head->ndm_ifindex;
    row->family = head->ndm_family;
    row->state = head->ndm_state;
    while ((more = next_attribute(&cursor, &attribute)) > 0) {
        if (attribute.type == NDA_DST) {
            if (attribute.size != address_size(row->family))
                return -EBADMSG;
            copy_address(row->address, attribute.data, attribute.size);
            has_address = 1;
        } else if (attribute.type == NDA_LLADDR && attribute.size == sizeof row->mac) {
            memcpy(row->mac, attribute.data, sizeof row->mac);
        }
    }
    if (more < 0)
        return more;
    if (!has_address)
        return FDP_SKIP;
    /* The kernel's multicast mappings and its own guesses come and go by
     * themselves; only where one sits on a key of ours it is replaced. */
    return row->state & NUD_PERMANENT ? FDP_OURS : FDP_YIELDS;
}

static int decode_fdb(const struct ndmsg *head, struct cursor cursor, struct fdp_fdb *row)
{
    struct attribute attribute;
    int more, has_mac = 0, err = 0;

    if (head->ndm_family != AF_BRIDGE || !(head->ndm_flags & NTF_SELF))
        return FDP_SKIP;
    row->ifindex = (uint32_t)head->ndm_ifindex;
    row->state = head->ndm_state;
    while (!err && (more = next_attribute(&cursor, &attribute)) > 0) {
        switch (attribute.type) {
        case NDA_LLADDR:
            if (attribute.size != sizeof row->mac)
                return FDP_SKIP;
            memcpy(row->mac, attribute.data, sizeof row->mac);
            has_mac = 1;
            break;
        case NDA_DST:
            err = read_address(&attribute, row->endpoint, &row->family);
            break;
        case NDA_VNI:
            err = read_u32(&attribute, &row->vni);
            break;
        case NDA_IFINDEX:
            err = read_u32(&attribute, &row->via);
            break;
        case NDA_NH_ID:
            /* An entry on a nexthop group cannot become one with a remote, nor
             * the reverse (vxlan_fdb_update_existing): it is another key, so
             * that it is removed and the right one added. */
            err = read_u32(&attribute, &row->nexthop);
            row->pad[0] = row->nexthop != 0;
            break;
        case NDA_PORT:
            if (attribute.size < 2)
                return -EBADMSG;
            row->port = (uint16_t)(attribute.data[0] << 8 | attribute.data[1]);
            break;
        default:
            break;
        }
    }
    if (err || more < 0)
        return err ? err : more;
    return has_mac ? FDP_OURS : FDP_SKIP;
}

static int decode_nexthop(const struct fdp_scope *scope, const struct nhmsg *head,
                          struct cursor cursor, struct fdp_nexthop *row)
{
    struct attribute attribute;
    int more, err = 0;

    row->family = head->nh_family;
    row->protocol = head->nh_protocol;
    row->onlink = (head->nh_flags & RTNH_F_ONLINK) != 0;
    while (!err && (more = next_attribute(&cursor, &attribute)) > 0) {
        switch (attribute.type) {
        case NHA_ID:
            err = read_u32(&attribute, &row->id);
            break;
        case NHA_OIF:
            err = read_u32(&attribute, &row->ifindex);
            break;
        case NHA_GATEWAY:
            err = read_address(&attribute, row->gateway, NULL);
            break;
        case NHA_GROUP:
        case NHA_BLACKHOLE:
        case NHA_ENCAP:
        case NHA_FDB:
            row->other = 1;
            break;
        default:
            break;
        }
    }
    if (err || more < 0)
        return err ? err : more;
    if (!row->id)
        return -EBADMSG;
    int mine = (!scope->protocol || row->protocol == scope->protocol) &&
               row->id >= scope->id_first && row->id <= scope->id_last &&
               (!scope->ifindex || row->ifindex == scope->ifindex);
    return mine ? FDP_OURS : FDP_FOREIGN;
}

static int prefix_within(const struct fdp_scope *scope, const struct fdp_route *row)
{
    uint8_t whole = scope->length / 8, bits = scope->length % 8;

    if (row->length < scope->length || memcmp(row->prefix, scope->prefix, whole) != 0)
        return 0;
    return !bits || !((row->prefix[whole] ^ scope->prefix[whole]) >> (8 - bits));
}

static int route_is_ours(const struct fdp_scope *scope, const struct fdp_route *row)
{
    if (scope->ifindex && row->ifindex && row->ifindex != scope->ifindex)
        return 0;
    /* What the kernel or a router advertisement puts on a device stays. */
    if (row->protocol == RTPROT_KERNEL || row->protocol == RTPROT_RA ||
        row->protocol == RTPROT_REDIRECT)
        return 0;
    if (scope->exclusive)
        return 1;
    return (!scope->protocol || row->protocol == scope->protocol) && prefix_within(scope, row);
}

static int decode_route(const struct fdp_scope *scope, const struct rtmsg *head,
                        struct cursor cursor, struct fdp_route *row)
{
    struct attribute attribute;
    int more, err = 0;

    if (head->rtm_family != scope->family || head->rtm_flags & RTM_F_CLONED)
        return FDP_SKIP;
    row->family = head->rtm_family;
    row->length = head->rtm_dst_len;
    row->tos = head->rtm_tos;
    row->table = head->rtm_table;
    row->protocol = head->rtm_protocol;
    row->type = head->rtm_type;
    row->onlink = (head->rtm_flags & RTNH_F_ONLINK) != 0;
    row->other = head->rtm_src_len ? FDP_ELSEWHERE : 0;
    if (row->length > address_size(row->family) * 8)
        return -EBADMSG;
    while (!err && (more = next_attribute(&cursor, &attribute)) > 0) {
        switch (attribute.type) {
        case RTA_DST:
            if (attribute.size != address_size(row->family))
                return -EBADMSG;
            copy_address(row->prefix, attribute.data, attribute.size);
            break;
        case RTA_GATEWAY:
            err = read_address(&attribute, row->gateway, &row->gateway_family);
            break;
        case RTA_VIA: /* a gateway of the other family */
        case RTA_MULTIPATH:
        case RTA_ENCAP_TYPE:
            row->other |= FDP_ELSEWHERE;
            break;
        case RTA_PREFSRC:
        case RTA_METRICS:
            row->other |= FDP_DRESSED;
            break;
        case RTA_OIF:
            err = read_u32(&attribute, &row->ifindex);
            break;
        case RTA_PRIORITY:
            err = read_u32(&attribute, &row->metric);
            break;
        case RTA_TABLE:
            err = read_u32(&attribute, &row->table);
            break;
        case RTA_NH_ID:
            err = read_u32(&attribute, &row->nexthop);
            break;
        default:
            break;
        }
    }
    if (err || more < 0)
        return err ? err : more;
    if ((scope->table && row->table != scope->table) || (scope->type && row->type != scope->type))
        return FDP_SKIP;
    int mine = route_is_ours(scope, row);
    if (row->type != RTN_UNICAST) /* IPv6 puts those that lead nowhere on lo */
        row->ifindex = 0;
    if (row->nexthop) { /* the rest only repeats the nexthop object */
        memset(row->gateway, 0, sizeof row->gateway);
        row->ifindex = 0;
        row->gateway_family = row->onlink = row->other = 0;
    }
    return mine ? FDP_OURS : FDP_FOREIGN;
}

int fdp_decode(const struct fdp_scope *scope, const struct fdp_message *message,
               union fdp_row *row)
{
    static const struct {
        uint16_t type, head;
    } wanted[FDP_KINDS] = {
        [FDP_NEIGHBOUR] = {RTM_NEWNEIGH, sizeof(struct ndmsg)},
        [FDP_FDB] = {RTM_NEWNEIGH, sizeof(struct ndmsg)},
        [FDP_NEXTHOP] = {RTM_NEWNEXTHOP, sizeof(struct nhmsg)},
        [FDP_ROUTE] = {RTM_NEWROUTE, sizeof(struct rtmsg)},
    };
    union {
        struct ndmsg neighbour;
        struct nhmsg nexthop;
        struct rtmsg route;
    } head;
    const uint16_t size = wanted[scope->kind].head;

    if (message->type != wanted[scope->kind].type)
        return FDP_SKIP;
    if (message->size < size)
        return -EBADMSG;
    memcpy(&head, message->body, size);
    struct cursor cursor = {message->body + ALIGN(size), message->body + message->size};
    if (cursor.at > cursor.end)
        cursor.at = cursor.end;
    memset(row, 0, fdp_layouts[scope->kind].row);

    int owner;
    switch (scope->kind) {
    case FDP_NEIGHBOUR:
        owner = decode_neighbour(scope, &head.neighbour, cursor, &row->neighbour);
        break;
    case FDP_FDB:
        owner = decode_fdb(&head.neighbour, cursor, &row->fdb);
        break;
    case FDP_NEXTHOP:
        return decode_nexthop(scope, &head.nexthop, cursor, &row->nexthop);
    default:
        return decode_route(scope, &head.route, cursor, &row->route);
    }
    /* Old kernels ignore the device filter of a request they do not check. */
    if (owner > 0 && scope->ifindex && (uint32_t)head.neighbour.ndm_ifindex != scope->ifindex)
        return FDP_SKIP;
    return owner;
}

int fdp_route_names_device(const struct fdp_message *message)
{
    const size_t head = ALIGN(sizeof(struct rtmsg));
    struct attribute attribute;

    if (message->size < head)
        return 0;
    struct cursor cursor = {message->body + head, message->body + message->size};
    while (next_attribute(&cursor, &attribute) > 0)
        if (attribute.type == RTA_OIF)
            return 1;
    return 0;
}

/* ---- writing ---------------------------------------------------------- */

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
