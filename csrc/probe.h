/* SPDX-License-Identifier: Apache-2.0
 *
 * Probes of peers that run nothing of ours: frames sent in batches, answers matched and timed.
 */
#ifndef FDP_PROBE_H
#define FDP_PROBE_H

#include <stddef.h>
#include <stdint.h>

enum {
    FDP_PROBE_PATHS = 16,
    FDP_PROBE_SMALLEST4 = 20 + 8 + 24, /* bytes of an inner packet: IP, UDP, payload */
    FDP_PROBE_SMALLEST6 = 40 + 8 + 24,
    FDP_PROBE_LARGEST = 9216
};

/* How a probe goes out. FRAME and TUNNEL carry a packet from this node to itself, which the peer
 * forwards back (the unaffiliated echo of RFC 9747): a frame into a device, or a VXLAN datagram
 * (RFC 7348) of our own making. ECHO is an ICMP echo request by the kernel's routes. */
enum fdp_probe_how { FDP_PROBE_FRAME, FDP_PROBE_TUNNEL, FDP_PROBE_ECHO };

struct fdp_probe_peer {
    uint8_t mac[6]; /* where the inner frame goes */
    uint8_t family, pad; /* of its address: AF_INET, AF_INET6; 0: not said */
    uint8_t address[16]; /* TUNNEL: its underlay address; ECHO: the address that is asked */
};

/* What a probe carries after its UDP or ICMP header. `round` and `path` are its sender's. */
struct fdp_probe_payload {
    uint32_t index;
    uint16_t round, path;
    uint64_t sent; /* ns, CLOCK_REALTIME, which the kernel's time stamps are of */
    uint64_t tag;
};

/* One probe that is to be sent. */
struct fdp_probe_shot {
    uint32_t index;
    uint16_t round, path;
    uint32_t size; /* 0: that of all */
};

struct fdp_probe {
    /* Of the caller, before it is opened. */
    int how, family;          /* family: AF_INET or AF_INET6, of the inner packet */
    int endpoint_family;      /* of the underlay */
    uint32_t ifindex;         /* where answers come in: the device; 0 for ECHO */
    uint8_t mac[6];           /* ours, of that device */
    uint8_t source[16];       /* our address: source and destination of the inner packet */
    uint8_t local[16];        /* TUNNEL: our underlay address */
    uint16_t tunnel_port;     /* TUNNEL: of VXLAN, at the peer */
    uint32_t vni;             /* TUNNEL */
    uint8_t ttl;              /* of the inner packet */
    uint8_t hops;             /* so many forward it before it is back */
    unsigned paths;           /* 1 to FDP_PROBE_PATHS source ports */
    uint64_t key[2];          /* of the tags */
    uint32_t count, rounds;   /* peers, and probes of each at most */
    struct fdp_probe_peer *peers;
    uint32_t *times;          /* count * rounds: round trip in 100 ns, at least 1; 0: no answer */
    int packet;               /* an AF_PACKET socket that was opened before; -1: open one */
    /* Of the engine. */
    int receiver, guard;
    int senders[FDP_PROBE_PATHS];
    uint16_t port; /* inner destination port, or the identifier of ICMP */
    uint64_t sent, answered, strange;
};

/* Say that no socket is open: first of all. */
void fdp_probe_init(struct fdp_probe *probe);

/* Open the sockets in the caller's network namespace. 0 or -errno; closes what it opened. */
int fdp_probe_open(struct fdp_probe *probe);
void fdp_probe_close(struct fdp_probe *probe);

/* Send probe `round` of `size` bytes (of the inner packet; ECHO: of the IP packet) to peers
 * which[0..n) by path `path`. Returns how many were sent, fewer where the socket is full, or
 * -errno of the first. EMSGSIZE: larger than the device takes. */
int fdp_probe_send(struct fdp_probe *probe, const uint32_t *which, uint32_t n, uint32_t round,
                   uint32_t size, unsigned path);

/* Send probes of `size` bytes, as above, each of its own peer, round and path. */
int fdp_probe_shoot(struct fdp_probe *probe, const struct fdp_probe_shot *shots, uint32_t n,
                    uint32_t size);

/* What is done with each answer, `now` in ns of CLOCK_REALTIME: 1 where it is a new one. */
typedef int (*fdp_probe_note)(void *context, const struct fdp_probe_payload *payload, uint64_t now);

/* Read the answers that are there, and have each noted; returns the sum, or -errno. */
int fdp_probe_take(struct fdp_probe *probe, fdp_probe_note note, void *context);

/* Whether these bytes are an answer of a peer to a probe of ours: 1, with its payload, or 0. */
int fdp_probe_read(struct fdp_probe *probe, const uint8_t *bytes, size_t have,
                   struct fdp_probe_payload *payload);

/* Read the answers that have come within `wait_ms`; returns the number of new ones or -errno. */
int fdp_probe_receive(struct fdp_probe *probe, int wait_ms);

/* One answer as it was read, `size` of `have` bytes, at `now` ns of CLOCK_REALTIME; 1 where it is
 * a new answer. Apart for the fuzzer. */
int fdp_probe_match(struct fdp_probe *probe, const uint8_t *bytes, size_t have, uint64_t now);

#endif
