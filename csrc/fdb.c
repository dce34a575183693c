/* SPDX-License-Identifier: Apache-2.0
 *
 * The FDB of a vxlan device: `bridge fdb`, ndmsg of AF_BRIDGE with a MAC as key.
 */
#include "fdb.h"
#include "wire.h"

#include <linux/if_ether.h>
#include <linux/neighbour.h>

static size_t encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    /* Strict checking wants the device in the header here, and in an attribute where
     * neighbours are dumped (net/core/rtnetlink.c valid_fdb_dump_strict). */
    struct ndmsg head = {.ndm_family = AF_BRIDGE, .ndm_ifindex = (int)scope->ifindex};
    struct writer writer = begin(to, RTM_GETNEIGH, NLM_F_DUMP, seq);

    put(&writer, &head, sizeof head);
    return finish(&writer);
}

static size_t encode_get(const void *any, uint32_t seq, uint8_t *to)
{
    const struct fdp_fdb *row = any;
    /* Strict checking takes the MAC and nothing else, or EINVAL
     * (tests/kernel/test_core.py::test_get_one_entry). */
    struct ndmsg head = {.ndm_family = AF_BRIDGE, .ndm_ifindex = (int)row->ifindex,
                         .ndm_flags = NTF_SELF};
    struct writer writer = begin(to, RTM_GETNEIGH, NLM_F_ACK, seq);

    put(&writer, &head, sizeof head);
    put_attribute(&writer, NDA_LLADDR, row->mac, sizeof row->mac);
    return finish(&writer);
}

static size_t encode(enum fdp_op_kind op, const void *any, uint32_t seq, uint16_t flags,
                     uint8_t *to)
{
    const struct fdp_fdb *row = any;
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

static int decode(const struct fdp_scope *scope, const struct fdp_message *message, void *any)
{
    struct fdp_fdb *row = any;
    struct ndmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more, has_mac = 0, err = 0;

    if (head.ndm_family != AF_BRIDGE || !(head.ndm_flags & NTF_SELF))
        return FDP_SKIP;
    row->ifindex = (uint32_t)head.ndm_ifindex;
    row->state = head.ndm_state;
    row->other = head.ndm_flags & (NTF_EXT_LEARNED | NTF_ROUTER | NTF_STICKY);
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
    /* Old kernels ignore the device filter of a request they do not check. */
    if (scope->ifindex && row->ifindex != scope->ifindex)
        return FDP_SKIP;
    if (!has_mac || !scope->owner)
        return has_mac ? FDP_OURS : FDP_SKIP;
    struct fdp_fdb_any wide;
    fdp_fdb_widen(row, &wide);
    return fdp_fdb_owner(scope, &wide);
}

const struct fdp_kind_ops fdp_fdb_ops = {
    .message = RTM_NEWNEIGH,
    .head = sizeof(struct ndmsg),
    .encode_dump = encode_dump,
    .encode_get = encode_get,
    .encode = encode,
    .decode = decode,
};
