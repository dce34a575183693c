/* SPDX-License-Identifier: Apache-2.0
 *
 * Tables of any kind (enum fdp_kind) to and from the kernel: dump requests filtered in the
 * kernel, a bounds-checked decoder, a page-filling encoder, and a socket that
 * sends batches and knows of every message whether it took effect. What differs from
 * kind to kind is in kinds.h.
 *
 * No function allocates; buffers belong to the caller. All results are 0 or
 * more for success, a negative errno for failure.
 */
#ifndef FDP_RTNL_H
#define FDP_RTNL_H

#include "job.h"
#include "table.h"

#define FDP_BATCH 128         /* messages per sendmsg(); 256 replies fill a default rcvbuf */
#define FDP_MESSAGE_MAX 160   /* no message of ours is longer */
#define FDP_TX_SIZE (FDP_BATCH * FDP_MESSAGE_MAX)
#define FDP_RX_SIZE (64 * 1024)
#define FDP_DUMP_PAGE (32 * 1024) /* the kernel's are not larger (netlink_recvmsg()) */

/* Which part of a kernel table is read, and what in it is ours. */
struct fdp_scope {
    uint8_t kind;      /* enum fdp_kind */
    uint8_t family;    /* AF_INET, AF_INET6 (AF_BRIDGE is implied for the fdb) */
    uint8_t protocol;  /* routes and nexthops: our mark; 0 = any mark is ours */
    uint8_t exclusive; /* everything on the device is ours, whatever its mark */
    uint8_t marked;    /* ask the kernel for entries of our mark only (routes) */
    uint8_t length;    /* routes: only inside prefix/length can be ours */
    uint8_t type;      /* routes: only of this type (RTN_BLACKHOLE, ..); 0 = any */
    uint8_t owner;     /* FDB: enum fdp_fdb_owner */
    uint8_t sides;     /* FDB: bits of enum fdp_place; 0 = FDP_SELF */
    uint8_t pad[3];
    uint32_t ifindex;  /* ask the kernel for this device only; 0 = all; peers: the map */
    uint32_t table;    /* routes: routing table */
    uint32_t id_first, id_last; /* nexthops: our range of ids; any FDB: of source VNIs */
    uint8_t prefix[16];
};

/* Which entries of an FDB are ours. What the kernel learned by itself never is, nor a device's
 * and a bridge's own addresses. */
enum fdp_fdb_owner {
    FDP_ALL_FDB = 0,
    FDP_PLAIN_FDB = 1,   /* no lists, and without flags */
    FDP_LEARNED_FDB = 2, /* with NTF_EXT_LEARNED */
};

/* One netlink message, as found by fdp_next_message(). */
struct fdp_message {
    uint16_t type, flags;
    uint32_t seq;
    uint32_t port;       /* of the socket that asked for it; in an event 0 where none is named */
    const uint8_t *body; /* after the header */
    uint32_t size;       /* of body */
};

/* Take the next message of a received buffer. 1 taken, 0 at the end,
 * -EBADMSG when the rest is not a whole message. */
int fdp_next_message(const uint8_t **at, const uint8_t *end, struct fdp_message *message);

/* Write the dump request of a scope. Length, at most FDP_MESSAGE_MAX; here and below 0
 * where rtnetlink has no such request (peers are in a BPF map). */
size_t fdp_encode_dump(const struct fdp_scope *scope, uint32_t seq, uint8_t *to);

/* Write the request for the one entry with this row's key (not for routes). The
 * acknowledgement ends the answer where the entry is none of the scope's. */
size_t fdp_encode_get(enum fdp_kind kind, const void *row, uint32_t seq, uint8_t *to);

/* Read one kernel object. enum fdp_owner, or -EBADMSG. */
int fdp_decode(const struct fdp_scope *scope, const struct fdp_message *message,
               union fdp_row *row);

/* Whether a route message names the device that the route leads out of. */
int fdp_route_names_device(const struct fdp_message *message);

/* Read one route of a whole table as the kernel would send it for each of `count` scopes of one
 * family: owners[i] is FDP_SKIP for a scope that the route is not in. 1 where it is in any, 0,
 * -EBADMSG; -ENODATA where the message does not say which device the route leads out of. */
int fdp_route_sort(const struct fdp_scope *scopes, uint32_t count,
                   const struct fdp_message *message, struct fdp_route *row, uint8_t *owners);

/* Whether a route carries one of these protocols, and does not lead out of one of these devices
 * alone. 1, 0, or -EBADMSG. */
int fdp_route_is_written(const struct fdp_message *message, const uint8_t *protocols, size_t size,
                         const uint32_t *devices, size_t count);

struct fdp_socket {
    int fd;
    uint32_t seq;    /* last used */
    uint8_t *rx;     /* FDP_RX_SIZE */
    uint8_t *tx;     /* FDP_TX_SIZE */
    uint64_t messages_sent, batches_sent, overruns, recv_ns;
    char text[160];  /* the kernel's words on the last failing request */
};

/* Open and set up a NETLINK_ROUTE socket in the namespace of `netns_fd`
 * (-1: the caller's), on a thread of its own, so that the caller's namespace
 * never changes. `rcvbuf` 0 keeps the default. Descriptor or negative errno. */
int fdp_open(int netns_fd, int rcvbuf);

/* The same for a socket that is set up in another way: `set_up` returns it or a
 * negative errno. */
typedef int (*fdp_set_up)(int fd, const void *argument);
int fdp_open_with(int netns_fd, fdp_set_up set_up, const void *argument);

/* The netlink port of a socket: what the kernel names as the author of its changes. */
uint32_t fdp_port(int fd);

/* Rows come in groups, each with its owner. 0, or a negative errno to stop. */
typedef int (*fdp_sink)(void *context, const union fdp_row *rows, const uint8_t *owners,
                        uint32_t count);

/* Hand the rows of one page of messages to a sink; `interrupted` is set where the
 * kernel says that the dump was. 1: go on, 0: the dump is complete, or negative. */
int fdp_take_page(struct fdp_socket *sock, const struct fdp_scope *scope, const uint8_t *page,
                  size_t size, fdp_sink sink, void *context, int *interrupted);

/* Dump a scope into a sink. 0; -EINTR: the kernel says the dump was
 * interrupted, what was fed must be forgotten; -ENOBUFS, -EOPNOTSUPP, ... */
int fdp_dump(struct fdp_socket *sock, const struct fdp_scope *scope, fdp_sink sink, void *context);

/* The pages of a dump, kept as they came. */
struct fdp_pages {
    uint8_t *data;
    size_t used, room;
    size_t expected; /* about so much will come */
    size_t most;  /* more than this is not kept: used is 0 then */
    uint32_t seq; /* of the request they answer */
    uint8_t stops;       /* at more than `most` with -E2BIG, in the middle of the dump */
    uint8_t interrupted; /* the kernel says that the dump was */
};

/* Receive a whole dump and decode none of it: for a thread that waits for the
 * kernel while another one works out what to compare it with. 0 or negative. */
int fdp_fetch(struct fdp_socket *sock, const struct fdp_scope *scope, struct fdp_pages *pages,
              fdp_realloc_fn realloc);

/* What fdp_dump() would have done, from kept pages. */
int fdp_replay(const struct fdp_pages *pages, const struct fdp_scope *scope, fdp_sink sink,
               void *context);

/* What fdp_dump() of each of FDP_SCOPES scopes at most would have done, from the pages of a whole
 * routing table: each route is decoded once. Or -ENODATA as fdp_route_sort(). */
enum { FDP_SCOPES = 32 };
int fdp_replay_routes(const struct fdp_pages *pages, const struct fdp_scope *scopes,
                      uint32_t count, fdp_sink sink, void *context);

/* Ask for one entry. 1 found, 0 not there. */
int fdp_get(struct fdp_socket *sock, const struct fdp_scope *scope, const void *key,
            union fdp_row *row);

/* Ask for the entries with the keys of `table`, many at a time, and hand those that exist
 * to the sink (not for routes). 0 or negative. Dumping a vxlan FDB costs the square
 * of its size (the kernel walks it from the start for every page); this does not. */
int fdp_look_up(struct fdp_socket *sock, const struct fdp_scope *scope,
                const struct fdp_table *table, fdp_sink sink, void *context);

/* Send ops[from..to) and wait until the kernel has answered for all of them.
 * 0 when every op has a result; -EPERM at once when nothing is permitted. */
int fdp_apply(struct fdp_socket *sock, struct fdp_job *job, uint32_t from, uint32_t to);

#endif
