/* SPDX-License-Identifier: Apache-2.0
 *
 * What the kernel says of its tables: messages to rows, every length checked.
 */
#include "rtnl.h"
#include "wire.h"

#include <errno.h>
#include <linux/if_ether.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/nexthop.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <string.h>

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
    row->other = head->ndm_flags & NTF_EXT_LEARNED;
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
    row->other = head->ndm_flags & (NTF_EXT_LEARNED | NTF_ROUTER);
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
        case NDA_SRC_VNI:
            err = read_u32(&attribute, &row->src_vni);
            break;
        case NDA_IFINDEX:
            err = read_u32(&attribute, &row->via);
            break;
        case NDA_NH_ID:
            /* An entry on a nexthop group cannot become one with a remote, nor
             * the reverse (vxlan_fdb_update_existing): it is another key, so
             * that it is removed and the right one added. */
            err = read_u32(&attribute, &row->nexthop);
            row->on_nexthop = row->nexthop != 0;
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
            row->other |= FDP_GROUP;
            break;
        case NHA_BLACKHOLE:
            row->other |= FDP_BLACKHOLE;
            break;
        case NHA_ENCAP:
            row->other |= FDP_NEXTHOP_ENCAP;
            break;
        case NHA_FDB:
            row->other |= FDP_FOR_FDB;
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
    row->other = head->rtm_src_len ? FDP_FROM : 0;
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
        case RTA_VIA:
            row->other |= FDP_VIA;
            break;
        case RTA_MULTIPATH:
            row->other |= FDP_PATHS;
            break;
        case RTA_ENCAP_TYPE:
            row->other |= FDP_ENCAP;
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
