/* SPDX-License-Identifier: Apache-2.0
 *
 * Nexthop objects: `ip nexthop`, Linux 5.3 and later.
 */
#include "wire.h"

#include <linux/nexthop.h>

static size_t encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    struct nhmsg head = {.nh_family = scope->ifindex ? AF_UNSPEC : scope->family};
    struct writer writer = begin(to, RTM_GETNEXTHOP, NLM_F_DUMP, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, NHA_OIF, scope->ifindex);
    return finish(&writer);
}

static size_t encode_get(const void *any, uint32_t seq, uint8_t *to)
{
    const struct fdp_nexthop *row = any;
    struct nhmsg head = {.nh_family = AF_UNSPEC};
    struct writer writer = begin(to, RTM_GETNEXTHOP, NLM_F_ACK, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, NHA_ID, row->id);
    return finish(&writer);
}

static size_t encode(enum fdp_op_kind op, const void *any, uint32_t seq, uint16_t flags,
                     uint8_t *to)
{
    const struct fdp_nexthop *row = any;
    const int remove = op == FDP_REMOVE;
    struct nhmsg head = {.nh_family = remove ? AF_UNSPEC : row->family,
                         .nh_protocol = remove ? 0 : row->protocol,
                         .nh_flags = !remove && row->onlink ? RTNH_F_ONLINK : 0};
    struct writer writer = begin(to, remove ? RTM_DELNEXTHOP : RTM_NEWNEXTHOP,
                                 change_flags(op) | flags, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, NHA_ID, row->id);
    if (!remove) {
        put_address(&writer, NHA_GATEWAY, row->gateway, row->family);
        put_u32(&writer, NHA_OIF, row->ifindex);
    }
    return finish(&writer);
}

static int decode(const struct fdp_scope *scope, const struct fdp_message *message, void *any)
{
    struct fdp_nexthop *row = any;
    struct nhmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more, err = 0;

    row->family = head.nh_family;
    row->protocol = head.nh_protocol;
    row->onlink = (head.nh_flags & RTNH_F_ONLINK) != 0;
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

const struct fdp_kind_ops fdp_nexthop_ops = {
    .message = RTM_NEWNEXTHOP,
    .head = sizeof(struct nhmsg),
    .encode_dump = encode_dump,
    .encode_get = encode_get,
    .encode = encode,
    .decode = decode,
};
