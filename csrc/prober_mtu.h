/* SPDX-License-Identifier: Apache-2.0
 *
 * The path MTU of each peer of a prober: which large probes are sent, and what follows.
 * Of the prober's own files.
 */
#ifndef FDP_PROBER_MTU_H
#define FDP_PROBER_MTU_H

#include "prober.h"

/* The size of the next probe of a peer: 0 for an ordinary one. */
uint16_t fdp_prober_large_size(struct fdp_prober *prober, uint32_t number);

/* A large probe is sent. */
void fdp_prober_large_sent(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint16_t size,
                           uint64_t now);

/* It came back, or is lost. */
void fdp_prober_large_came(struct fdp_prober *prober, struct fdp_prober_peer *peer);
void fdp_prober_large_lost(struct fdp_prober *prober, struct fdp_prober_peer *peer);

/* Nothing is searched for any more: the peer is dead, or another one. */
void fdp_prober_end_search(struct fdp_prober *prober, struct fdp_prober_peer *peer);

void fdp_prober_refill_large(struct fdp_prober *prober, uint64_t elapsed);

/* Whether the path of a peer is known to take less than the device. */
static inline int fdp_prober_is_narrow(const struct fdp_prober_peer *peer)
{
    return peer->fails != 0;
}

#endif
