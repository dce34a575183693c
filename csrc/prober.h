/* SPDX-License-Identifier: Apache-2.0
 *
 * Peers that are probed again and again: when which one is asked, and what its answers and its
 * silence say. Frames, sockets and tags are those of probe.h.
 *
 * Time is CLOCK_MONOTONIC in ns where nothing else is said.
 */
#ifndef FDP_PROBER_H
#define FDP_PROBER_H

#include "probe.h"
#include "table.h"

enum { FDP_PROBER_BUCKETS = 12, FDP_PROBER_QUICK = 256, FDP_PROBER_SHOTS = 512 };

/* What is known of a peer. LOSSY: it is alive, and loses packets or some paths. */
enum fdp_life { FDP_LIFE_NEW, FDP_LIFE_ALIVE, FDP_LIFE_LOSSY, FDP_LIFE_DEAD };

/* Upper bounds of the buckets of round trips, in 100 ns; the last one has none. */
extern const uint32_t fdp_prober_bounds[FDP_PROBER_BUCKETS - 1];

struct fdp_prober_peer {
    uint64_t added_at, sent_at, answered_at; /* 0: never */
    uint64_t lost_since; /* when the first of those probes was sent that have no answer */
    uint32_t rtt;        /* smoothed, in 100 ns */
    uint32_t sent, answered;
    uint32_t trips[FDP_PROBER_BUCKETS];
    uint16_t seq;          /* of the last probe; it says which path it took */
    uint16_t pending;      /* bit n: the probe n before the last has no answer yet */
    uint16_t unanswered;   /* sent since the last answer */
    uint16_t loss;         /* smoothed share of 65535 that was lost */
    uint16_t silent_paths; /* bits: paths of which several in a row had no answer */
    uint16_t large_seq;    /* of the last large probe, */
    uint16_t large_size;   /* its bytes; 0: none is tried */
    uint16_t takes, fails; /* bytes that came back, and that did not; 0: not known */
    uint16_t mtu;          /* what the path takes, as far as it was told; 0: not known */
    uint64_t large_at;     /* when the last large probe was sent */
    uint8_t path_lost[FDP_PROBE_PATHS];
    uint8_t life, told; /* enum fdp_life: now, and when the caller was told last */
    uint8_t back;       /* answers in a row since it is dead */
    uint8_t quick, used, changed, mark;
    uint8_t silences; /* so many of the prober's silences are behind what is counted here */
    uint8_t large_pending; /* it has no answer yet */
    uint8_t large_lost;    /* so many of this size were lost in a row */
    uint8_t searches;      /* it is one of those whose path MTU is searched for now */
    uint8_t mtu_changed;   /* the caller has yet to be told */
    uint8_t length; /* of its subnet */
    uint8_t prefix[16];
};

struct fdp_prober {
    struct fdp_probe probe;
    struct fdp_table index;        /* FDP_PEER: subnet to number (the tag) */
    struct fdp_prober_peer *peers; /* beside probe.peers */
    uint32_t *vacant;              /* numbers that are free, a stack */
    uint32_t room, high, vacant_count, used;
    fdp_realloc_fn realloc;
    /* Of the caller; may change at any time. */
    uint64_t interval;     /* between two probes of a peer, at least */
    uint32_t most_used;    /* millionths of a processor that all may take together; 0: any */
    uint32_t quick_budget; /* probes a second beside those, for peers that may be dead */
    uint32_t size;         /* bytes of a probe */
    uint32_t large;        /* and of some: the device's MTU; 0: of none */
    uint32_t large_rate;   /* bytes a second of large ones */
    uint8_t narrow_is_well; /* the caller sees to peers whose path takes less: they are not lossy */
    /* Of the engine. */
    uint32_t stretch;            /* of the interval for that, in thousandths */
    uint64_t busy, busy_since;   /* processor's time of the thread, ns */
    uint64_t last_tick, cursor_credit, quick_credit;
    uint32_t cursor, trail, pace, quick_count, quick_at;
    uint32_t quick[FDP_PROBER_QUICK];
    struct fdp_probe_shot shots[FDP_PROBER_SHOTS];
    uint32_t shot_count;
    uint64_t random;
    uint64_t last_answer, silent_end;
    uint32_t changed; /* peers whose life has changed since they were told */
    uint64_t large_credit;
    uint32_t mtu_changed, searching; /* peers */
    uint16_t guess;                  /* the path MTU that was found last */
    uint8_t silent, silent_told; /* no peer answers at all */
    uint8_t silences; /* beginnings and ends of that so far */
    int error; /* of the last sending: -errno or 0 */
    uint64_t sent, answered, trips[FDP_PROBER_BUCKETS], trip_sum;
    uint32_t lives[4];
};

void fdp_prober_init(struct fdp_prober *prober, uint64_t seed, fdp_realloc_fn realloc);
void fdp_prober_free(struct fdp_prober *prober);

/* Add a peer, or change where it is. `peer` is a row of FDP_PEER, whose endpoint and MAC are used;
 * one without a MAC is not asked until it has one, and what is known of it stays. A changed one is
 * new again. 1 new, 0 known, -ENOMEM. */
int fdp_prober_put(struct fdp_prober *prober, const struct fdp_peer *peer, uint64_t now);

/* Set where frames to a peer go; a peer that had no MAC, or another one, is new again. */
void fdp_prober_set_mac(struct fdp_prober *prober, uint32_t number, const uint8_t mac[6],
                        uint64_t now);

/* Forget the peer of a subnet: 1, or 0 where there was none. */
int fdp_prober_remove(struct fdp_prober *prober, const struct fdp_peer *peer);

/* The number of a subnet's peer, -1 where there is none. */
int64_t fdp_prober_find(const struct fdp_prober *prober, const struct fdp_peer *peer);

/* Read answers, and send what is due. Called every FDP_PROBER_TICK ns or so. */
void fdp_prober_tick(struct fdp_prober *prober, uint64_t now);

/* One answer, at `now` of CLOCK_REALTIME. 1 where it counts. Apart for the fuzzer. */
int fdp_prober_note(void *prober, const struct fdp_probe_payload *payload, uint64_t now);

/* Go on until something has changed (1), `wake` can be read (2), or until `end` (0). -errno. */
int fdp_prober_run(struct fdp_prober **all, unsigned count, int wake, uint64_t end);

/* Between two probes of a peer, in ns, stretched. */
uint64_t fdp_prober_interval(const struct fdp_prober *prober);

#define FDP_PROBER_TICK 50000000ull

#endif
