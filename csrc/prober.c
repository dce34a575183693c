/* SPDX-License-Identifier: Apache-2.0
 *
 * Peers that are probed again and again: when which one is asked, and what follows.
 *
 * A cursor goes through all peers once in each interval, a few at each tick, so that there is never
 * a burst. A second one follows it by the time that an answer may take. A peer whose probe has no
 * answer then is asked quickly, by one path after the other, and is dead when none of several has
 * come back. Where no peer at all has answered meanwhile, none is dead: it is this node.
 */
#include "probe_frame.h"
#include "prober_mtu.h"
#include "prober_peers.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    CONFIRMED = 8,      /* probes in a row without an answer: it is dead */
    CONFIRMED_MASS = 3, /* where so many may be dead that they could not all be asked that often */
    CONFIRMED_LOSSY = 24,
    CONFIRMED_NEW = 32, /* a node that has just come may have other things to do first */
    QUICK_NEW = 24,
    BACK = 3,         /* answers in a row: it is alive again */
    PATH_SILENT = 3,  /* lost in a row by one path */
    LOSSY = 9830,     /* 15 % */
    NOT_LOSSY = 2621, /* 4 % */
    WITNESSES = 64,
    FEW = 128,          /* peers that are all looked at in each tick */
    MOST_AT_ONCE = 1024, /* peers that are asked in one tick: 20,000 a second */
    STRETCH_MOST = 8000  /* thousandths */
};

/* ns after the end of a silence of all in which no peer is called dead. */
#define GRACE 5000000000ull

/* ns that the processor's time is added up for. */
#define METER 4000000000ull

const uint32_t fdp_prober_bounds[FDP_PROBER_BUCKETS - 1] = {
    500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000};

/* ---- what answers say ---- */

static unsigned path_of(const struct fdp_prober *prober, uint32_t number, uint16_t seq)
{
    return (number + seq) % prober->probe.paths;
}

static void count_trip(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint32_t trip)
{
    unsigned bucket = 0;

    while (bucket < FDP_PROBER_BUCKETS - 1 && trip > fdp_prober_bounds[bucket])
        bucket++;
    peer->trips[bucket]++;
    prober->trips[bucket]++;
    prober->trip_sum += trip;
    peer->rtt = peer->answered ? peer->rtt - peer->rtt / 8 + trip / 8 : trip;
}

static void note_loss(struct fdp_prober *prober, struct fdp_prober_peer *peer, unsigned path,
                      int lost)
{
    const uint16_t bit = (uint16_t)(1u << path);

    if (lost) {
        peer->loss = (uint16_t)(peer->loss + (65535u - peer->loss) / 32);
        if (peer->path_lost[path] < 255)
            peer->path_lost[path]++;
        if (peer->path_lost[path] >= PATH_SILENT)
            peer->silent_paths |= bit;
    } else {
        peer->loss = (uint16_t)(peer->loss - (peer->loss + 31u) / 32);
        peer->path_lost[path] = 0;
        peer->silent_paths &= (uint16_t)~bit;
    }
    const int narrow = fdp_prober_is_narrow(peer) && !prober->narrow_is_well;
    if (peer->life == FDP_LIFE_ALIVE && (peer->loss > LOSSY || peer->silent_paths || narrow))
        fdp_prober_set_life(prober, peer, FDP_LIFE_LOSSY);
    else if (peer->life == FDP_LIFE_LOSSY && peer->loss < NOT_LOSSY && !peer->silent_paths && !narrow)
        fdp_prober_set_life(prober, peer, FDP_LIFE_ALIVE);
}

/* It counts from here on, without what was lost before. */
static void revive(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    peer->loss = 0;
    peer->silent_paths = 0;
    memset(peer->path_lost, 0, sizeof peer->path_lost);
    fdp_prober_set_life(prober, peer, FDP_LIFE_ALIVE);
}

/* What was lost while nothing came back from any peer says nothing of this one. */
static void forgive(const struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    if (peer->silences == prober->silences)
        return;
    peer->silences = prober->silences;
    peer->unanswered = 0;
    peer->pending = 0;
    peer->large_pending = peer->large_lost = 0;
    memset(peer->path_lost, 0, sizeof peer->path_lost);
}

int fdp_prober_note(void *context, const struct fdp_probe_payload *payload, uint64_t now)
{
    struct fdp_prober *prober = context;
    struct fdp_prober_peer *peer = &prober->peers[payload->index];
    const uint16_t age = (uint16_t)(peer->seq - payload->round);

    if (!peer->used || age >= FDP_PROBER_WINDOW || !(peer->pending >> age & 1)) {
        prober->probe.strange++; /* a copy, or too late */
        return 0;
    }
    const uint64_t trip = now > payload->sent ? (now - payload->sent) / 100 : 0;
    count_trip(prober, peer, trip < 1 ? 1 : trip > UINT32_MAX ? UINT32_MAX : (uint32_t)trip);
    peer->pending &= (uint16_t)~(1u << age);
    peer->answered++;
    prober->answered++;
    peer->answered_at = prober->last_answer = fdp_probe_clock(CLOCK_MONOTONIC);
    if (peer->unanswered > age) {
        peer->unanswered = age;
        peer->lost_since = age ? peer->sent_at : 0;
    }
    if (prober->silent) {
        prober->silent = 0;
        prober->silences++;
        prober->silent_end = prober->last_answer;
    }
    forgive(prober, peer);
    if (peer->large_pending && payload->round == peer->large_seq)
        fdp_prober_large_came(prober, peer);
    note_loss(prober, peer, path_of(prober, payload->index, payload->round), 0);
    if (peer->life == FDP_LIFE_NEW) {
        revive(prober, peer);
    } else if (peer->life == FDP_LIFE_DEAD) {
        if (++peer->back >= BACK)
            revive(prober, peer);
        else
            fdp_prober_ask_quickly(prober, payload->index);
    }
    return 1;
}

uint64_t fdp_prober_interval(const struct fdp_prober *prober)
{
    return prober->interval / 1000 * prober->stretch;
}

/* ---- what silence says ---- */

/* How long an answer of this peer may take. */
static uint64_t patience(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    uint64_t wait = fdp_prober_interval(prober) / 4;

    if (wait > 500000000)
        wait = 500000000;
    return peer->rtt * 300ull > wait ? peer->rtt * 300ull : wait;
}

/* Between two probes of a peer that may be dead. */
static uint64_t quick_gap(const struct fdp_prober *prober)
{
    const uint64_t gap = fdp_prober_interval(prober) / 10;

    return gap > 250000000 ? 250000000 : gap;
}

static unsigned needed(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    if (peer->life == FDP_LIFE_NEW)
        return CONFIRMED_NEW;
    if (peer->life == FDP_LIFE_LOSSY)
        return CONFIRMED_LOSSY;
    return prober->quick_count * 4 > prober->quick_budget ? CONFIRMED_MASS : CONFIRMED;
}

static void ask(struct fdp_prober *prober, uint32_t number, uint64_t now);

/* Have a few others asked, where nobody has answered since this peer did not: is it this node that
 * cannot be heard? Returns whether their answers have to be waited for. */
static int has_witness(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    const uint64_t since = prober->peers[number].lost_since;
    const uint32_t some = prober->high < WITNESSES ? prober->high : WITNESSES;
    uint32_t at = fdp_prober_random(prober) % prober->high;

    for (uint32_t i = 0; i < some; i++, at = at + 1 < prober->high ? at + 1 : 0) {
        const struct fdp_prober_peer *other = &prober->peers[at];

        if (at == number || !other->used ||
            (other->life != FDP_LIFE_ALIVE && other->life != FDP_LIFE_LOSSY))
            continue;
        if (other->sent_at < since) {
            ask(prober, at, now);
            return 1;
        }
        if (now - other->sent_at < patience(prober, other))
            return 1;
    }
    return 0;
}

/* Draw the conclusions that the time allows. Returns whether the peer is to be asked quickly. */
static int examine(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    struct fdp_prober_peer *peer = &prober->peers[number];

    if (!peer->used || !fdp_prober_has_mac(prober, number))
        return 0;
    forgive(prober, peer);
    if (peer->life == FDP_LIFE_NEW && peer->unanswered < QUICK_NEW)
        return 1;
    if (peer->life == FDP_LIFE_DEAD) {
        if (peer->unanswered > 1)
            peer->back = 0;
        return peer->back && peer->unanswered <= 1;
    }
    if (!peer->unanswered)
        return peer->searches;
    if (prober->silent_end && now - prober->silent_end < GRACE)
        return 0; /* the kernel resolves addresses on the underlay again, say */
    if (peer->unanswered < needed(prober, peer))
        return (now - peer->lost_since >= patience(prober, peer) || peer->searches) &&
               peer->life != FDP_LIFE_NEW;
    if (now - peer->sent_at < patience(prober, peer))
        return peer->quick;
    const uint32_t alive = prober->lives[FDP_LIFE_ALIVE] + prober->lives[FDP_LIFE_LOSSY];
    if (peer->life != FDP_LIFE_NEW && alive > 1 && prober->last_answer < peer->lost_since) {
        if (!prober->silent && has_witness(prober, number, now))
            return peer->quick;
        if (!prober->silent)
            prober->silences++;
        prober->silent = 1;
        return 0;
    }
    peer->back = 0;
    fdp_prober_end_search(prober, peer);
    fdp_prober_set_life(prober, peer, FDP_LIFE_DEAD);
    return 0;
}

static void shoot(struct fdp_prober *prober)
{
    if (!prober->shot_count)
        return;
    const int done = fdp_probe_shoot(&prober->probe, prober->shots, prober->shot_count, prober->size);

    prober->error = done < 0 ? done : 0;
    if (done > 0)
        prober->sent += (uint32_t)done;
    prober->shot_count = 0;
}

/* The probe that has no answer although WINDOW others were sent after it. */
static void give_up(struct fdp_prober *prober, uint32_t number)
{
    struct fdp_prober_peer *peer = &prober->peers[number];
    const uint16_t seq = (uint16_t)(peer->seq - FDP_PROBER_WINDOW + 1);

    if (peer->large_pending && seq == peer->large_seq)
        peer->large_pending = 0; /* nor has any other: that is no matter of size */
    else if (peer->life != FDP_LIFE_NEW && !prober->silent)
        note_loss(prober, peer, path_of(prober, number, seq), 1);
}

/* A large probe is lost when one that was sent after it has come back, and it had its time. */
static void examine_large(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    struct fdp_prober_peer *peer = &prober->peers[number];
    const uint16_t age = (uint16_t)(peer->seq - peer->large_seq);

    if (!peer->large_pending || age >= FDP_PROBER_WINDOW || peer->unanswered >= age ||
        now - peer->large_at < patience(prober, peer))
        return;
    peer->pending &= (uint16_t)~(1u << age);
    fdp_prober_large_lost(prober, peer);
}

static void ask(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    struct fdp_prober_peer *peer = &prober->peers[number];

    examine_large(prober, number, now);
    if (peer->pending >> (FDP_PROBER_WINDOW - 1) & 1)
        give_up(prober, number);
    const uint16_t large = fdp_prober_large_size(prober, number);
    peer->seq++;
    peer->pending = (uint16_t)((peer->pending << 1 | 1) & ((1u << FDP_PROBER_WINDOW) - 1));
    if (!peer->unanswered)
        peer->lost_since = now;
    if (peer->unanswered < UINT16_MAX)
        peer->unanswered++;
    peer->sent++;
    peer->sent_at = now;
    if (large)
        fdp_prober_large_sent(prober, peer, large, now);
    prober->shots[prober->shot_count++] =
        (struct fdp_probe_shot){number, peer->seq, (uint16_t)path_of(prober, number, peer->seq),
                                large};
    if (prober->shot_count == FDP_PROBER_SHOTS)
        shoot(prober);
}

/* ---- when ---- */

static void examine_one(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    if (examine(prober, number, now))
        fdp_prober_ask_quickly(prober, number);
}

/* Those whose probes had time enough: a second cursor behind the first one. */
static void follow(struct fdp_prober *prober, uint64_t now)
{
    const uint32_t high = prober->high;
    uint64_t wait = fdp_prober_interval(prober) / 4;

    if (high <= FEW) {
        for (uint32_t number = 0; number < high; number++)
            examine_one(prober, number, now);
        return;
    }
    if (wait > 500000000)
        wait = 500000000;
    const uint32_t behind = (uint32_t)(wait * high / fdp_prober_interval(prober));
    if (prober->trail >= high)
        prober->trail = 0;
    while ((prober->cursor + high - prober->trail) % high > behind) {
        examine_one(prober, prober->trail, now);
        if (++prober->trail >= high)
            prober->trail = 0;
    }
}

/* The peers that are due: so many of all as the time that has passed is of the interval. */
static void advance(struct fdp_prober *prober, uint64_t now, uint64_t elapsed)
{
    const uint32_t high = prober->high;
    /* In millionths of a peer; the pace differs a little from round to round. */
    prober->cursor_credit += elapsed * high * prober->pace / (fdp_prober_interval(prober) / 1000);
    uint64_t most = (uint64_t)high * FDP_PROBER_TICK * 4 / fdp_prober_interval(prober) + 1;
    if (most > MOST_AT_ONCE)
        most = MOST_AT_ONCE;
    if (prober->cursor_credit > most * 1000000)
        prober->cursor_credit = most * 1000000; /* what was missed is not made up for */
    while (prober->cursor_credit >= 1000000) {
        prober->cursor_credit -= 1000000;
        if (prober->cursor >= high)
            prober->cursor = 0;
        if (prober->peers[prober->cursor].used) {
            examine_one(prober, prober->cursor, now);
            if (!prober->peers[prober->cursor].quick && fdp_prober_has_mac(prober, prober->cursor))
                ask(prober, prober->cursor, now);
        }
        if (++prober->cursor >= high) {
            prober->cursor = 0;
            prober->pace = 950 + fdp_prober_random(prober) % 101;
        }
    }
}

static void ask_those_in_doubt(struct fdp_prober *prober, uint64_t now, uint64_t elapsed)
{
    prober->quick_credit += elapsed / 1000 * prober->quick_budget;
    const uint64_t most = prober->quick_budget * 100000ull + 1000000; /* a tenth of a second's */
    if (prober->quick_credit > most)
        prober->quick_credit = most;
    uint32_t left = prober->quick_count;
    if (prober->quick_at >= prober->quick_count)
        prober->quick_at = 0;
    while (left-- && prober->quick_count) {
        const uint32_t number = prober->quick[prober->quick_at];
        struct fdp_prober_peer *peer = &prober->peers[number];

        if (!examine(prober, number, now)) {
            peer->quick = 0;
            prober->quick[prober->quick_at] = prober->quick[--prober->quick_count];
        } else {
            if (prober->quick_credit >= 1000000 && now - peer->sent_at >= quick_gap(prober) &&
                (peer->life == FDP_LIFE_NEW || peer->unanswered < needed(prober, peer))) {
                prober->quick_credit -= 1000000;
                ask(prober, number, now);
            }
            prober->quick_at++;
        }
        if (prober->quick_at >= prober->quick_count)
            prober->quick_at = 0;
    }
}

void fdp_prober_tick(struct fdp_prober *prober, uint64_t now)
{
    const uint64_t elapsed = prober->last_tick ? now - prober->last_tick : 0;

    prober->last_tick = now;
    if (!prober->high || prober->probe.receiver < 0)
        return;
    (void)fdp_probe_take(&prober->probe, fdp_prober_note, prober);
    fdp_prober_refill_large(prober, elapsed);
    ask_those_in_doubt(prober, now, elapsed);
    follow(prober, now);
    advance(prober, now, elapsed < 4 * FDP_PROBER_TICK ? elapsed : 4 * FDP_PROBER_TICK);
    shoot(prober);
}

/* These, which work together, have used `busy` ns of a processor more until `now`: stretch their
 * intervals where that is too much for them. */
static void meter(struct fdp_prober **all, unsigned count, uint64_t busy, uint64_t now)
{
    struct fdp_prober *first = all[0];

    if (!first->busy_since)
        first->busy_since = now;
    first->busy += busy;
    if (now - first->busy_since < METER)
        return;
    const uint64_t share = first->busy * 1000 / ((now - first->busy_since) / 1000);
    for (unsigned i = 0; i < count; i++) {
        struct fdp_prober *prober = all[i];

        if (!prober->most_used)
            continue;
        const uint64_t wanted = prober->stretch * share / prober->most_used;
        if (wanted < 1000)
            prober->stretch = 1000;
        else
            prober->stretch = wanted < STRETCH_MOST ? (uint32_t)wanted : STRETCH_MOST;
    }
    first->busy = 0;
    first->busy_since = now;
}

static int has_news(const struct fdp_prober *prober)
{
    return prober->changed || prober->mtu_changed || prober->silent != prober->silent_told;
}

enum { MOST = 16 };

int fdp_prober_run(struct fdp_prober **all, unsigned count, int wake, uint64_t end)
{
    uint64_t busy = fdp_probe_clock(CLOCK_THREAD_CPUTIME_ID);

    if (count > MOST)
        return -EINVAL;
    for (;;) {
        struct pollfd wait[1 + MOST] = {{wake, POLLIN, 0}};
        uint64_t now = fdp_probe_clock(CLOCK_MONOTONIC), next = end;
        unsigned waiting = 1;
        int news = 0;

        for (unsigned i = 0; i < count; i++) {
            struct fdp_prober *prober = all[i];

            if (!prober->used || prober->probe.receiver < 0)
                continue;
            if (now - prober->last_tick >= FDP_PROBER_TICK)
                fdp_prober_tick(prober, now);
            else if (prober->quick_count)
                (void)fdp_probe_take(&prober->probe, fdp_prober_note, prober);
            if (prober->last_tick + FDP_PROBER_TICK < next)
                next = prober->last_tick + FDP_PROBER_TICK;
            if (prober->quick_count) /* an answer changes something; else it may wait for the tick */
                wait[waiting++] = (struct pollfd){prober->probe.receiver, POLLIN, 0};
            news |= has_news(prober);
        }
        now = fdp_probe_clock(CLOCK_MONOTONIC);
        if (count) {
            const uint64_t before = busy;

            busy = fdp_probe_clock(CLOCK_THREAD_CPUTIME_ID);
            meter(all, count, busy - before, now);
        }
        if (news)
            return 1;
        if (now >= end)
            return 0;
        const uint64_t left = next > now ? next - now : 0;
        const int ms = left / 1000000 > 1000000 ? 1000000 : (int)((left + 999999) / 1000000);
        if (poll(wait, waiting, ms) < 0 && errno != EINTR)
            return -errno;
        if (wait[0].revents)
            return 2;
    }
}
