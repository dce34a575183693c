/* SPDX-License-Identifier: Apache-2.0
 *
 * The FDB in all forms that the kernel has, of a vxlan device (NTF_SELF) and of the bridge that a
 * device is a port of (NTF_MASTER): `bridge fdb`. The messages are those of fdb.c.
 */
#include "fdb.h"
#include "wire.h"

#include <linux/if_ether.h>
#include <linux/neighbour.h>

/* Newer than some headers that this is compiled with. */
enum {
    FDB_EXT_ATTRS = 14, /* NDA_FDB_EXT_ATTRS */
    FLAGS_EXT = 15,     /* NDA_FLAGS_EXT */
    EXT_LOCKED = 2,     /* NTF_EXT_LOCKED */
    ACTIVITY_NOTIFY = 1, /* NFEA_ACTIVITY_NOTIFY, which has these bits: */
    NOTIFIES = 1,
    INACTIVE = 2,
};

void fdp_fdb_settle(struct fdp_fdb_any *row, const struct fdp_remote *remote)
{
    static const struct fdp_remote nowhere;
    const int list = fdp_has_list(row->mac);

    row->many = !list ? FDP_ONE : row->nexthop ? FDP_LIST_ON_NEXTHOP : FDP_LISTED;
    row->listed = row->many == FDP_LISTED ? *remote : nowhere;
    row->remote = row->many == FDP_ONE ? *remote : nowhere;
}

void fdp_fdb_widen(const struct fdp_fdb *row, struct fdp_fdb_any *to)
{
    struct fdp_remote remote = {.vni = row->vni, .via = row->via, .port = row->port,
                                .family = row->family};

    memset(to, 0, sizeof *to);
    memcpy(remote.endpoint, row->endpoint, sizeof remote.endpoint);
    to->ifindex = row->ifindex;
    memcpy(to->mac, row->mac, sizeof to->mac);
    to->src_vni = row->src_vni;
    to->place = FDP_SELF;
    to->nexthop = row->nexthop;
    to->state = fdp_fdb_state(row->state);
    to->flags = row->other;
    to->tag = row->tag;
    fdp_fdb_settle(to, &remote);
}

int fdp_fdb_owner(const struct fdp_scope *scope, const struct fdp_fdb_any *row)
{
    if (!(row->flags & FDP_LEARNED) && !(row->state & (NUD_PERMANENT | NUD_NOARP)))
        return FDP_YIELDS; /* learned by the kernel, which lets it age */
    if (row->place == FDP_MASTER && row->state & NUD_PERMANENT)
        return FDP_SHARED; /* an address of the bridge or of its port */
    if (row->place == FDP_SELF && !row->nexthop &&
        !(row->many ? row->listed.family : row->remote.family))
        return FDP_SHARED; /* an address that the device listens to */
    if (scope->owner == FDP_LEARNED_FDB)
        return row->flags & FDP_LEARNED ? FDP_OURS : FDP_SHARED;
    if (scope->owner == FDP_PLAIN_FDB)
        return row->flags || row->many ? FDP_SHARED : FDP_OURS;
    return FDP_OURS;
}

static size_t encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to)
{
    return fdp_fdb_ops.encode_dump(scope, seq, to);
}

/* Of a list one destination is added to those that there are; of any other MAC it is the only
 * one. A list on a nexthop group has to be new, as nothing would replace what there is. */
static uint16_t write_flags(const struct fdp_fdb_any *row)
{
    switch (row->many) {
    case FDP_LISTED:
        return NLM_F_CREATE | NLM_F_APPEND;
    case FDP_LIST_ON_NEXTHOP:
        return NLM_F_CREATE | NLM_F_EXCL;
    default:
        return NLM_F_CREATE | NLM_F_REPLACE;
    }
}

static size_t encode(enum fdp_op_kind op, const void *any, uint32_t seq, uint16_t flags,
                     uint8_t *to)
{
    const struct fdp_fdb_any *row = any;
    const struct fdp_remote *remote = row->many == FDP_LISTED ? &row->listed : &row->remote;
    const int remove = op == FDP_REMOVE;
    /* A vxlan device takes no entry that is neither permanent nor reachable. */
    struct ndmsg head = {
        .ndm_family = AF_BRIDGE,
        .ndm_ifindex = (int)row->ifindex,
        .ndm_state = row->state == NUD_NOARP ? NUD_NOARP | NUD_REACHABLE : row->state,
        .ndm_flags = (uint8_t)((row->place == FDP_MASTER ? NTF_MASTER : NTF_SELF) | row->flags),
    };
    struct writer writer = begin(to, remove ? RTM_DELNEIGH : RTM_NEWNEIGH,
                                 flags | (remove ? 0 : write_flags(row)), seq);

    put(&writer, &head, sizeof head);
    put_attribute(&writer, NDA_LLADDR, row->mac, sizeof row->mac);
    if (row->vlan)
        put_attribute(&writer, NDA_VLAN, &row->vlan, sizeof row->vlan);
    /* A removal names the destination, so that only this one of several goes. */
    if (remote->family)
        put_address(&writer, NDA_DST, remote->endpoint, remote->family);
    if (remote->port) {
        uint8_t port[2] = {(uint8_t)(remote->port >> 8), (uint8_t)remote->port};

        put_attribute(&writer, NDA_PORT, port, sizeof port);
    }
    put_u32(&writer, NDA_VNI, remote->vni);
    put_u32(&writer, NDA_IFINDEX, remote->via);
    if (!remove)
        put_u32(&writer, NDA_NH_ID, row->nexthop);
    put_u32(&writer, NDA_SRC_VNI, row->src_vni);
    return finish(&writer);
}

/* What has been set by nobody, or by other means. 0 or -EBADMSG. */
static int read_extra(const struct attribute *attribute, struct fdp_fdb_any *row)
{
    struct cursor cursor = {attribute->data, attribute->data + attribute->size};
    struct attribute nested;
    uint32_t bits;
    int more;

    if (attribute->type == FLAGS_EXT) {
        if (read_u32(attribute, &bits))
            return -EBADMSG;
        row->shown |= bits & EXT_LOCKED ? FDP_LOCKED : 0;
        row->shown |= bits & ~(uint32_t)EXT_LOCKED ? FDP_UNREAD : 0;
        return 0;
    }
    while ((more = next_attribute(&cursor, &nested)) > 0) {
        if (nested.type != ACTIVITY_NOTIFY || nested.size < 1) {
            row->shown |= FDP_UNREAD;
            continue;
        }
        row->shown |= nested.data[0] & NOTIFIES ? FDP_ACTIVITY : 0;
        row->shown |= nested.data[0] & INACTIVE ? FDP_INACTIVE : 0;
    }
    return more;
}

/* One attribute. 0 or -EBADMSG. */
static int read_attribute(const struct attribute *attribute, struct fdp_fdb_any *row,
                          struct fdp_remote *remote)
{
    switch (attribute->type) {
    case NDA_DST:
        memset(remote->endpoint, 0, sizeof remote->endpoint);
        return read_address(attribute, remote->endpoint, &remote->family);
    case NDA_VNI:
        return read_u32(attribute, &remote->vni);
    case NDA_SRC_VNI:
        return read_u32(attribute, &row->src_vni);
    case NDA_IFINDEX:
        return read_u32(attribute, &remote->via);
    case NDA_NH_ID:
        return read_u32(attribute, &row->nexthop);
    case NDA_MASTER:
        return read_u32(attribute, &row->master);
    case NDA_VLAN:
        if (attribute->size < sizeof row->vlan)
            return -EBADMSG;
        memcpy(&row->vlan, attribute->data, sizeof row->vlan);
        return 0;
    case NDA_PORT:
        if (attribute->size < 2)
            return -EBADMSG;
        remote->port = (uint16_t)(attribute->data[0] << 8 | attribute->data[1]);
        return 0;
    case FDB_EXT_ATTRS:
    case FLAGS_EXT:
        return read_extra(attribute, row);
    case NDA_UNSPEC:
    case NDA_CACHEINFO:     /* when it was used */
    case NDA_PROBES:
    case NDA_LINK_NETNSID:  /* where the whole device has its underlay */
        return 0;
    default:
        row->shown |= FDP_UNREAD;
        return 0;
    }
}

static int is_in_scope(const struct fdp_scope *scope, const struct fdp_fdb_any *row)
{
    return row->place & (scope->sides ? scope->sides : FDP_SELF) &&
           (!scope->ifindex || row->ifindex == scope->ifindex) &&
           row->src_vni >= scope->id_first && row->src_vni <= scope->id_last;
}

static int decode(const struct fdp_scope *scope, const struct fdp_message *message, void *any)
{
    struct fdp_fdb_any *row = any;
    struct fdp_remote remote = {.family = 0};
    struct ndmsg head;
    struct cursor cursor = open_message(message, &head, sizeof head);
    struct attribute attribute;
    int more, has_mac = 0, err = 0;

    if (head.ndm_family != AF_BRIDGE)
        return FDP_SKIP;
    row->ifindex = (uint32_t)head.ndm_ifindex;
    row->state = fdp_fdb_state(head.ndm_state);
    row->flags = head.ndm_flags & (FDP_LEARNED | FDP_STICKY | FDP_ROUTER);
    row->shown = head.ndm_flags & FDP_OFFLOADED;
    while (!err && (more = next_attribute(&cursor, &attribute)) > 0) {
        if (attribute.type == NDA_LLADDR) {
            if (attribute.size != sizeof row->mac)
                return FDP_SKIP;
            memcpy(row->mac, attribute.data, sizeof row->mac);
            has_mac = 1;
        } else {
            err = read_attribute(&attribute, row, &remote);
        }
    }
    if (err || more < 0)
        return err ? err : more;
    /* An entry of a vxlan device keeps the flags that it was added with, NTF_MASTER too. */
    row->place = head.ndm_flags & NTF_SELF ? FDP_SELF
                 : row->master || head.ndm_flags & NTF_MASTER ? FDP_MASTER : 0;
    if (row->nexthop)
        memset(&remote, 0, sizeof remote);
    fdp_fdb_settle(row, &remote);
    return has_mac && is_in_scope(scope, row) ? fdp_fdb_owner(scope, row) : FDP_SKIP;
}

const struct fdp_kind_ops fdp_fdb_any_ops = {
    .message = RTM_NEWNEIGH,
    .head = sizeof(struct ndmsg),
    .encode_dump = encode_dump,
    .encode = encode,
    .decode = decode,
};
