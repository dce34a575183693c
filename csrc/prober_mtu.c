/* SPDX-License-Identifier: Apache-2.0
 *
 * The path MTU of each peer: large probes now and then, and a search by halves where they are lost.
 *
 * Everything that is sent for it is bounded: by bytes a second, and by how many peers are searched
 * at a time, as these are asked more often than others. A size fails when several probes of it in
 * a row are lost while smaller ones come back.
 */
#include "prober_mtu.h"

enum {
    FIRST = 3,        /* from this probe of a peer on its path MTU is asked for */
    EVERY = 61,       /* one probe in so many is as large as the device takes */
    NARROW_EVERY = 11, /* one in so many is large, where the path takes less than the device */
    LOST = 3,         /* probes of one size in a row: the path does not take it */
    SEARCHED = 16     /* peers at a time */
};

static uint16_t least(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    return peer->takes ? peer->takes : (uint16_t)prober->size;
}

static int is_settled(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    return peer->fails ? peer->fails - least(prober, peer) <= 1 : peer->takes != 0;
}

/* The next step of a search. Paths of one underlay are alike: what was found last is tried first. */
static uint16_t step(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    const uint16_t low = least(prober, peer);

    if (!peer->fails || peer->fails > prober->large)
        return (uint16_t)prober->large;
    if (prober->guess > low && prober->guess < peer->fails)
        return prober->guess;
    if (prober->guess == low)
        return (uint16_t)(low + 1);
    return (uint16_t)((low + peer->fails) / 2);
}

/* What is tried now and then where the path MTU is known: does it still hold? */
static uint16_t check(const struct fdp_prober *prober, const struct fdp_prober_peer *peer,
                      uint32_t number)
{
    const uint32_t turn = peer->sent + number * 7;

    if (!peer->fails)
        return turn % EVERY ? 0 : (uint16_t)prober->large;
    if (turn % NARROW_EVERY)
        return 0;
    switch (turn / NARROW_EVERY % 3) {
    case 0:
        return (uint16_t)prober->large;
    case 1:
        return least(prober, peer);
    default:
        return peer->fails;
    }
}

/* Whether this peer is, or can become, one of those that are searched. */
static int may_search(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    if (peer->searches)
        return 1;
    if (prober->searching >= SEARCHED)
        return 0;
    peer->searches = 1;
    prober->searching++;
    return 1;
}

void fdp_prober_end_search(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    if (peer->searches)
        prober->searching--;
    peer->searches = 0;
    peer->large_pending = peer->large_lost = 0;
    peer->large_size = 0;
}

uint16_t fdp_prober_large_size(struct fdp_prober *prober, uint32_t number)
{
    struct fdp_prober_peer *peer = &prober->peers[number];
    uint16_t size;

    if (!prober->large || peer->unanswered || peer->large_pending ||
        (peer->life != FDP_LIFE_ALIVE && peer->life != FDP_LIFE_LOSSY) || peer->sent < FIRST)
        return 0;
    if (peer->large_size) /* once more */
        size = peer->large_size;
    else if (is_settled(prober, peer))
        size = check(prober, peer, number);
    else
        size = step(prober, peer);
    if (!size || prober->large_credit < size * 1000000ull)
        return 0;
    if (peer->large_size || (peer->fails && !is_settled(prober, peer)))
        if (!may_search(prober, peer))
            return 0;
    return size;
}

void fdp_prober_large_sent(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint16_t size,
                           uint64_t now)
{
    prober->large_credit -= size * 1000000ull;
    peer->large_pending = 1;
    peer->large_seq = peer->seq;
    peer->large_size = size;
    peer->large_at = now;
}

/* A size is decided: note the path MTU, where it is known now. */
static void conclude(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    const uint16_t mtu = least(prober, peer);
    const uint16_t before = peer->mtu;

    peer->large_pending = peer->large_lost = 0;
    peer->large_size = 0;
    if (!is_settled(prober, peer))
        return;
    fdp_prober_end_search(prober, peer);
    if (peer->fails)
        prober->guess = mtu;
    peer->mtu = mtu;
    /* That a path takes what the device does is no news, unless it did not before. */
    if (mtu != before && (before || peer->fails) && !peer->mtu_changed) {
        peer->mtu_changed = 1;
        prober->mtu_changed++;
    }
}

void fdp_prober_large_came(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    const uint16_t size = peer->large_size;

    if (size > peer->takes)
        peer->takes = size;
    if (size >= prober->large)
        peer->fails = 0;
    else if (peer->fails && size >= peer->fails)
        peer->fails = (uint16_t)(prober->large + 1); /* it is wider than it was */
    conclude(prober, peer);
}

void fdp_prober_large_lost(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    const uint16_t size = peer->large_size;

    peer->large_pending = 0;
    if (++peer->large_lost < LOST)
        return;
    if (size <= peer->takes)
        peer->takes = 0; /* it is narrower than it was */
    if (!peer->fails || size < peer->fails)
        peer->fails = size;
    conclude(prober, peer);
}

void fdp_prober_refill_large(struct fdp_prober *prober, uint64_t elapsed)
{
    const uint64_t most = (prober->large_rate / 10 + prober->large) * 1000000ull;

    if (elapsed > 1000000000)
        elapsed = 1000000000;
    prober->large_credit += elapsed / 1000 * prober->large_rate;
    if (prober->large_credit > most)
        prober->large_credit = most;
}
