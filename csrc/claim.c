/* SPDX-License-Identifier: Apache-2.0 */
#include "claim.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* ---- text ------------------------------------------------------------- */

/* inet_pton() without the copy and the call: what a list of leases is full of. */
static int parse_ipv4(const char *text, size_t size, uint8_t to[4])
{
    unsigned octet = 0, digits = 0, dots = 0;

    for (size_t i = 0; i < size; i++) {
        if (text[i] >= '0' && text[i] <= '9') {
            if (digits && !octet)
                return -EINVAL; /* 010 is 8 to some, 10 to others, and nothing to us */
            octet = octet * 10 + (unsigned)(text[i] - '0');
            if (octet > 255)
                return -EINVAL;
            digits++;
        } else if (text[i] == '.' && digits && dots < 3) {
            to[dots++] = (uint8_t)octet;
            octet = digits = 0;
        } else {
            return -EINVAL;
        }
    }
    to[dots] = (uint8_t)octet;
    return digits && dots == 3 ? 0 : -EINVAL;
}

/* By table: which digits of a MAC are letters is nothing a processor could foresee. */
static int hex(char digit)
{
    static const int8_t values[256] = {
        ['0'] = 1, ['1'] = 2,  ['2'] = 3,  ['3'] = 4,  ['4'] = 5,  ['5'] = 6,  ['6'] = 7,  ['7'] = 8,
        ['8'] = 9, ['9'] = 10, ['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
        ['A'] = 11, ['B'] = 12, ['C'] = 13, ['D'] = 14, ['E'] = 15, ['F'] = 16,
    };

    return values[(uint8_t)digit] - 1;
}

/* The same for the form that IPv6 addresses are written in, hexadecimal groups
 * with at most one gap. 1 for anything else, which inet_pton() has to decide. */
static int parse_ipv6(const char *text, size_t size, uint8_t to[16])
{
    unsigned words = 0, gap = 16, digits = 0, word = 0;

    for (size_t i = 0; i < size; i++) {
        int digit = hex(text[i]);

        if (digit >= 0) {
            if (++digits > 4 || words > 7)
                return 1;
            word = word << 4 | (unsigned)digit;
            continue;
        }
        if (text[i] != ':')
            return 1;
        if (digits) {
            to[words * 2] = (uint8_t)(word >> 8);
            to[words * 2 + 1] = (uint8_t)word;
            words++;
            digits = word = 0;
            if (i + 1 == size)
                return 1; /* ends in a lone colon */
            if (text[i + 1] != ':')
                continue;
            i++;
        } else if (i || size < 2 || text[++i] != ':') {
            return 1;
        }
        if (gap != 16)
            return 1;
        gap = words;
    }
    if (digits) {
        to[words * 2] = (uint8_t)(word >> 8);
        to[words * 2 + 1] = (uint8_t)word;
        words++;
    }
    if (gap == 16)
        return words != 8;
    if (words > 7)
        return 1;
    memmove(to + 16 - (words - gap) * 2, to + gap * 2, (words - gap) * 2);
    memset(to + gap * 2, 0, (8 - words) * 2);
    return 0;
}

int fdp_parse_address(uint8_t family, const char *text, size_t size, uint8_t to[16])
{
    char copy[INET6_ADDRSTRLEN];

    memset(to, 0, 16);
    if (family == AF_INET)
        return parse_ipv4(text, size, to);
    if (parse_ipv6(text, size, to) == 0)
        return 0;
    memset(to, 0, 16);
    if (!size || size >= sizeof copy || memchr(text, 0, size))
        return -EINVAL;
    memcpy(copy, text, size);
    copy[size] = 0;
    return inet_pton(family, copy, to) == 1 ? 0 : -EINVAL;
}

void fdp_mask(const uint8_t *address, unsigned length, uint8_t to[16])
{
    const unsigned whole = length / 8, bits = length % 8;
    const uint8_t part = bits ? address[whole] & (uint8_t)(0xff00u >> bits) : 0;

    memmove(to, address, whole);
    memset(to + whole, 0, 16 - whole);
    if (bits)
        to[whole] = part;
}

int fdp_parse_prefix(uint8_t family, const char *text, size_t size, struct fdp_prefix *to)
{
    const char *slash = memchr(text, '/', size);
    unsigned length = 0;

    if (!slash)
        return -EINVAL;
    size_t digits = size - (size_t)(slash - text) - 1;
    if (digits < 1 || digits > 3 || (digits > 1 && slash[1] == '0'))
        return -EINVAL;
    for (size_t i = 1; i <= digits; i++) {
        if (slash[i] < '0' || slash[i] > '9')
            return -EINVAL;
        length = length * 10 + (unsigned)(slash[i] - '0');
    }
    if (length > (family == AF_INET6 ? 128 : 32))
        return -EINVAL;
    memset(to, 0, sizeof *to);
    to->length = (uint8_t)length;
    int err = fdp_parse_address(family, text, (size_t)(slash - text), to->address);
    /* Host bits are dropped, as Go's net.ParseCIDR does for flannel. */
    fdp_mask(to->address, length, to->address);
    return err;
}

int fdp_parse_mac(const char *text, size_t size, uint8_t to[6])
{
    if (size != 17 || (text[2] != ':' && text[2] != '-'))
        return -EINVAL;
    for (int i = 0; i < 6; i++) {
        int high = hex(text[i * 3]), low = hex(text[i * 3 + 1]);

        if (high < 0 || low < 0 || (i < 5 && text[i * 3 + 2] != text[2]))
            return -EINVAL;
        to[i] = (uint8_t)(high << 4 | low);
    }
    return 0;
}

/* ---- one claim -------------------------------------------------------- */

/* Whether a host can have the address, and others send to it over the underlay. */
static int is_host(const struct fdp_policy *policy, const uint8_t *address)
{
    static const uint8_t none[16];
    static const uint8_t loopback[16] = {[15] = 1};
    static const uint8_t broadcast[4] = {255, 255, 255, 255};

    if (policy->family == AF_INET) {
        if (address[0] == 169 && address[1] == 254)
            return policy->link_local;
        if (address[0] >= 224) /* multicast; 240.0.0.0/4 is unicast to Linux */
            return address[0] >= 240 && memcmp(address, broadcast, 4) != 0;
        return address[0] != 0 && address[0] != 127;
    }
    /* Link-local addresses mean nothing on another link; a mapped one is IPv4. */
    if (memcmp(address, none, 10) == 0 && address[10] == 0xff && address[11] == 0xff)
        return 0;
    return memcmp(address, none, 16) != 0 && memcmp(address, loopback, 16) != 0 &&
           address[0] != 0xff && !(address[0] == 0xfe && (address[1] & 0xc0) == 0x80);
}

/* One bit of 64 for an address, by its last byte: most endpoints share none with this node's. */
static inline uint64_t bit_of(uint8_t family, const uint8_t *address)
{
    return (uint64_t)1 << (address[family == AF_INET ? 3 : 15] & 63);
}

void fdp_policy_seal(struct fdp_policy *policy)
{
    policy->known = 0;
    for (uint32_t i = 0; i < policy->own_count; i++)
        policy->known |= bit_of(policy->family, policy->own[i]);
    for (uint32_t i = 0; i < policy->no_host_count; i++)
        policy->known |= bit_of(policy->family, policy->no_hosts[i]);
}

static int is_among(const uint8_t (*addresses)[16], uint32_t count, const uint8_t *address)
{
    for (uint32_t i = 0; i < count; i++)
        if (memcmp(addresses[i], address, 16) == 0)
            return 1;
    return 0;
}

static int check_known(const struct fdp_policy *policy, const uint8_t *endpoint)
{
    if (is_among(policy->own, policy->own_count, endpoint))
        return FDP_OWN_PUBLIC_IP;
    return is_among(policy->no_hosts, policy->no_host_count, endpoint) ? FDP_BROADCAST
                                                                      : FDP_ACCEPTED;
}

/* Whether pods may have this address of the network. */
static int is_pods(const struct fdp_policy *policy, const uint8_t *address)
{
    if (!policy->has_pods ||
        (policy->has_own_subnet && fdp_prefix_holds(policy->own_subnet.address,
                                                    policy->own_subnet.length, address)))
        return 1;
    return memcmp(address, policy->pods_first, 16) >= 0 &&
           memcmp(address, policy->pods_last, 16) <= 0;
}

static int overrules(const struct fdp_claim *claim, const struct fdp_prefix *local)
{
    if (local->over && claim->length <= local->length)
        return 0;
    return fdp_prefix_overlaps(local->address, local->length, claim->subnet, claim->length);
}

static int check_mac(const struct fdp_policy *policy, const uint8_t mac[6])
{
    static const uint8_t none[6];

    if (memcmp(mac, none, 6) == 0 || (mac[0] & 1))
        return FDP_BAD_MAC;
    if (policy->has_own_mac && memcmp(mac, policy->own_mac, 6) == 0)
        return FDP_OWN_MAC;
    return FDP_ACCEPTED;
}

int fdp_claim_check(const struct fdp_policy *policy, const struct fdp_claim *claim)
{
    const struct fdp_prefix *network = &policy->network;

    if (claim->reason != FDP_ACCEPTED)
        return claim->reason;
    if (claim->length <= network->length ||
        !fdp_prefix_holds(network->address, network->length, claim->subnet))
        return FDP_OUTSIDE_NETWORK;
    if (!is_host(policy, claim->endpoint))
        return FDP_BAD_PUBLIC_IP;
    if (fdp_prefix_holds(network->address, network->length, claim->endpoint) &&
        is_pods(policy, claim->endpoint))
        return FDP_ENDPOINT_IN_OVERLAY;
    if (policy->known & bit_of(policy->family, claim->endpoint)) {
        const int reason = check_known(policy, claim->endpoint);

        if (reason != FDP_ACCEPTED)
            return reason;
    }
    if (policy->has_own_subnet &&
        fdp_prefix_overlaps(policy->own_subnet.address, policy->own_subnet.length, claim->subnet,
                            claim->length))
        return FDP_OWN_SUBNET;
    for (uint32_t i = 0; i < policy->local_count; i++)
        if (overrules(claim, &policy->locals[i]))
            return FDP_UNDERLAY;
    return policy->need_mac ? check_mac(policy, claim->mac) : FDP_ACCEPTED;
}
