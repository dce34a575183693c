/* SPDX-License-Identifier: Apache-2.0
 *
 * Which peers a prober has: they come, go, and begin anew where they are found at another place.
 */
#include "prober_mtu.h"
#include "prober_peers.h"

#include <errno.h>
#include <string.h>

uint32_t fdp_prober_random(struct fdp_prober *prober)
{
    uint64_t x = prober->random;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    prober->random = x;
    return (uint32_t)(x >> 32);
}

void fdp_prober_init(struct fdp_prober *prober, uint64_t seed, fdp_realloc_fn realloc)
{
    memset(prober, 0, sizeof *prober);
    fdp_probe_init(&prober->probe);
    fdp_table_init(&prober->index, FDP_PEER, seed, realloc);
    prober->realloc = realloc;
    prober->random = seed | 1;
    prober->interval = 1000000000;
    prober->stretch = 1000;
    prober->quick_budget = 200;
    prober->large_rate = 6250;
    prober->pace = 1000;
}

void fdp_prober_free(struct fdp_prober *prober)
{
    fdp_probe_close(&prober->probe);
    fdp_table_free(&prober->index);
    prober->realloc(prober->peers, 0);
    prober->realloc(prober->probe.peers, 0);
    prober->realloc(prober->vacant, 0);
    prober->peers = NULL;
    prober->probe.peers = NULL;
    prober->vacant = NULL;
    prober->probe.count = prober->room = prober->high = prober->used = prober->vacant_count = 0;
}

/* ---- which peers there are ---- */

static int grow(struct fdp_prober *prober)
{
    const uint32_t room = prober->room + prober->room / 2 + 16;
    void *block = prober->realloc(prober->peers, (size_t)room * sizeof *prober->peers);

    if (!block)
        return -ENOMEM;
    prober->peers = block;
    block = prober->realloc(prober->probe.peers, (size_t)room * sizeof *prober->probe.peers);
    if (!block)
        return -ENOMEM;
    prober->probe.peers = block;
    block = prober->realloc(prober->vacant, (size_t)room * sizeof *prober->vacant);
    if (!block)
        return -ENOMEM;
    prober->vacant = block;
    prober->room = room;
    return 0;
}

void fdp_prober_set_life(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint8_t life)
{
    if (peer->life == life)
        return;
    prober->lives[peer->life]--;
    prober->lives[life]++;
    peer->life = life;
    if (life != peer->told && !peer->changed) {
        peer->changed = 1;
        prober->changed++;
    }
}

void fdp_prober_ask_quickly(struct fdp_prober *prober, uint32_t number)
{
    if (!prober->peers[number].quick && prober->quick_count < FDP_PROBER_QUICK) {
        prober->peers[number].quick = 1;
        prober->quick[prober->quick_count++] = number;
    }
}

static void begin(struct fdp_prober *prober, uint32_t number, const struct fdp_peer *from,
                  uint64_t now)
{
    struct fdp_prober_peer *peer = &prober->peers[number];
    struct fdp_probe_peer *to = &prober->probe.peers[number];
    /* Answers of before are none now. */
    const uint16_t seq = (uint16_t)(peer->seq + 4 * FDP_PROBER_WINDOW);
    const uint8_t quick = peer->quick;
    const uint16_t mtu = peer->mtu; /* until it is measured */

    memset(peer, 0, sizeof *peer);
    memset(to, 0, sizeof *to);
    memcpy(to->mac, from->mac, sizeof to->mac);
    to->family = from->endpoint_family;
    memcpy(to->address, from->endpoint, sizeof to->address);
    memcpy(peer->prefix, from->prefix, sizeof peer->prefix);
    peer->length = from->length;
    peer->seq = seq;
    peer->quick = quick;
    peer->mtu = mtu;
    peer->used = 1;
    peer->silences = prober->silences;
    peer->added_at = now;
    prober->lives[FDP_LIFE_NEW]++;
    fdp_prober_ask_quickly(prober, number);
}

static void forget_life(struct fdp_prober *prober, uint32_t number)
{
    struct fdp_prober_peer *peer = &prober->peers[number];

    prober->lives[peer->life]--;
    if (peer->changed)
        prober->changed--;
    peer->changed = 0;
    if (peer->mtu_changed)
        prober->mtu_changed--;
    peer->mtu_changed = 0;
    fdp_prober_end_search(prober, peer);
}

static int is_mac(const uint8_t mac[6])
{
    static const uint8_t none[6];

    return memcmp(mac, none, sizeof none) != 0;
}

int fdp_prober_has_mac(const struct fdp_prober *prober, uint32_t number)
{
    return is_mac(prober->probe.peers[number].mac);
}

int64_t fdp_prober_find(const struct fdp_prober *prober, const struct fdp_peer *peer)
{
    const int64_t at = fdp_table_find(&prober->index, peer);

    if (at < 0)
        return -1;
    return *fdp_row_tag(prober->index.layout, fdp_table_row(&prober->index, (uint32_t)at));
}

int fdp_prober_put(struct fdp_prober *prober, const struct fdp_peer *peer, uint64_t now)
{
    struct fdp_peer row = *peer;
    const int64_t known = fdp_prober_find(prober, peer);
    uint32_t number;

    if (known >= 0) {
        number = (uint32_t)known;
        struct fdp_probe_peer *to = &prober->probe.peers[number];

        prober->peers[number].mark = 1;
        if ((!is_mac(peer->mac) || !memcmp(to->mac, peer->mac, sizeof to->mac)) &&
            to->family == peer->endpoint_family &&
            !memcmp(to->address, peer->endpoint, sizeof to->address))
            return 0;
        forget_life(prober, number);
        begin(prober, number, peer, now);
        prober->peers[number].mark = 1;
        return 0;
    }
    if (!prober->vacant_count && prober->high == prober->room && grow(prober))
        return -ENOMEM;
    number = prober->vacant_count ? prober->vacant[prober->vacant_count - 1] : prober->high;
    row.tag = number;
    row.pad3 = 0;
    if (fdp_table_put(&prober->index, &row) < 0)
        return -ENOMEM;
    if (prober->vacant_count) {
        prober->vacant_count--;
    } else {
        memset(&prober->peers[number], 0, sizeof prober->peers[number]);
        prober->peers[number].seq = (uint16_t)fdp_prober_random(prober);
        prober->probe.count = ++prober->high;
    }
    prober->used++;
    begin(prober, number, peer, now);
    prober->peers[number].mark = 1;
    return 1;
}

int fdp_prober_remove(struct fdp_prober *prober, const struct fdp_peer *peer)
{
    const int64_t known = fdp_prober_find(prober, peer);

    if (known < 0)
        return 0;
    fdp_table_remove(&prober->index, peer);
    forget_life(prober, (uint32_t)known);
    prober->peers[known].used = 0;
    prober->peers[known].mtu = 0;
    prober->vacant[prober->vacant_count++] = (uint32_t)known;
    prober->used--;
    return 1;
}

void fdp_prober_set_mac(struct fdp_prober *prober, uint32_t number, const uint8_t mac[6],
                        uint64_t now)
{
    struct fdp_peer from = {.length = prober->peers[number].length,
                            .endpoint_family = prober->probe.peers[number].family};

    if (!memcmp(prober->probe.peers[number].mac, mac, 6))
        return;
    memcpy(from.prefix, prober->peers[number].prefix, sizeof from.prefix);
    memcpy(from.endpoint, prober->probe.peers[number].address, sizeof from.endpoint);
    memcpy(from.mac, mac, sizeof from.mac);
    forget_life(prober, number);
    begin(prober, number, &from, now);
}
