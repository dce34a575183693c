/* SPDX-License-Identifier: Apache-2.0
 *
 * SipHash-2-4 of whole eight-byte words (Aumasson and Bernstein, 2012): a tag that only the holder
 * of the key can make.
 */
#ifndef FDP_SIPHASH_H
#define FDP_SIPHASH_H

#include <stddef.h>
#include <stdint.h>

static inline uint64_t fdp_rotated(uint64_t value, unsigned bits)
{
    return value << bits | value >> (64 - bits);
}

static inline void fdp_sip_round(uint64_t v[4])
{
    v[0] += v[1];
    v[2] += v[3];
    v[1] = fdp_rotated(v[1], 13) ^ v[0];
    v[3] = fdp_rotated(v[3], 16) ^ v[2];
    v[0] = fdp_rotated(v[0], 32);
    v[2] += v[1];
    v[0] += v[3];
    v[1] = fdp_rotated(v[1], 17) ^ v[2];
    v[3] = fdp_rotated(v[3], 21) ^ v[0];
    v[2] = fdp_rotated(v[2], 32);
}

/* The hash of `count` words, which are those of a little-endian machine. */
static inline uint64_t fdp_siphash(const uint64_t key[2], const uint64_t *words, size_t count)
{
    uint64_t v[4] = {key[0] ^ 0x736f6d6570736575, key[1] ^ 0x646f72616e646f6d,
                     key[0] ^ 0x6c7967656e657261, key[1] ^ 0x7465646279746573};

    for (size_t i = 0; i <= count; i++) {
        uint64_t word = i < count ? words[i] : (uint64_t)(count * 8) << 56;

        v[3] ^= word;
        fdp_sip_round(v);
        fdp_sip_round(v);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 4; i++)
        fdp_sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

#endif
