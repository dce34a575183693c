/* SPDX-License-Identifier: Apache-2.0
 *
 * What other programs do to the tables: a socket that gets the kernel's events, behind
 * a filter in the kernel, and the comparison of events with desired tables.
 *
 * No function allocates but through the tables' own realloc function.
 */
#ifndef FDP_EVENTS_H
#define FDP_EVENTS_H

#include "rtnl.h"

#define FDP_FILTER_DEVICES 8
#define FDP_FILTER_PORTS 4
#define FDP_AUTHORS 16

/* What the kernel lets through. Everything else costs its author some instructions,
 * and us nothing. */
struct fdp_filter {
    uint32_t tunnels[FDP_FILTER_DEVICES]; /* our vxlan devices: all that is on them */
    uint32_t uplinks[FDP_FILTER_DEVICES]; /* devices of others: their state and addresses */
    uint32_t ports[FDP_FILTER_PORTS];     /* netlink ports that are ours: what they wrote */
    uint32_t tunnel_count, uplink_count, port_count;
    uint8_t programs;   /* filters and qdiscs of the tunnels, too: programs of ours are there */
    uint8_t every_link; /* all devices and addresses: one that we need is not there */
    uint8_t protocol;   /* our mark on routes and nexthops */
    uint8_t id_nibble;  /* the top four bits of ids of our nexthops */
    uint8_t length[2];  /* routes into these prefixes may conflict with ours; IPv4, IPv6 */
    uint8_t has[2];
    uint8_t prefix[2][16];
};

/* Open a socket in the namespace of `netns_fd` (-1: the caller's), filter attached,
 * with room for `rcvbuf` bytes (past the system's limit where that is permitted),
 * and join the groups. Descriptor or negative errno. */
int fdp_events_open(int netns_fd, int rcvbuf, const struct fdp_filter *filter);

/* Exchange the filter: no event is lost meanwhile. 0 or negative errno. */
int fdp_events_filter(int fd, const struct fdp_filter *filter);

/* A table that events are compared with. `touched` is a table of the same kind that
 * holds, for each key about which the kernel and `desired` may disagree, what the
 * kernel last said of it. Its tag has an enum fdp_owner (FDP_SKIP for "gone") and, by its
 * number in `ports`, the netlink port of the program that asked the kernel for the change. */
struct fdp_watched {
    const struct fdp_table *desired;
    const struct fdp_scope *scopes;
    uint32_t scope_count;
    struct fdp_table *touched;
    uint64_t events; /* seen so far, echoes included */
    uint32_t ports[FDP_AUTHORS], port_count;
};

/* The parts of the tag of a touched row; fdp_touched_port() is 0 where the event named no port
 * (the kernel's own doing, and all events about FDB entries), or one of too many. */
static inline enum fdp_owner fdp_touched_owner(uint32_t tag)
{
    return (enum fdp_owner)(tag & 7);
}

static inline uint32_t fdp_touched_port(const uint32_t *ports, uint32_t tag)
{
    return tag >> 3 ? ports[(tag >> 3) - 1] : 0;
}

/* Take one message. 1: it was about this table, 0: it was not; -EBADMSG, -ENOMEM. */
int fdp_watch_message(struct fdp_watched *watched, const struct fdp_message *message);

/* A message about a device, an address, a policy rule or a route of another table than main: for
 * the caller. Nonzero stops the reading. */
typedef int (*fdp_link_sink)(void *context, const struct fdp_message *message);

/* Read what has come, `most` datagrams at most, without waiting. The number read, or
 * negative: -ENOBUFS when the kernel had to drop some: then nothing is known. */
int fdp_events_read(int fd, uint8_t *page, size_t room, struct fdp_watched *watched,
                    uint32_t count, uint32_t most, fdp_link_sink sink, void *context);

/* The kernel removes the IPv4 routes of a nexthop object with it without an
 * event: mark as gone the routes that use nexthops which are gone. 0 or -ENOMEM. */
int fdp_watch_orphans(const struct fdp_watched *nexthops, struct fdp_watched *routes);

#endif
