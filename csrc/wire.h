/* SPDX-License-Identifier: Apache-2.0
 *
 * What reading and writing netlink messages have in common.
 */
#ifndef FDP_WIRE_H
#define FDP_WIRE_H

#define ALIGN(n) (((n) + 3u) & ~3u)

/* Sizes are constants where these are called: inlined, a message is a few moves. */
#define INLINE inline __attribute__((always_inline))

#endif
