/* SPDX-License-Identifier: Apache-2.0
 *
 * Peers that are probed again and again: when which one is asked, and what follows.
 *
 * A cursor goes through all peers once in each interval, a few at each tick, so that there is never
 * a burst. A second one follows it by the time that an answer may take. A peer whose probe has no
 * answer then is asked quickly, by one path after the other, and is dead when none of several has
 * come back. Where no peer at all has answered meanwhile, none is dead: it is this node.
 */
#include "prober.h"

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
    WINDOW = 8,       /* a probe is lost when so many were sent after it */
    LOSSY = 9830,     /* 15 % */
    NOT_LOSSY = 2621, /* 4 % */
    WITNESSES = 64,
    LARGE_FIRST = 3,  /* this probe of a peer is a large one, */
    LARGE_EVERY = 64, /* and then one in so many, */
    LARGE_AGAIN = 8,  /* or in so few while they are lost */
    LARGE_LOST = 3,   /* in a row: the path does not take them */
    FEW = 128         /* peers that are all looked at in each tick */
};

/* ns after the end of a silence of all in which no peer is called dead. */
#define GRACE 5000000000ull

const uint32_t fdp_prober_bounds[FDP_PROBER_BUCKETS - 1] = {
    500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000};

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static uint32_t random32(struct fdp_prober *prober)
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
    prober->quick_budget = 200;
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

static void set_life(struct fdp_prober *prober, struct fdp_prober_peer *peer, uint8_t life)
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

static void ask_quickly(struct fdp_prober *prober, uint32_t number)
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
    const uint16_t seq = (uint16_t)(peer->seq + 4 * WINDOW); /* answers of before are none now */
    const uint8_t quick = peer->quick;

    memset(peer, 0, sizeof *peer);
    memset(to, 0, sizeof *to);
    memcpy(to->mac, from->mac, sizeof to->mac);
    memcpy(to->address, from->endpoint, sizeof to->address);
    memcpy(peer->prefix, from->prefix, sizeof peer->prefix);
    peer->length = from->length;
    peer->seq = seq;
    peer->quick = quick;
    peer->used = 1;
    peer->silences = prober->silences;
    peer->added_at = now;
    prober->lives[FDP_LIFE_NEW]++;
    ask_quickly(prober, number);
}

static void forget_life(struct fdp_prober *prober, uint32_t number)
{
    struct fdp_prober_peer *peer = &prober->peers[number];

    prober->lives[peer->life]--;
    if (peer->changed)
        prober->changed--;
    peer->changed = 0;
}

static int is_mac(const uint8_t mac[6])
{
    static const uint8_t none[6];

    return memcmp(mac, none, sizeof none) != 0;
}

static int has_mac(const struct fdp_prober *prober, uint32_t number)
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
        prober->peers[number].seq = (uint16_t)random32(prober);
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
    prober->vacant[prober->vacant_count++] = (uint32_t)known;
    prober->used--;
    return 1;
}

void fdp_prober_set_mac(struct fdp_prober *prober, uint32_t number, const uint8_t mac[6],
                        uint64_t now)
{
    struct fdp_peer from = {.length = prober->peers[number].length};

    if (!memcmp(prober->probe.peers[number].mac, mac, 6))
        return;
    memcpy(from.prefix, prober->peers[number].prefix, sizeof from.prefix);
    memcpy(from.endpoint, prober->probe.peers[number].address, sizeof from.endpoint);
    memcpy(from.mac, mac, sizeof from.mac);
    forget_life(prober, number);
    begin(prober, number, &from, now);
}

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
    if (peer->life == FDP_LIFE_ALIVE && (peer->loss > LOSSY || peer->silent_paths || peer->small_path))
        set_life(prober, peer, FDP_LIFE_LOSSY);
    else if (peer->life == FDP_LIFE_LOSSY && peer->loss < NOT_LOSSY && !peer->silent_paths &&
             !peer->small_path)
        set_life(prober, peer, FDP_LIFE_ALIVE);
}

/* It counts from here on, without what was lost before. */
static void revive(struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    peer->loss = 0;
    peer->silent_paths = 0;
    memset(peer->path_lost, 0, sizeof peer->path_lost);
    set_life(prober, peer, FDP_LIFE_ALIVE);
}

/* What was lost while nothing came back from any peer says nothing of this one. */
static void forgive(const struct fdp_prober *prober, struct fdp_prober_peer *peer)
{
    if (peer->silences == prober->silences)
        return;
    peer->silences = prober->silences;
    peer->unanswered = 0;
    peer->pending = 0;
    peer->large_pending = 0;
    memset(peer->path_lost, 0, sizeof peer->path_lost);
}

int fdp_prober_note(void *context, const struct fdp_probe_payload *payload, uint64_t now)
{
    struct fdp_prober *prober = context;
    struct fdp_prober_peer *peer = &prober->peers[payload->index];
    const uint16_t age = (uint16_t)(peer->seq - payload->round);

    if (!peer->used || age >= WINDOW || !(peer->pending >> age & 1)) {
        prober->probe.strange++; /* a copy, or too late */
        return 0;
    }
    const uint64_t trip = now > payload->sent ? (now - payload->sent) / 100 : 0;
    count_trip(prober, peer, trip < 1 ? 1 : trip > UINT32_MAX ? UINT32_MAX : (uint32_t)trip);
    peer->pending &= (uint16_t)~(1u << age);
    peer->answered++;
    prober->answered++;
    peer->answered_at = prober->last_answer = clock_ns(CLOCK_MONOTONIC);
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
        peer->large_pending = peer->large_lost = peer->small_path = 0;
    note_loss(prober, peer, path_of(prober, payload->index, payload->round), 0);
    if (peer->life == FDP_LIFE_NEW) {
        revive(prober, peer);
    } else if (peer->life == FDP_LIFE_DEAD) {
        if (++peer->back >= BACK)
            revive(prober, peer);
        else
            ask_quickly(prober, payload->index);
    }
    return 1;
}

/* ---- what silence says ---- */

/* How long an answer of this peer may take. */
static uint64_t patience(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    uint64_t wait = prober->interval / 4;

    if (wait > 500000000)
        wait = 500000000;
    return peer->rtt * 300ull > wait ? peer->rtt * 300ull : wait;
}

/* Between two probes of a peer that may be dead. */
static uint64_t quick_gap(const struct fdp_prober *prober)
{
    const uint64_t gap = prober->interval / 10;

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
    uint32_t at = random32(prober) % prober->high;

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

    if (!peer->used || !has_mac(prober, number))
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
        return 0;
    if (prober->silent_end && now - prober->silent_end < GRACE)
        return 0; /* the kernel resolves addresses on the underlay again, say */
    if (peer->unanswered < needed(prober, peer))
        return now - peer->lost_since >= patience(prober, peer) && peer->life != FDP_LIFE_NEW;
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
    set_life(prober, peer, FDP_LIFE_DEAD);
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

/* Whether the next probe of a peer that answers is to be a large one. */
static int is_large(const struct fdp_prober *prober, const struct fdp_prober_peer *peer)
{
    if (!prober->large || peer->unanswered || peer->large_pending ||
        (peer->life != FDP_LIFE_ALIVE && peer->life != FDP_LIFE_LOSSY))
        return 0;
    return peer->sent == LARGE_FIRST ||
           peer->sent % (peer->large_lost ? LARGE_AGAIN : LARGE_EVERY) == 0;
}

/* The probe that has no answer although WINDOW others were sent after it. */
static void give_up(struct fdp_prober *prober, uint32_t number)
{
    struct fdp_prober_peer *peer = &prober->peers[number];
    const uint16_t seq = (uint16_t)(peer->seq - WINDOW + 1);

    if (peer->large_pending && seq == peer->large_seq) {
        peer->large_pending = 0;
        if (peer->large_lost < LARGE_LOST)
            peer->large_lost++;
        if (peer->large_lost == LARGE_LOST)
            peer->small_path = 1; /* the next answer says so */
    } else if (peer->life != FDP_LIFE_NEW && !prober->silent) {
        note_loss(prober, peer, path_of(prober, number, seq), 1);
    }
}

static void ask(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    struct fdp_prober_peer *peer = &prober->peers[number];

    if (peer->pending >> (WINDOW - 1) & 1)
        give_up(prober, number);
    const int large = is_large(prober, peer);
    peer->seq++;
    peer->pending = (uint16_t)((peer->pending << 1 | 1) & ((1u << WINDOW) - 1));
    if (!peer->unanswered)
        peer->lost_since = now;
    if (peer->unanswered < UINT16_MAX)
        peer->unanswered++;
    peer->sent++;
    peer->sent_at = now;
    if (large) {
        peer->large_pending = 1;
        peer->large_seq = peer->seq;
    }
    prober->shots[prober->shot_count++] =
        (struct fdp_probe_shot){number, peer->seq, (uint16_t)path_of(prober, number, peer->seq),
                                large ? prober->large : 0};
    if (prober->shot_count == FDP_PROBER_SHOTS)
        shoot(prober);
}

/* ---- when ---- */

static void examine_one(struct fdp_prober *prober, uint32_t number, uint64_t now)
{
    if (examine(prober, number, now))
        ask_quickly(prober, number);
}

/* Those whose probes had time enough: a second cursor behind the first one. */
static void follow(struct fdp_prober *prober, uint64_t now)
{
    const uint32_t high = prober->high;
    uint64_t wait = prober->interval / 4;

    if (high <= FEW) {
        for (uint32_t number = 0; number < high; number++)
            examine_one(prober, number, now);
        return;
    }
    if (wait > 500000000)
        wait = 500000000;
    const uint32_t behind = (uint32_t)(wait * high / prober->interval);
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
    prober->cursor_credit += elapsed * high * prober->pace / (prober->interval / 1000);
    uint64_t most = (uint64_t)high * FDP_PROBER_TICK * 4 / prober->interval + 1;
    if (most > FDP_PROBER_SHOTS / 2)
        most = FDP_PROBER_SHOTS / 2;
    if (prober->cursor_credit > most * 1000000)
        prober->cursor_credit = most * 1000000; /* what was missed is not made up for */
    while (prober->cursor_credit >= 1000000) {
        prober->cursor_credit -= 1000000;
        if (prober->cursor >= high)
            prober->cursor = 0;
        if (prober->peers[prober->cursor].used) {
            examine_one(prober, prober->cursor, now);
            if (!prober->peers[prober->cursor].quick && has_mac(prober, prober->cursor))
                ask(prober, prober->cursor, now);
        }
        if (++prober->cursor >= high) {
            prober->cursor = 0;
            prober->pace = 950 + random32(prober) % 101;
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
    ask_those_in_doubt(prober, now, elapsed);
    follow(prober, now);
    advance(prober, now, elapsed < 4 * FDP_PROBER_TICK ? elapsed : 4 * FDP_PROBER_TICK);
    shoot(prober);
}

static int has_news(const struct fdp_prober *prober)
{
    return prober->changed || prober->silent != prober->silent_told;
}

enum { MOST = 16 };

int fdp_prober_run(struct fdp_prober **all, unsigned count, int wake, uint64_t end)
{
    if (count > MOST)
        return -EINVAL;
    for (;;) {
        struct pollfd wait[1 + MOST] = {{wake, POLLIN, 0}};
        uint64_t now = clock_ns(CLOCK_MONOTONIC), next = end;
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
        if (news)
            return 1;
        now = clock_ns(CLOCK_MONOTONIC);
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
