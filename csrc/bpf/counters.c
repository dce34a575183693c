/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Packets and bytes per peer, on the way in and out of a vxlan device, and what the
 * kernel dropped there and why. Compiled by bcc (flannel_dp/bpf/loader.py), which defines
 * NAME_PIN for each map, MAX_PEERS, MAX_DROPS, and the offsets of the kernel's structs:
 * none of them is taken from a header.
 *
 * A peer is named by the MAC of its tunnel end, which is the destination of what goes out
 * and the source of what comes in, so that nothing has to be searched for. Everything is
 * per CPU and written by one CPU only, so that no addition has to be atomic.
 */
#include <uapi/linux/bpf.h>

#define TC_ACT_UNSPEC -1 /* let the next filter have the packet */
#define ETHERNET 14
#define PACKET_LOOPBACK 5
#define GOES_OUT 0
#define CAME_IN 1
#define NO_DIRECTION 2

struct peer {
    u16 mac[3];
    u8 family; /* 4, 6, 0 for what is no IP */
    u8 direction;
};

struct traffic {
    u64 packets, bytes;
    u64 last; /* CLOCK_MONOTONIC, nanoseconds; right to a tick of the kernel's */
    u64 tick; /* when `last` was written */
};

/* What no entry of a peer's has: frames to groups, and peers that the map has no room for. */
struct others {
    /* For which `drops` had no room. First, because Clang adds an offset before it asks for
     * NULL, which the verifier does not let pass. */
    struct traffic drops;
    struct traffic groups[8]; /* direction * 4 + family / 2 */
    struct traffic overflow[8];
};

struct drop {
    u8 mac[6];
    u8 family;
    u8 direction;
    u32 reason; /* enum skb_drop_reason */
    u32 unused;
};

struct device {
    u32 ifindex, netns; /* the namespace's inode */
};

struct reason_name {
    char text[64];
};

BPF_TABLE_PINNED("percpu_hash", struct peer, struct traffic, peers, MAX_PEERS, PEERS_PIN,
                 BPF_F_NO_PREALLOC);
BPF_TABLE_PINNED("percpu_array", u32, struct others, others, 1, OTHERS_PIN);
BPF_TABLE_PINNED("percpu_hash", struct drop, struct traffic, drops, MAX_DROPS, DROPS_PIN);
BPF_TABLE_PINNED("array", u32, struct device, device, 1, DEVICE_PIN);
BPF_TABLE_PINNED("array", u32, struct reason_name, reasons, MAX_REASONS, REASONS_PIN);

static __always_inline u8 family_of(u16 ethertype)
{
    return ethertype == bpf_htons(0x0800) ? 4 : ethertype == bpf_htons(0x86DD) ? 6 : 0;
}

static __always_inline void add(struct traffic *to, u64 packets, u64 bytes)
{
    u64 tick = bpf_jiffies64();

    to->packets += packets;
    to->bytes += bytes;
    /* Reading the clock is dear, reading the tick is one load: once a tick is enough. */
    if (to->tick != tick) {
        to->tick = tick;
        to->last = bpf_ktime_get_ns();
    }
}

/* The headers that each segment of a large packet gets when it is cut up. They are in the
 * part of it that can be read directly, because the code that made it large had to read them. */
static __always_inline u32 headers_of(void *data, void *end, u8 family)
{
    u8 *ip = data + ETHERNET, *byte;
    u32 size = family == 4 ? 20 : 40;
    u8 protocol;

    if (family == 4) {
        if ((void *)ip + 20 > end)
            return ETHERNET + size + 20;
        size = (ip[0] & 15) * 4;
        protocol = ip[9];
    } else {
        if ((void *)ip + 40 > end)
            return ETHERNET + size + 20;
        protocol = ip[6];
#pragma unroll
        for (int i = 0; i < 3; i++) { /* hop-by-hop, routing, destination options */
            if (protocol != 0 && protocol != 43 && protocol != 60)
                break;
            byte = ip + size;
            if ((void *)byte + 2 > end)
                break;
            protocol = byte[0];
            size += 8 + byte[1] * 8;
        }
    }
    if (protocol == 17)
        return ETHERNET + size + 8;
    if (protocol == 132)
        return ETHERNET + size + 12;
    byte = ip + size + 12;
    if (protocol == 6 && (void *)byte + 1 <= end)
        return ETHERNET + size + (*byte >> 4) * 4;
    return ETHERNET + size + 20;
}

static __always_inline int count(struct __sk_buff *skb, u8 direction)
{
    void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    u32 offset = direction == GOES_OUT ? 0 : 6, packets = 1, bytes = skb->len, zero = 0;
    struct peer key = {.family = family_of(skb->protocol), .direction = direction};
    struct traffic *found, none = {};
    struct others *others_;
    u8 group;

    /* A copy of what this node sends to a group comes in again, without an Ethernet header:
     * see test_group_frames_are_kept_apart_from_peers. */
    if (direction == CAME_IN && skb->pkt_type == PACKET_LOOPBACK)
        return TC_ACT_UNSPEC;
    if (data + ETHERNET <= end) {
        const u16 *mac = data + offset;

        key.mac[0] = mac[0];
        key.mac[1] = mac[1];
        key.mac[2] = mac[2];
    } else
        bpf_skb_load_bytes(skb, offset, key.mac, 6);
    group = *(u8 *)key.mac & 1;
    if (skb->gso_size) {
        u32 headers = headers_of(data, end, key.family), size = skb->gso_size;

        packets = skb->gso_segs;
        if (!packets && bytes > headers) /* from a device that does not say how many */
            packets = (bytes - headers + size - 1) / size;
        if (!packets)
            packets = 1;
        bytes += (packets - 1) * headers;
    }
    if (group)
        found = NULL;
    else {
        found = peers.lookup(&key);
        if (!found) {
            peers.update(&key, &none);
            found = peers.lookup(&key);
        }
    }
    if (!found) {
        u32 at = (direction * 4 + key.family / 2) & 7;

        others_ = others.lookup(&zero);
        if (!others_)
            return TC_ACT_UNSPEC;
        found = group ? &others_->groups[at] : &others_->overflow[at];
    }
    add(found, packets, bytes);
    return TC_ACT_UNSPEC;
}

int count_egress(struct __sk_buff *skb)
{
    return count(skb, GOES_OUT);
}

int count_ingress(struct __sk_buff *skb)
{
    return count(skb, CAME_IN);
}

#ifdef HAS_SKB_DROP_REASON /* Linux 5.17; before, the tracepoint has no third argument */
/* Clang would call memcmp(), and there is none. */
static __always_inline int same(const u16 *left, const u16 *right)
{
    return left[0] == right[0] && left[1] == right[1] && left[2] == right[2];
}

static __always_inline u64 word_at(u64 where)
{
    u64 value = 0;

    bpf_probe_read_kernel(&value, sizeof value, (void *)where);
    return value;
}

int count_drop(struct bpf_raw_tracepoint_args *ctx)
{
    u64 skb = ctx->args[0], dev = word_at(skb + SK_BUFF_DEV);
    struct drop key = {.reason = ctx->args[2], .direction = NO_DIRECTION};
    struct traffic *found, none = {};
    u16 frame[ETHERNET / 2] = {}, own[3] = {}, mac_header = 0, ethertype = 0;
    struct device *ours;
    u32 zero = 0;

    ours = device.lookup(&zero);
    /* The field may hold something else by now, which then is no address of a device. */
    if (!ours || !dev || (u32)word_at(dev + NET_DEVICE_IFINDEX) != ours->ifindex)
        return 0;
    if ((u32)word_at(word_at(dev + NET_DEVICE_NET) + NET_INUM) != ours->netns)
        return 0;
    bpf_probe_read_kernel(&ethertype, 2, (void *)(skb + SK_BUFF_PROTOCOL));
    bpf_probe_read_kernel(&mac_header, 2, (void *)(skb + SK_BUFF_MAC_HEADER));
    key.family = family_of(ethertype);
    if (mac_header != 0xFFFF) { /* a frame that is neither from nor to us names no peer */
        bpf_probe_read_kernel(frame, ETHERNET, (void *)(word_at(skb + SK_BUFF_HEAD) + mac_header));
        bpf_probe_read_kernel(own, 6, (void *)word_at(dev + NET_DEVICE_ADDRESS));
        if (same(frame + 3, own)) {
            __builtin_memcpy(key.mac, frame, 6);
            key.direction = GOES_OUT;
        } else if (same(frame, own)) {
            __builtin_memcpy(key.mac, frame + 3, 6);
            key.direction = CAME_IN;
        }
        if (key.mac[0] & 1)
            __builtin_memset(key.mac, 0, 6);
    }
    found = drops.lookup(&key);
    if (!found) {
        drops.update(&key, &none);
        found = drops.lookup(&key);
    }
    if (!found) {
        struct others *others_ = others.lookup(&zero);

        if (!others_)
            return 0;
        found = &others_->drops;
    }
    /* Packets may be dropped in an interrupt as well. */
    __sync_fetch_and_add(&found->packets, 1);
    found->last = bpf_ktime_get_ns();
    return 0;
}
#endif
