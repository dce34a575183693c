/* SPDX-License-Identifier: Apache-2.0
 *
 * The packets that probes are. Of the probes' own files.
 */
#ifndef FDP_PROBE_FRAME_H
#define FDP_PROBE_FRAME_H

#include "probe.h"

#include <sys/socket.h>
#include <time.h>

enum {
    FDP_PROBE_ETHER = 14,
    FDP_PROBE_UDP = 8,
    FDP_PROBE_VXLAN = 8,
    FDP_PROBE_PAYLOAD = 24,
    FDP_PROBE_HEADERS = FDP_PROBE_VXLAN + FDP_PROBE_ETHER + 40 + FDP_PROBE_UDP + FDP_PROBE_PAYLOAD
};

_Static_assert(sizeof(struct fdp_probe_payload) == FDP_PROBE_PAYLOAD, "the payload has no gaps");

static inline uint64_t fdp_probe_clock(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline int fdp_probe_is_v6(const struct fdp_probe *probe)
{
    return probe->family == AF_INET6;
}

static inline size_t fdp_probe_ip_header(const struct fdp_probe *probe)
{
    return fdp_probe_is_v6(probe) ? 40 : 20;
}

/* Write the headers and the payload of a probe, to be followed by zeros; returns their size. The IP
 * packet has `size` bytes. */
size_t fdp_probe_put_frame(const struct fdp_probe *probe, uint8_t *to, uint32_t size, unsigned path,
                           const struct fdp_probe_peer *peer,
                           const struct fdp_probe_payload *payload);

/* Write an ICMP echo request, which the kernel gives its IP header; returns its size. */
size_t fdp_probe_put_echo(const struct fdp_probe *probe, uint8_t *to,
                          const struct fdp_probe_payload *payload);

#endif
