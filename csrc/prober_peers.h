/* SPDX-License-Identifier: Apache-2.0
 *
 * The peers of a prober, for what asks them. Of the prober's own files.
 */
#ifndef FDP_PROBER_PEERS_H
#define FDP_PROBER_PEERS_H

#include "prober.h"

/* A probe is lost when so many were sent after it. */
enum { FDP_PROBER_WINDOW = 8 };

uint32_t fdp_prober_random(struct fdp_prober *prober);

/* Note what is known of a peer now, and that the caller has yet to be told. */
void fdp_prober_set_life(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint8_t life);

/* Have a peer asked before its turn, where there is room for one more. */
void fdp_prober_ask_quickly(struct fdp_prober *prober, uint32_t number);

int fdp_prober_has_mac(const struct fdp_prober *prober, uint32_t number);

#endif
