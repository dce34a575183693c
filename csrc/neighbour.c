/* SPDX-License-Identifier: Apache-2.0
 *
 * The ARP/ND table: `ip neigh`. Its messages are ndmsg, as those of the FDB (fdb.c) are;
 * here an address is the key.
 */
#include "wire.h"

#include <linux/neighbour.h>

static size_t encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    struct ndmsg head = {.ndm_family = scope->family};
    struct writer writer = begin(to, RTM_GETNEIGH, NLM_F_DUMP, seq);

    put(&writer, &head, sizeof head);
    put_u32(&writer, NDA_IFINDEX, scope->ifindex);
    return finish(&writer);
}

static size_t encode_get(const void *any, uint32_t seq, uint8_t *to)
{
    const struct fdp_neighbour *row = any;
    struct ndmsg head = {.ndm_family = row->family, .ndm_ifindex = (int)row->ifindex};
    struct writer writer = begin(to, RTM_GETNEIGH, NLM_F_ACK, seq);

    put(&writer, &head, sizeof head);
    put_address(&writer, NDA_DST, row->address, row->family);
    return finish(&writer);
}

static size_t encode(enum fdp_op_kind op, const void *any, uint32_t seq, uint16_t flags,
                     uint8_t *to)
{
    const struct fdp_neighbour *row = any;
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

static int decode(const struct fdp_scope *scope, const struct fdp_message *message, void *any)
{
    struct fdp_neighbour *row = any;
    struct ndmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more, has_address = 0;

    if (head.ndm_family != scope->family || (head.ndm_flags & NTF_PROXY))
        return FDP_SKIP;
    row->ifindex = (uint32_t)head.ndm_ifindex;
    row->family = head.ndm_family;
    row->state = head.ndm_state;
    row->other = head.ndm_flags & NTF_EXT_LEARNED;
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
    /* Old kernels ignore the device filter of a request they do not check. */
    if (scope->ifindex && row->ifindex != scope->ifindex)
        return FDP_SKIP;
    /* The kernel's multicast mappings and its own guesses come and go by
     * themselves; only where one sits on a key of ours it is replaced. */
    return row->state & NUD_PERMANENT ? FDP_OURS : FDP_YIELDS;
}

const struct fdp_kind_ops fdp_neighbour_ops = {
    .message = RTM_NEWNEIGH,
    .head = sizeof(struct ndmsg),
    .encode_dump = encode_dump,
    .encode_get = encode_get,
    .encode = encode,
    .decode = decode,
};
