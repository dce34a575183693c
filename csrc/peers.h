/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of peers as a BPF map holds it: one for each family, with a prefix as key
 * and the peer's endpoint and MAC as value. csrc/bpf/forward.c reads it
 * for every packet. What rtnl.h does for the kernel's own tables, for this one.
 */
#ifndef FDP_PEERS_H
#define FDP_PEERS_H

#include "rtnl.h"

#define FDP_PEER_VALUE 24 /* endpoint, MAC, family of the endpoint, a byte of nothing */
#define FDP_PEER_BATCH 1024 /* entries of a system call: keys and values fit FDP_RX_SIZE */

/* Bytes of a key of this family: a length of 32 bits, and the address. */
static inline uint32_t fdp_peer_key(int family)
{
    return family == 2 ? 8 : 20;
}

/* Read a whole map into a sink. 0; -EINTR: entries came and went meanwhile, what was fed
 * must be forgotten; another negative errno. `room` has FDP_RX_SIZE bytes. */
int fdp_peers_dump(const struct fdp_scope *scope, uint8_t *room, fdp_sink sink, void *context);

/* Write ops[from..to), all of one map, and note what became of each. 0, or -EPERM. */
int fdp_peers_apply(struct fdp_socket *sock, struct fdp_apply *job, uint32_t from, uint32_t to);

#endif
