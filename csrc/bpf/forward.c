/* SPDX-License-Identifier: Apache-2.0
 *
 * Forwarding by one map of peers: tc programs for a vxlan device in collect-metadata
 * mode. On the way out the longest prefix that holds the inner destination names the
 * peer, whose MAC goes into the inner frame and whose address becomes the tunnel's end.
 * On the way in a packet passes only if its inner source lies in a prefix of the node
 * that it came from. What is dropped is counted, by reason.
 *
 * The frame on the wire is the one a node with a route, a neighbour and an FDB entry
 * for each peer would send (RFC 7348, and flannel's layout on it).
 *
 * Compiled by bcc. Who loads it defines MAX_PEERS4, MAX_PEERS6, the paths of the maps (_PIN), and
 * TUNNEL_KEY, the bytes of a tunnel key that this kernel knows: from 6.0 on it has the
 * local address, too (TUNNEL_LOCAL).
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/if_packet.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/ip.h>
#include <uapi/linux/ipv6.h>
#include <uapi/linux/pkt_cls.h>

/* Prefixes are found by hash: one look-up for each length in use, the longest first. In a
 * flannel network that is one look, and a trie of 10,000 takes fourteen steps. */
#define LENGTHS 16
#define NO_LENGTH 255

struct key4 {
    u32 length;
    u32 address;
};

struct key6 {
    u32 length;
    u8 address[16];
};

struct peer {
    u8 endpoint[16];
    u8 mac[6];
    u8 family, pad;
};

/* This node. MACs by family: 0 IPv4, 1 IPv6. Addresses are in network order. */
struct own {
    u32 vni;
    u32 pad;
    u8 mac[2][8];
    u8 source[2][16];
    u8 lengths[2][LENGTHS]; /* of prefixes, falling, then NO_LENGTH */
};

enum reason {
    NO_PEER,        /* out: no peer has the inner destination */
    NOT_IP,         /* in or out: neither IPv4 nor IPv6 */
    FOREIGN_VNI,    /* in: another overlay's */
    UNKNOWN_SOURCE, /* in: no peer has the inner source */
    SPOOFED,        /* in: another node's peer has it */
    NO_TUNNEL,      /* the kernel rejected the tunnel key, or had none */
    REASONS
};

struct count {
    u64 packets, bytes;
};

BPF_TABLE_PINNED("hash", struct key4, struct peer, peers4, MAX_PEERS4, PEERS4_PIN);
BPF_TABLE_PINNED("hash", struct key6, struct peer, peers6, MAX_PEERS6, PEERS6_PIN);
BPF_TABLE_PINNED("array", u32, struct own, own, 1, OWN_PIN);
BPF_TABLE_PINNED("percpu_array", u32, struct count, drops, REASONS, DROPS_PIN);

static inline int drop(struct __sk_buff *skb, u32 why)
{
    struct count *count = drops.lookup(&why);

    if (count) {
        count->packets += skb->gso_segs ? skb->gso_segs : 1;
        count->bytes += skb->len;
    }
    return TC_ACT_SHOT;
}

static inline struct peer *find4(const struct own *node, u32 address)
{
    struct peer *peer = 0;

#pragma unroll
    for (int i = 0; i < LENGTHS; i++) {
        u8 length = node->lengths[0][i];

        if (length > 32)
            break;
        struct key4 key = {.length = length};
        key.address = length ? address & htonl(~0u << (32 - length)) : 0;
        peer = peers4.lookup(&key);
        if (peer)
            break;
    }
    return peer;
}

/* The first `bits` (0 to 64) of eight bytes in network order. */
static inline u64 first_bits(u64 bytes, u32 bits)
{
    return bits ? bytes & __builtin_bswap64(~0ull << ((64 - bits) & 63)) : 0;
}

static inline struct peer *find6(const struct own *node, const struct in6_addr *address)
{
    struct peer *peer = 0;
    u64 half[2];

    __builtin_memcpy(half, address, 16);
#pragma unroll
    for (int i = 0; i < LENGTHS; i++) {
        u8 length = node->lengths[1][i];

        if (length > 128)
            break;
        struct key6 key = {.length = length};
        u64 masked[2] = {first_bits(half[0], length < 64 ? length : 64),
                         length > 64 ? first_bits(half[1], length - 64) : 0};
        __builtin_memcpy(key.address, masked, 16);
        peer = peers6.lookup(&key);
        if (peer)
            break;
    }
    return peer;
}

/* The frame's headers, linear: 0 where it has none of this size. */
static inline void *headers(struct __sk_buff *skb, u32 size)
{
    if ((void *)(long)skb->data + size > (void *)(long)skb->data_end)
        bpf_skb_pull_data(skb, size);
    if ((void *)(long)skb->data + size > (void *)(long)skb->data_end)
        return 0;
    return (void *)(long)skb->data;
}

int forward_out(struct __sk_buff *skb)
{
    struct bpf_tunnel_key tunnel = {};
    u64 flags = BPF_F_ZERO_CSUM_TX; /* as the kernel's own vxlan device does over IPv4 */
    u32 zero = 0, six = 0;
    struct peer *peer;
    struct own *node = own.lookup(&zero);

    if (!node)
        return drop(skb, NO_TUNNEL);
    if (skb->protocol == htons(ETH_P_IP)) {
        struct iphdr *ip;
        void *frame = headers(skb, ETH_HLEN + sizeof *ip);

        if (!frame)
            return drop(skb, NOT_IP);
        ip = frame + ETH_HLEN;
        if ((ip->daddr & htonl(0xf0000000)) == htonl(0xe0000000))
            return TC_ACT_SHOT; /* multicast: the overlay has none */
        peer = find4(node, ip->daddr);
    } else if (skb->protocol == htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip;
        void *frame = headers(skb, ETH_HLEN + sizeof *ip);

        if (!frame)
            return drop(skb, NOT_IP);
        ip = frame + ETH_HLEN;
        if (ip->daddr.s6_addr[0] == 0xff || (ip->daddr.s6_addr[0] == 0xfe &&
                                             (ip->daddr.s6_addr[1] & 0xc0) == 0x80))
            return TC_ACT_SHOT; /* reports and solicitations of the device itself */
        six = 1;
        peer = find6(node, &ip->daddr);
    } else {
        return skb->protocol == htons(ETH_P_ARP) ? TC_ACT_SHOT : drop(skb, NOT_IP);
    }
    if (!peer)
        return drop(skb, NO_PEER);

    struct {
        u8 destination[6], source[6];
    } macs;
    __builtin_memcpy(macs.destination, peer->mac, 6);
    __builtin_memcpy(macs.source, node->mac[six], 6);
    tunnel.tunnel_id = node->vni;
    if (peer->family == 2) {
        u32 remote, local;

        __builtin_memcpy(&remote, peer->endpoint, 4);
        __builtin_memcpy(&local, node->source[0], 4);
        tunnel.remote_ipv4 = ntohl(remote);
#ifdef TUNNEL_LOCAL
        tunnel.local_ipv4 = ntohl(local);
#endif
    } else {
        __builtin_memcpy(tunnel.remote_ipv6, peer->endpoint, 16);
#ifdef TUNNEL_LOCAL
        __builtin_memcpy(tunnel.local_ipv6, node->source[1], 16);
#endif
        flags = BPF_F_TUNINFO_IPV6; /* with a checksum: not every host accepts RFC 6936 */
    }
    if (bpf_skb_set_tunnel_key(skb, &tunnel, TUNNEL_KEY, flags))
        return drop(skb, NO_TUNNEL);
    bpf_skb_store_bytes(skb, 0, &macs, sizeof macs, 0);
    return TC_ACT_UNSPEC;
}

int forward_in(struct __sk_buff *skb)
{
    struct bpf_tunnel_key tunnel = {};
    u32 zero = 0;
    struct peer *peer;
    struct own *node = own.lookup(&zero);

    if (skb->pkt_type == PACKET_LOOPBACK)
        return TC_ACT_UNSPEC; /* a copy of our own multicast, without an Ethernet header */
    if (!node)
        return drop(skb, NO_TUNNEL);
    if (skb->protocol == htons(ETH_P_IP)) {
        struct iphdr *ip;
        void *frame = headers(skb, ETH_HLEN + sizeof *ip);

        if (!frame)
            return drop(skb, NOT_IP);
        ip = frame + ETH_HLEN;
        peer = find4(node, ip->saddr);
    } else if (skb->protocol == htons(ETH_P_IPV6)) {
        struct ipv6hdr *ip;
        void *frame = headers(skb, ETH_HLEN + sizeof *ip);

        if (!frame)
            return drop(skb, NOT_IP);
        ip = frame + ETH_HLEN;
        peer = find6(node, &ip->saddr);
    } else {
        return drop(skb, NOT_IP);
    }

    /* Before anything is said of the source: the VNI decides whose packet it is at all. */
    int six = peer && peer->family != 2;
    if (bpf_skb_get_tunnel_key(skb, &tunnel, TUNNEL_KEY, six ? BPF_F_TUNINFO_IPV6 : 0)) {
        /* It came over the other underlay. */
        if (bpf_skb_get_tunnel_key(skb, &tunnel, TUNNEL_KEY, six ? 0 : BPF_F_TUNINFO_IPV6))
            return drop(skb, NO_TUNNEL);
        if (tunnel.tunnel_id != node->vni)
            return drop(skb, FOREIGN_VNI);
        return drop(skb, peer ? SPOOFED : UNKNOWN_SOURCE);
    }
    if (tunnel.tunnel_id != node->vni)
        return drop(skb, FOREIGN_VNI);
    if (!peer)
        return drop(skb, UNKNOWN_SOURCE);
    if (six) {
        u32 end[4];

        __builtin_memcpy(end, peer->endpoint, 16);
        if ((end[0] ^ tunnel.remote_ipv6[0]) | (end[1] ^ tunnel.remote_ipv6[1]) |
            (end[2] ^ tunnel.remote_ipv6[2]) | (end[3] ^ tunnel.remote_ipv6[3]))
            return drop(skb, SPOOFED);
    } else {
        u32 remote;

        __builtin_memcpy(&remote, peer->endpoint, 4);
        if (tunnel.remote_ipv4 != ntohl(remote))
            return drop(skb, SPOOFED);
    }
    /* The lease may name one MAC for each family, and the device has one. */
    if (skb->pkt_type == PACKET_OTHERHOST)
        bpf_skb_change_type(skb, PACKET_HOST);
    return TC_ACT_UNSPEC;
}
