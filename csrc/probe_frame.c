/* SPDX-License-Identifier: Apache-2.0
 *
 * The packets that probes are: IP and UDP from this node to itself, with an Ethernet header and,
 * for a datagram of our own making, a VXLAN header before them; or an ICMP echo request.
 */
#include "probe_frame.h"

#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <netinet/in.h>
#include <string.h>

static uint32_t added(uint32_t sum, const void *bytes, size_t size)
{
    const uint8_t *from = bytes;

    for (size_t i = 0; i + 1 < size; i += 2)
        sum += (uint32_t)(from[i] << 8 | from[i + 1]);
    return sum;
}

static uint16_t folded(uint32_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static void put16(uint8_t *to, unsigned value)
{
    to[0] = (uint8_t)(value >> 8);
    to[1] = (uint8_t)value;
}

static size_t put_ip(const struct fdp_probe *probe, uint8_t *to, uint32_t size)
{
    if (fdp_probe_is_v6(probe)) {
        memset(to, 0, 40);
        to[0] = 0x60;
        put16(to + 4, size - 40);
        to[6] = IPPROTO_UDP;
        to[7] = probe->ttl;
        memcpy(to + 8, probe->source, 16);
        memcpy(to + 24, probe->source, 16);
        return 40;
    }
    memset(to, 0, 20);
    to[0] = 0x45;
    put16(to + 2, size);
    to[6] = 0x40; /* do not fragment */
    to[8] = probe->ttl;
    to[9] = IPPROTO_UDP;
    memcpy(to + 12, probe->source, 4);
    memcpy(to + 16, probe->source, 4);
    put16(to + 10, folded(added(0, to, 20)));
    return 20;
}

static void put_udp(const struct fdp_probe *probe, uint8_t *to, uint32_t size, unsigned path,
                    const struct fdp_probe_payload *payload)
{
    const size_t bytes = fdp_probe_is_v6(probe) ? 16 : 4;
    uint32_t sum = IPPROTO_UDP + size;

    put16(to, (probe->port + 1 + path) & 0xffff); /* a flow, and so an outer port, of its own */
    put16(to + 2, probe->port);
    put16(to + 4, size);
    put16(to + 6, 0);
    memcpy(to + FDP_PROBE_UDP, payload, FDP_PROBE_PAYLOAD);
    sum = added(sum, probe->source, bytes); /* once as the source, once as the destination */
    sum = added(sum, probe->source, bytes);
    sum = added(sum, to, FDP_PROBE_UDP + FDP_PROBE_PAYLOAD); /* zeros after it add nothing */
    put16(to + 6, folded(sum) ? folded(sum) : 0xffff);
}

size_t fdp_probe_put_frame(const struct fdp_probe *probe, uint8_t *to, uint32_t size, unsigned path,
                        const struct fdp_probe_peer *peer, const struct fdp_probe_payload *payload)
{
    uint8_t *at = to;

    if (probe->how == FDP_PROBE_TUNNEL) {
        memset(at, 0, FDP_PROBE_VXLAN);
        at[0] = 0x08;
        at[4] = (uint8_t)(probe->vni >> 16);
        put16(at + 5, probe->vni & 0xffff);
        at += FDP_PROBE_VXLAN;
    }
    memcpy(at, peer->mac, 6);
    memcpy(at + 6, probe->mac, 6);
    put16(at + 12, fdp_probe_is_v6(probe) ? ETH_P_IPV6 : ETH_P_IP);
    at += FDP_PROBE_ETHER;
    at += put_ip(probe, at, size);
    put_udp(probe, at, size - (uint32_t)fdp_probe_ip_header(probe), path, payload);
    return (size_t)(at - to) + FDP_PROBE_UDP + FDP_PROBE_PAYLOAD;
}

size_t fdp_probe_put_echo(const struct fdp_probe *probe, uint8_t *to,
                          const struct fdp_probe_payload *payload)
{
    memset(to, 0, 8);
    to[0] = fdp_probe_is_v6(probe) ? ICMPV6_ECHO_REQUEST : ICMP_ECHO;
    put16(to + 4, probe->port);
    put16(to + 6, payload->round);
    memcpy(to + 8, payload, FDP_PROBE_PAYLOAD);
    if (!fdp_probe_is_v6(probe)) /* the kernel fills in that of ICMPv6 */
        put16(to + 2, folded(added(0, to, 8 + FDP_PROBE_PAYLOAD)));
    return 8 + FDP_PROBE_PAYLOAD;
}
