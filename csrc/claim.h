/* SPDX-License-Identifier: Apache-2.0
 *
 * Claims: what other nodes say of themselves, packed, one record per node and
 * family; and admission, which decides which of them are accepted. IPv4 and
 * IPv6 differ in the width of an address and in nothing else.
 */
#ifndef FDP_CLAIM_H
#define FDP_CLAIM_H

#include "table.h"

#include <endian.h>
#include <string.h>

/* Why a claim is rejected. The order is part of flannel_dp.cluster.admission. */
enum fdp_reason {
    FDP_ACCEPTED = 0,
    FDP_BAD_CLAIM,           /* not a lease at all */
    FDP_BAD_SUBNET,          /* the subnet is not a prefix */
    FDP_BAD_PUBLIC_IP,       /* the address is none, or no host's */
    FDP_BAD_MAC,             /* zero, multicast or not a MAC */
    FDP_WRONG_BACKEND,       /* published by another backend */
    FDP_WRONG_VNI,           /* another overlay's */
    FDP_OUTSIDE_NETWORK,     /* the subnet is not inside Network */
    FDP_OWN_SUBNET,          /* overlaps the subnet of this node */
    FDP_OWN_PUBLIC_IP,       /* another lease with an address of this node */
    FDP_OWN_MAC,             /* the MAC of our own device */
    FDP_UNDERLAY,            /* the subnet would draw underlay traffic in */
    FDP_ENDPOINT_IN_OVERLAY, /* the tunnel would run through itself */
    FDP_OVERLAP,             /* another lease has (part of) this subnet */
    FDP_DUPLICATE_MAC,       /* another lease has this MAC */
    FDP_BAD_KEY,             /* etcd's key is not a subnet's; never set here */
    FDP_BROADCAST,           /* the address is one that a connected network gives no host */
    FDP_HOLDS_NODES,         /* the subnet holds other nodes' public addresses */
    FDP_REASONS,
    FDP_OWN = 255            /* this node's own lease: accepted, and no peer */
};

struct fdp_claim {
    uint8_t subnet[16];
    uint8_t endpoint[16];
    uint8_t mac[6];
    uint8_t length;   /* of the subnet */
    uint8_t reason;   /* enum fdp_reason */
    uint64_t revision; /* when it was made; 0: unknown */
    uint64_t moved;    /* when its node last wrote it; 0: unknown */
    uint32_t name;    /* offset into the names, where its length (u16) stands */
    uint32_t origin;  /* number in the source's list */
    uint32_t rival;   /* the claim it lost to; FDP_NONE */
    uint8_t winner;   /* another claim lost to this one */
    uint8_t stale;    /* a claim with its MAC was made after its node last wrote it */
    uint8_t odd;      /* its subnet is not as long as this network's subnets are */
    uint8_t pad;
};

struct fdp_prefix {
    uint8_t address[16];
    uint8_t length;
    uint8_t over;     /* only a subnet narrower than this overrules it: a route, not a network */
    uint8_t pad[2];
};

/* What this node knows of itself. */
struct fdp_policy {
    uint8_t family;
    uint8_t need_mac;            /* vxlan: yes, host-gw: no */
    uint8_t has_own_subnet;
    uint8_t has_own_mac;
    struct fdp_prefix network;   /* the pod network */
    struct fdp_prefix own_subnet;
    uint8_t own_mac[6];
    uint8_t link_local;          /* nodes may have IPv4 link-local public addresses */
    uint8_t subnet_length;       /* of an ordinary subnet of the network; 0: unknown */
    uint8_t has_pods;            /* nodes may have addresses of the network that are not pods' */
    uint8_t pods_first[16], pods_last[16]; /* pods' addresses, with has_pods */
    const struct fdp_prefix *locals; /* own addresses and what the underlay routes */
    uint32_t local_count;
    const uint8_t (*own)[16];    /* addresses of this node, */
    uint32_t own_count;
    const uint8_t (*no_hosts)[16]; /* and those that its networks give no host */
    uint32_t no_host_count;
    uint64_t known;              /* of own and no_hosts: see fdp_policy_seal */
};

/* The claims of one family and the text of their names. */
struct fdp_claims {
    struct fdp_claim *rows;
    const uint8_t *names;
    uint32_t count;
};

/* Text to bytes. 0, or -EINVAL; `length` need not be followed by a NUL. */
int fdp_parse_address(uint8_t family, const char *text, size_t size, uint8_t to[16]);
int fdp_parse_prefix(uint8_t family, const char *text, size_t size, struct fdp_prefix *to);
int fdp_parse_mac(const char *text, size_t size, uint8_t to[6]);

/* The first `length` bits of an address, all others zero; `to` may be the address. */
void fdp_mask(const uint8_t *address, unsigned length, uint8_t to[16]);

/* Half of an address, as the number that it is. */
static inline uint64_t fdp_half(const uint8_t *at)
{
    uint64_t word;

    memcpy(&word, at, sizeof word);
    return be64toh(word);
}

static inline int fdp_prefix_holds(const uint8_t *prefix, uint8_t length, const uint8_t *address)
{
    const uint64_t high = fdp_half(prefix) ^ fdp_half(address);

    if (length <= 64)
        return !length || !(high >> (64 - length));
    return !high && !((fdp_half(prefix + 8) ^ fdp_half(address + 8)) >> (128 - length));
}

static inline int fdp_prefix_overlaps(const uint8_t *a, uint8_t a_length, const uint8_t *b, uint8_t b_length)
{
    return fdp_prefix_holds(a, a_length < b_length ? a_length : b_length, b);
}

/* Note which endpoints may be among own and no_hosts; once both are set, before anything else. */
void fdp_policy_seal(struct fdp_policy *policy);

/* What can be said of one claim alone. enum fdp_reason. */
int fdp_claim_check(const struct fdp_policy *policy, const struct fdp_claim *claim);

/* Validate all claims, each alone and then against each other: among claims that
 * cannot stand together the lower (odd, stale, revision, name, endpoint, mac) wins,
 * whatever their order. Claims that arrive with a reason keep it. Sets reason,
 * odd, stale, rival and winner. Fills `order` (count entries of room) with the accepted
 * ones by subnet, and their number. 0 or -ENOMEM. */
int fdp_admit(const struct fdp_policy *policy, struct fdp_claims *claims, uint64_t seed,
              uint32_t *order, uint32_t *accepted, fdp_realloc_fn realloc);

/* How a peer's packets travel. */
enum fdp_way {
    FDP_TUNNEL = 0, /* through the vxlan device */
    FDP_DIRECT = 1, /* its public address is on the uplink's own network */
};

/* Decide it for each claim from one reading of the routing table: direct when
 * the longest prefix that holds its endpoint leads out of `uplink` without a
 * gateway (flannel asks the kernel once per peer: ip.DirectRouting). 0 or
 * -ENOMEM. */
int fdp_ways(const struct fdp_table *underlay, const struct fdp_claim *claims, uint32_t count,
             uint8_t family, uint32_t uplink, uint8_t *ways, fdp_realloc_fn realloc);

#endif
