/* SPDX-License-Identifier: Apache-2.0
 *
 * Routes: `ip route`.
 */
#include "wire.h"

static size_t encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    struct rtmsg head = {.rtm_family = scope->family,
                         .rtm_protocol = scope->marked ? scope->protocol : 0,
                         .rtm_type = scope->type};
    struct writer writer = begin(to, RTM_GETROUTE, NLM_F_DUMP, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, RTA_TABLE, scope->table);
    put_u32(&writer, RTA_OIF, scope->ifindex);
    return finish(&writer);
}

/* `mtu N`: a metric of the route, in an attribute of attributes. */
static void put_mtu(struct writer *writer, uint32_t mtu)
{
    struct {
        struct rtattr head;
        uint32_t value;
    } metric = {{sizeof metric, RTAX_MTU}, mtu};

    put_attribute(writer, RTA_METRICS, &metric, sizeof metric);
}

/* What of the metrics a row holds: an MTU alone, else they are others. */
static int read_metrics(const struct attribute *metrics, struct fdp_route *row)
{
    struct cursor cursor = {metrics->data, metrics->data + metrics->size};
    struct attribute metric;
    uint32_t value = 0;
    int more, err = 0;

    while (!err && (more = next_attribute(&cursor, &metric)) > 0) {
        if (metric.type == RTAX_MTU)
            err = read_u32(&metric, &value);
        if (metric.type != RTAX_MTU || value > UINT16_MAX)
            row->other |= FDP_DRESSED;
        else
            row->mtu = (uint16_t)value;
    }
    return err ? err : more;
}

/* Of a route with a source address or metrics, which of them. A pass of its own over its
 * attributes, so that all other routes are read by a loop that keeps in registers. */
static __attribute__((noinline, cold)) int read_dress(const struct fdp_message *message,
                                                      struct fdp_route *row)
{
    struct rtmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int err = 0;

    row->other &= (uint8_t)~FDP_DRESSED;
    while (!err && next_attribute(&cursor, &attribute) > 0) {
        if (attribute.type == RTA_PREFSRC)
            row->other |= FDP_DRESSED;
        else if (attribute.type == RTA_METRICS)
            err = read_metrics(&attribute, row);
    }
    return err ? err : 1;
}

static size_t encode(enum fdp_op_kind op, const void *any, uint32_t seq, uint16_t flags,
                     uint8_t *to)
{
    const struct fdp_route *row = any;
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
    struct writer writer = begin(to, remove ? RTM_DELROUTE : RTM_NEWROUTE,
                                 change_flags(op) | flags, seq);

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
    /* Of a nexthop object's routes without metrics the kernel makes one, which may have an MTU
     * (fib_create_info finds it by fib_find_info_nh): that there are no metrics has to be said. */
    if (!remove && (row->mtu || (op == FDP_REPLACE && row->nexthop && row->family == AF_INET)))
        put_mtu(&writer, row->mtu);
    return finish(&writer);
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

/* The fields of a message, as they are there, and its paths where there are several. A row
 * was read (1), or FDP_SKIP, or -EBADMSG. */
static int read_fields(uint8_t family, const struct fdp_message *message, struct fdp_route *row,
                       struct attribute *paths)
{
    struct rtmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more, err = 0;

    if (head.rtm_family != family || head.rtm_flags & RTM_F_CLONED)
        return FDP_SKIP;
    row->family = head.rtm_family;
    row->length = head.rtm_dst_len;
    row->tos = head.rtm_tos;
    row->table = head.rtm_table;
    row->protocol = head.rtm_protocol;
    row->type = head.rtm_type;
    row->onlink = (head.rtm_flags & RTNH_F_ONLINK) != 0;
    row->other = head.rtm_src_len ? FDP_FROM : 0;
    if (row->length > address_size(row->family) * 8)
        return -EBADMSG;
    while ((more = next_attribute(&cursor, &attribute)) > 0) {
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
            *paths = attribute;
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
        if (err)
            return err;
    }
    if (more < 0)
        return more;
    return row->other & FDP_DRESSED ? read_dress(message, row) : 1;
}

/* Take out of a row what says nothing of it. */
static void tidy(struct fdp_route *row)
{
    if (row->type != RTN_UNICAST) /* IPv6 puts those that lead nowhere on lo */
        row->ifindex = 0;
    if (row->nexthop) { /* the rest only repeats the nexthop object */
        memset(row->gateway, 0, sizeof row->gateway);
        row->ifindex = 0;
        row->gateway_family = row->onlink = row->other = 0;
    }
}

static int decode(const struct fdp_scope *scope, const struct fdp_message *message, void *any)
{
    struct fdp_route *row = any;
    struct attribute paths;
    int state = read_fields(scope->family, message, row, &paths);

    if (state <= 0)
        return state;
    if ((scope->table && row->table != scope->table) || (scope->type && row->type != scope->type))
        return FDP_SKIP;
    int mine = route_is_ours(scope, row);
    tidy(row);
    return mine ? FDP_OURS : FDP_FOREIGN;
}

/* Whether one of several paths leads out of a device. */
static int has_path(const struct attribute *paths, uint32_t ifindex)
{
    const uint8_t *at = paths->data;
    size_t left = paths->size;
    struct rtnexthop hop;

    while (left >= sizeof hop) {
        memcpy(&hop, at, sizeof hop);
        if (hop.rtnh_len < sizeof hop || hop.rtnh_len > left)
            return -EBADMSG;
        if ((uint32_t)hop.rtnh_ifindex == ifindex)
            return 1;
        size_t step = ALIGN((size_t)hop.rtnh_len);
        at += step < left ? step : left;
        left -= step < left ? step : left;
    }
    return 0;
}

/* Whether the kernel, asked for a scope, sends this route (fib_dump_info_fnhe() and
 * rt6_dump_route() after their filters): 1, 0, or negative. */
static int is_sent(const struct fdp_scope *scope, const struct fdp_route *row,
                   const struct attribute *paths)
{
    if (row->family != scope->family || (scope->table && row->table != scope->table) ||
        (scope->type && row->type != scope->type) ||
        (scope->marked && scope->protocol && row->protocol != scope->protocol))
        return 0;
    if (!scope->ifindex || row->ifindex == scope->ifindex)
        return 1;
    if (row->other & FDP_PATHS)
        return has_path(paths, scope->ifindex);
    /* With net.ipv4.nexthop_compat_mode 0 a message names the nexthop object alone. */
    return row->nexthop && !row->ifindex && row->type == RTN_UNICAST ? -ENODATA : 0;
}

int fdp_route_sort(const struct fdp_scope *scopes, uint32_t count,
                   const struct fdp_message *message, struct fdp_route *row, uint8_t *owners)
{
    struct attribute paths = {0};
    int some = 0;

    if (message->size < sizeof(struct rtmsg))
        return -EBADMSG;
    memset(row, 0, sizeof *row);
    int state = count ? read_fields(scopes->family, message, row, &paths) : FDP_SKIP;
    if (state <= 0)
        return state;
    for (uint32_t i = 0; i < count; i++) {
        int sent = is_sent(&scopes[i], row, &paths);

        if (sent < 0)
            return sent;
        owners[i] = !sent ? FDP_SKIP : route_is_ours(&scopes[i], row) ? FDP_OURS : FDP_FOREIGN;
        some |= sent;
    }
    tidy(row);
    return some;
}

int fdp_route_is_written(const struct fdp_message *message, const uint8_t *protocols, size_t size,
                         const uint32_t *devices, size_t count)
{
    struct rtmsg head;

    if (message->type != RTM_NEWROUTE)
        return 0;
    if (message->size < sizeof head)
        return -EBADMSG;
    memcpy(&head, message->body, sizeof head);
    if (!memchr(protocols, head.rtm_protocol, size))
        return 0;

    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more;
    while ((more = next_attribute(&cursor, &attribute)) > 0) {
        uint32_t ifindex;

        if (attribute.type != RTA_OIF)
            continue;
        if (read_u32(&attribute, &ifindex))
            return -EBADMSG;
        for (size_t i = 0; i < count; i++)
            if (devices[i] == ifindex)
                return 0;
    }
    return more < 0 ? more : 1;
}

/* A route goes with the nexthop object that it uses, and the kernel then answers its
 * removal with EINVAL ("Nexthop id does not exist"): it is gone all the same
 * (tests/kernel/test_core.py::test_deleting_from_a_device_that_is_gone_is_a_success). */
static int is_gone(const void *any, int error)
{
    const struct fdp_route *row = any;

    return error == EINVAL && row->nexthop;
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

const struct fdp_kind_ops fdp_route_ops = {
    .message = RTM_NEWROUTE,
    .head = sizeof(struct rtmsg),
    .encode_dump = encode_dump,
    .encode = encode,
    .decode = decode,
    .is_gone = is_gone,
};
