/* SPDX-License-Identifier: Apache-2.0
 *
 * Answers to probes as anybody might send them: no byte outside is read, what has no tag of
 * ours is no answer, and whatever is one counts once.
 *
 * Input: one byte that chooses how probes go and the family, one for the round and the peer, and the
 * packet. The tag is put right where that byte asks for it, so that what is behind it is met.
 */
#include "fuzz.h"
#include "prober.h"
#include "siphash.h"

#include <sys/socket.h>

enum { PEERS = 3, ROUNDS = 4 };

/* Where the payload of a packet would be. */
static size_t payload_at(const struct fdp_probe *probe, const uint8_t *packet, size_t size)
{
    if (probe->how == FDP_PROBE_ECHO)
        return (probe->family == AF_INET6 || !size ? 0 : (size_t)(packet[0] & 15) * 4) + 8;
    return 14 + (probe->family == AF_INET6 ? 40 : 20) + 8;
}

static void sign(const struct fdp_probe *probe, uint8_t *packet, size_t size)
{
    struct fdp_probe_payload payload;
    const size_t at = payload_at(probe, packet, size);
    uint64_t words[2];

    if (size < at + sizeof payload)
        return;
    memcpy(&payload, packet + at, sizeof payload);
    payload.index %= PEERS + 1;
    payload.round %= ROUNDS + 1;
    memcpy(words, &payload, sizeof words);
    payload.tag = fdp_siphash(probe->key, words, 2);
    memcpy(packet + at, &payload, sizeof payload);
}

static void check_prober(const struct fdp_probe *like, const uint8_t *packet, size_t size)
{
    struct fdp_prober prober;
    struct fdp_probe_payload payload;
    struct fdp_peer peer = {.family = AF_INET, .length = 24, .mac = {2}};

    fdp_prober_init(&prober, 1, fuzz_realloc);
    prober.probe.how = like->how;
    prober.probe.family = like->family;
    prober.probe.ttl = like->ttl;
    prober.probe.paths = 3;
    memcpy(prober.probe.key, like->key, sizeof like->key);
    for (uint8_t i = 0; i < PEERS; i++) {
        peer.prefix[2] = i;
        CHECK(fdp_prober_put(&prober, &peer, 1) == 1);
        prober.peers[i].seq = (uint16_t)(i + 1);
        prober.peers[i].pending = 2;
    }
    if (fdp_probe_read(&prober.probe, packet, size, &payload)) {
        const int first = fdp_prober_note(&prober, &payload, 1000);

        CHECK(payload.index < PEERS);
        CHECK(!fdp_prober_note(&prober, &payload, 1000)); /* a copy */
        CHECK(prober.answered == (uint64_t)first);
        CHECK(first == (payload.round == payload.index));
        CHECK(prober.lives[FDP_LIFE_ALIVE] == (uint32_t)first);
    }
    fdp_prober_free(&prober);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, data + size};
    const uint8_t choice = take(&input);
    struct fdp_probe_peer peers[PEERS] = {0};
    uint32_t times[PEERS * ROUNDS] = {0};
    struct fdp_probe probe = {.how = choice & 1 ? FDP_PROBE_ECHO : FDP_PROBE_FRAME,
                              .family = choice & 2 ? AF_INET6 : AF_INET,
                              .ttl = 2, .hops = 1, .paths = 1, .key = {7, 9},
                              .count = PEERS, .rounds = ROUNDS, .peers = peers, .times = times};
    const size_t have = (size_t)(input.end - input.at);
    uint8_t *packet = malloc(have ? have : 1); /* of this very size, for the sanitizer */

    CHECK(packet);
    if (have)
        memcpy(packet, input.at, have);
    if (choice & 4)
        sign(&probe, packet, have);
    const int found = fdp_probe_match(&probe, packet, have, 5000);
    CHECK(!found || choice & 4);
    CHECK(!fdp_probe_match(&probe, packet, have, 5000) || !found); /* a copy is no answer */
    CHECK(probe.answered == (uint64_t)found);
    check_prober(&probe, packet, have);
    free(packet);
    return 0;
}
