/* SPDX-License-Identifier: Apache-2.0
 *
 * The table of peers as a BPF map holds it: one for each family, with a prefix as key
 * and the peer's endpoint and MAC as value. csrc/bpf/forward.c reads it for every packet.
 */
#include "bpfmap.h"
#include "kinds.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#define VALUE 24 /* endpoint, MAC, family of the endpoint, a byte of nothing */
#define BATCH 1024 /* entries of a system call: keys and values fit FDP_RX_SIZE */

/* Bytes of a key of this family: a length of 32 bits, and the address. */
static inline uint32_t key_size(int family)
{
    return family == 2 ? 8 : 20;
}

_Static_assert(BATCH * (20 + VALUE) <= FDP_RX_SIZE, "a batch fits the buffer");
_Static_assert(BATCH * 20 <= FDP_TX_SIZE, "as do its keys");

static void to_key(const struct fdp_peer *peer, uint8_t *key)
{
    const uint32_t length = peer->length;

    memcpy(key, &length, sizeof length);
    memcpy(key + sizeof length, peer->prefix, key_size(peer->family) - sizeof length);
}

/* A row from a key and a value of the map: 0, or -EBADMSG. */
static int to_row(const struct fdp_scope *scope, const uint8_t *key, const uint8_t *value,
                  struct fdp_peer *peer)
{
    const uint32_t size = key_size(scope->family) - (uint32_t)sizeof(uint32_t);
    uint32_t length;

    memcpy(&length, key, sizeof length);
    if (length > size * 8)
        return -EBADMSG;
    memset(peer, 0, sizeof *peer);
    peer->map = scope->ifindex;
    peer->family = scope->family;
    peer->length = (uint8_t)length;
    memcpy(peer->prefix, key + sizeof length, size);
    memcpy(peer->endpoint, value, VALUE);
    return 0;
}

enum { GROUP = 64 };

static int feed(const struct fdp_scope *scope, const uint8_t *keys, const uint8_t *values,
                uint32_t count, fdp_sink sink, void *context)
{
    const uint32_t key = key_size(scope->family);
    union fdp_row rows[GROUP];
    uint8_t owners[GROUP];
    int err = 0;

    memset(owners, FDP_OURS, sizeof owners);
    for (uint32_t i = 0; i < count && !err; ) {
        uint32_t n = 0;

        for (; n < GROUP && i < count && !err; n++, i++)
            err = to_row(scope, keys + (size_t)i * key, values + (size_t)i * VALUE,
                         &rows[n].peer);
        if (!err)
            err = sink(context, rows, owners, n);
    }
    return err;
}

/* Read a whole map into a sink. 0; -EINTR: entries came and went meanwhile, what was fed
 * must be forgotten; another negative errno. `room` has FDP_RX_SIZE bytes. */
static int dump(const struct fdp_scope *scope, uint8_t *room, fdp_sink sink, void *context)
{
    uint8_t *values = room + (size_t)BATCH * key_size(scope->family);
    struct fdp_map_reading reading = {0};
    int more = 1;

    while (more == 1) {
        uint32_t count = BATCH;

        more = fdp_map_read((int)scope->ifindex, &reading, room, values, &count);
        if (more >= 0) {
            int err = feed(scope, room, values, count, sink, context);
            if (err)
                return err;
        }
    }
    return more;
}

/* Gather ops of one kind, from `from` on: how many. */
static uint32_t gather(const struct fdp_job *job, uint32_t from, uint32_t to, uint8_t *keys,
                       uint8_t *values)
{
    uint32_t count = 0;
    int removal = job->ops[from].kind == FDP_REMOVE;

    for (uint32_t i = from; i < to && count < BATCH; i++, count++) {
        if ((job->ops[i].kind == FDP_REMOVE) != removal)
            break;
        const struct fdp_peer *peer = fdp_job_row(job, &job->ops[i]);
        to_key(peer, keys);
        keys += key_size(peer->family);
        if (!removal) {
            memcpy(values, peer->endpoint, VALUE);
            values += VALUE;
        }
        job->results[i] = 0;
    }
    return count;
}

static const char *words(int error)
{
    switch (error) {
    case E2BIG:
    case ENOSPC:
        return "the map of peers is full";
    case ENOMEM:
        return "the kernel has no memory for an entry";
    default:
        return "";
    }
}

/* Write ops[from..to), all of one map, and note what became of each. 0, or -EPERM. */
static int apply(struct fdp_socket *sock, struct fdp_job *job, uint32_t from, uint32_t to)
{
    while (from < to) {
        const struct fdp_peer *first = fdp_job_row(job, &job->ops[from]);
        const int map = (int)first->map, removal = job->ops[from].kind == FDP_REMOVE;
        uint32_t count = gather(job, from, to, sock->tx, sock->rx), done = count;
        int err = removal ? fdp_map_delete_many(map, sock->tx, &done)
                          : fdp_map_update_many(map, sock->tx, sock->rx, &done);

        sock->messages_sent += done;
        sock->batches_sent++;
        from += done;
        if (err == -EPERM && !done)
            return -EPERM;
        if (err && done < count) /* that one could not be; go on behind it */
            fdp_note_failure(job, from++, -err, words(-err));
    }
    return 0;
}

const struct fdp_kind_ops fdp_peer_ops = {
    .dump = dump,
    .apply = apply,
};
