/* SPDX-License-Identifier: Apache-2.0 */
#include "events.h"

#include "kinds.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/fib_rules.h>
#include <linux/filter.h>
#include <linux/if_addr.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/nexthop.h>
#include <linux/rtnetlink.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- the filter ---------------------------------------------------------
 *
 * Classic BPF over the datagram, which is one netlink message. Loads are in network
 * order, so constants in host order are swapped. Every test is "equal: accept (or
 * drop) now, else go on", so that jumps stay short; a block of tests per kind of
 * message is jumped over by its head. */

enum { ROOM = 384, ACCEPT = -1, DROP = 0 };

struct program {
    struct sock_filter code[ROOM];
    uint16_t size;
};

static void add(struct program *program, uint16_t code, uint32_t k, uint8_t jt, uint8_t jf)
{
    if (program->size < ROOM)
        program->code[program->size++] = (struct sock_filter){code, jt, jf, k};
}

static void load(struct program *program, uint16_t width, uint32_t offset)
{
    add(program, BPF_LD | width | BPF_ABS, offset, 0, 0);
}

/* The verdict where the accumulator equals k. */
static void decide(struct program *program, uint32_t k, int verdict)
{
    add(program, BPF_JMP | BPF_JEQ | BPF_K, k, 0, 1);
    add(program, BPF_RET | BPF_K, (uint32_t)verdict, 0, 0);
}

static void decide_each(struct program *program, const uint32_t *numbers, uint32_t count,
                        int verdict)
{
    for (uint32_t i = 0; i < count; i++)
        decide(program, htonl(numbers[i]), verdict);
}

/* Begin a block for two types of messages; end() makes all others jump over it. */
static uint16_t begin(struct program *program, uint16_t a, uint16_t b)
{
    load(program, BPF_H, offsetof(struct nlmsghdr, nlmsg_type));
    add(program, BPF_JMP | BPF_JEQ | BPF_K, htons(a), 1, 0);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, htons(b), 0, 0);
    return (uint16_t)(program->size - 1);
}

static void end(struct program *program, uint16_t head)
{
    add(program, BPF_RET | BPF_K, DROP, 0, 0);
    program->code[head].jf = (uint8_t)(program->size - head - 1);
}

static void drop_own(struct program *program, const struct fdp_filter *filter)
{
    load(program, BPF_W, offsetof(struct nlmsghdr, nlmsg_pid));
    decide_each(program, filter->ports, filter->port_count, DROP);
}

/* Put where attribute `type` starts into X, and skip `skip` instructions where there
 * is none. */
static void find_attribute(struct program *program, uint32_t start, uint32_t type, uint8_t skip)
{
    add(program, BPF_LDX | BPF_IMM, type, 0, 0);
    add(program, BPF_LD | BPF_IMM, start, 0, 0);
    add(program, BPF_LD | BPF_W | BPF_ABS, (uint32_t)(SKF_AD_OFF + SKF_AD_NLATTR), 0, 0);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, 0, (uint8_t)(skip + 1), 0);
    add(program, BPF_MISC | BPF_TAX, 0, 0, 0);
}

enum {
    BODY = NLMSG_HDRLEN,
    ROUTE_ATTRIBUTES = BODY + NLMSG_ALIGN(sizeof(struct rtmsg)),
    NEXTHOP_ATTRIBUTES = BODY + NLMSG_ALIGN(sizeof(struct nhmsg)),
    ADDRESS_ATTRIBUTES = BODY + NLMSG_ALIGN(sizeof(struct ifaddrmsg)),
};

/* Accept what is about a prefix or an address inside the network of one family: attribute
 * `type` of those from `start` on. Both headers begin with the family; `whole` is where the
 * length of a prefix is, which has to be inside as a whole, 0 for an address. */
static void accept_within(struct program *program, const struct fdp_filter *filter, int six,
                          uint32_t start, uint32_t type, uint32_t whole)
{
    const uint8_t length = filter->length[six], words = (uint8_t)((length + 31) / 32);

    if (!filter->has[six])
        return;
    load(program, BPF_B, BODY);
    add(program, BPF_JMP | BPF_JEQ | BPF_K, six ? AF_INET6 : AF_INET, 0,
        (uint8_t)((whole ? 8 : 6) + 3 * words));
    if (whole) {
        load(program, BPF_B, whole);
        add(program, BPF_JMP | BPF_JGE | BPF_K, length, 0, (uint8_t)(6 + 3 * words));
    }
    find_attribute(program, start, type, (uint8_t)(3 * words + 1));
    for (uint8_t i = 0; i < words; i++) {
        const uint32_t bits = length - 32u * i;
        const uint32_t mask = bits >= 32 ? UINT32_MAX : ~(UINT32_MAX >> bits);
        uint32_t want;

        memcpy(&want, filter->prefix[six] + 4 * i, sizeof want);
        add(program, BPF_LD | BPF_W | BPF_IND, sizeof(struct nlattr) + 4u * i, 0, 0);
        add(program, BPF_ALU | BPF_AND | BPF_K, mask, 0, 0);
        add(program, BPF_JMP | BPF_JEQ | BPF_K, ntohl(want) & mask, 0,
            (uint8_t)(3 * (words - i - 1) + 1));
    }
    add(program, BPF_RET | BPF_K, (uint32_t)ACCEPT, 0, 0);
}

static void routes(struct program *program, const struct fdp_filter *filter)
{
    const uint16_t head = begin(program, RTM_NEWROUTE, RTM_DELROUTE);

    drop_own(program, filter);
    load(program, BPF_B, BODY + offsetof(struct rtmsg, rtm_protocol));
    decide(program, filter->protocol, ACCEPT);
    decide(program, RTPROT_KERNEL, DROP);
    decide(program, RTPROT_RA, DROP);
    if (filter->tunnel_count) {
        find_attribute(program, ROUTE_ATTRIBUTES, RTA_OIF,
                       (uint8_t)(1 + 2 * filter->tunnel_count));
        add(program, BPF_LD | BPF_W | BPF_IND, sizeof(struct nlattr), 0, 0);
        decide_each(program, filter->tunnels, filter->tunnel_count, ACCEPT);
    }
    for (int six = 0; six < 2; six++)
        accept_within(program, filter, six, ROUTE_ATTRIBUTES, RTA_DST,
                      BODY + offsetof(struct rtmsg, rtm_dst_len));
    end(program, head);
}

/* Routes of other tables, which policy rules may have looked up before ours: those that hold
 * all addresses or half of them, and those into a network of ours. */
static void other_tables(struct program *program, const struct fdp_filter *filter)
{
    const uint16_t head = begin(program, RTM_NEWROUTE, RTM_DELROUTE);

    load(program, BPF_B, BODY + offsetof(struct rtmsg, rtm_table));
    const uint16_t main_table = program->size;
    add(program, BPF_JMP | BPF_JEQ | BPF_K, RT_TABLE_MAIN, 0, 0);
    decide(program, RT_TABLE_LOCAL, DROP);
    load(program, BPF_B, BODY + offsetof(struct rtmsg, rtm_dst_len));
    decide(program, 0, ACCEPT);
    decide(program, 1, ACCEPT);
    for (int six = 0; six < 2; six++)
        accept_within(program, filter, six, ROUTE_ATTRIBUTES, RTA_DST,
                      BODY + offsetof(struct rtmsg, rtm_dst_len));
    end(program, head);
    program->code[main_table].jt = (uint8_t)(program->size - main_table - 1);
}

static void rules(struct program *program)
{
    begin(program, RTM_NEWRULE, RTM_DELRULE);
    add(program, BPF_RET | BPF_K, (uint32_t)ACCEPT, 0, 0);
    program->code[program->size - 2].jf = 1;
}

static void neighbours(struct program *program, const struct fdp_filter *filter)
{
    const uint16_t head = begin(program, RTM_NEWNEIGH, RTM_DELNEIGH);

    drop_own(program, filter);
    load(program, BPF_W, BODY + offsetof(struct ndmsg, ndm_ifindex));
    decide_each(program, filter->tunnels, filter->tunnel_count, ACCEPT);
    end(program, head);
}

static void nexthops(struct program *program, const struct fdp_filter *filter)
{
    const uint16_t head = begin(program, RTM_NEWNEXTHOP, RTM_DELNEXTHOP);
    const uint32_t top = (uint32_t)filter->id_nibble << 28;

    drop_own(program, filter);
    load(program, BPF_B, BODY + offsetof(struct nhmsg, nh_protocol));
    decide(program, filter->protocol, ACCEPT);
    find_attribute(program, NEXTHOP_ATTRIBUTES, NHA_ID, 4);
    add(program, BPF_LD | BPF_W | BPF_IND, sizeof(struct nlattr), 0, 0);
    add(program, BPF_ALU | BPF_AND | BPF_K, htonl(0xf0000000), 0, 0);
    decide(program, htonl(top), ACCEPT);
    end(program, head);
}

static void devices(struct program *program, const struct fdp_filter *filter, uint16_t a,
                    uint16_t b, uint32_t where)
{
    const uint16_t head = begin(program, a, b);

    if (filter->every_link) {
        add(program, BPF_RET | BPF_K, (uint32_t)ACCEPT, 0, 0);
    } else {
        load(program, BPF_W, BODY + where);
        decide_each(program, filter->tunnels, filter->tunnel_count, ACCEPT);
        decide_each(program, filter->uplinks, filter->uplink_count, ACCEPT);
    }
    if (a == RTM_NEWADDR && !filter->every_link) {
        /* A device with a peer's address stands in the peer's way (of an IPv4 address
         * IFA_ADDRESS may be the other end's). */
        accept_within(program, filter, 0, ADDRESS_ATTRIBUTES, IFA_LOCAL, 0);
        accept_within(program, filter, 1, ADDRESS_ATTRIBUTES, IFA_ADDRESS, 0);
    }
    end(program, head);
}

static void programs(struct program *program, const struct fdp_filter *filter, uint16_t a,
                     uint16_t b)
{
    const uint16_t head = begin(program, a, b);

    load(program, BPF_W, BODY + offsetof(struct tcmsg, tcm_ifindex));
    decide_each(program, filter->tunnels, filter->tunnel_count, ACCEPT);
    end(program, head);
}

int fdp_events_filter(int fd, const struct fdp_filter *filter)
{
    struct program program = {.size = 0};

    other_tables(&program, filter);
    routes(&program, filter);
    rules(&program);
    neighbours(&program, filter);
    nexthops(&program, filter);
    devices(&program, filter, RTM_NEWLINK, RTM_DELLINK, offsetof(struct ifinfomsg, ifi_index));
    devices(&program, filter, RTM_NEWADDR, RTM_DELADDR, offsetof(struct ifaddrmsg, ifa_index));
    if (filter->programs) {
        programs(&program, filter, RTM_NEWTFILTER, RTM_DELTFILTER);
        programs(&program, filter, RTM_NEWQDISC, RTM_DELQDISC);
    }
    add(&program, BPF_RET | BPF_K, DROP, 0, 0);
    struct sock_fprog attached = {program.size, program.code};
    if (program.size >= ROOM)
        return -E2BIG;
    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &attached, sizeof attached) < 0 ? -errno
                                                                                       : 0;
}

/* ---- the socket --------------------------------------------------------- */

struct asked {
    const struct fdp_filter *filter;
    int rcvbuf;
};

static int set_up(int fd, const void *argument)
{
    static const int groups[] = {RTNLGRP_LINK, RTNLGRP_NEIGH, RTNLGRP_IPV4_IFADDR,
                                 RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE,
                                 RTNLGRP_NEXTHOP, RTNLGRP_TC, RTNLGRP_IPV4_RULE,
                                 RTNLGRP_IPV6_RULE};
    const struct asked *asked = argument;
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};

    /* Half of what is set here is for the kernel's own bookkeeping. */
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &asked->rcvbuf, sizeof asked->rcvbuf) < 0 &&
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &asked->rcvbuf, sizeof asked->rcvbuf) < 0)
        return -errno;
    int err = fdp_events_filter(fd, asked->filter);
    if (err)
        return err;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return -errno;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
        if (setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &groups[i], sizeof *groups) < 0 &&
            groups[i] != RTNLGRP_NEXTHOP) /* before Linux 5.3 there are none */
            return -errno;
    return fd;
}

int fdp_events_open(int netns_fd, int rcvbuf, const struct fdp_filter *filter)
{
    const struct asked asked = {filter, rcvbuf};

    return fdp_open_with(netns_fd, set_up, &asked);
}

/* ---- comparison with what is wanted --------------------------------------- */

/* Classify a row by the scopes: ours where one of them says so. */
static int judge(const struct fdp_watched *watched, const struct fdp_message *message,
                 union fdp_row *row)
{
    int best = FDP_SKIP;

    for (uint32_t i = 0; i < watched->scope_count; i++) {
        const struct fdp_scope *scope = &watched->scopes[i];
        union fdp_row found;
        int owner = fdp_decode(scope, message, &found);

        if (owner < 0)
            return owner;
        /* A dump of one device holds only routes of that device. Of a route in an event,
         * only its attribute says that, and where the nexthop object alone is named
         * (nexthop_compat_mode=0), our mark has to. */
        if (owner == FDP_OURS && scope->kind == FDP_ROUTE && scope->ifindex &&
            found.route.nexthop && found.route.protocol != scope->protocol &&
            !fdp_route_names_device(message))
            owner = FDP_FOREIGN;
        if (owner != FDP_SKIP && (best == FDP_SKIP || owner == FDP_OURS)) {
            memcpy(row, &found, sizeof *row);
            best = owner;
        }
        if (best == FDP_OURS)
            break;
    }
    return best;
}

/* The part of a tag that says which program it was; programs beyond the first are not known. */
static uint32_t author(struct fdp_watched *watched, uint32_t port)
{
    uint32_t number = 0;

    while (number < watched->port_count && watched->ports[number] != port)
        number++;
    if (!port || number == FDP_AUTHORS)
        return 0;
    if (number == watched->port_count)
        watched->ports[watched->port_count++] = port;
    return (number + 1) << 3;
}

int fdp_watch_message(struct fdp_watched *watched, const struct fdp_message *message)
{
    const struct fdp_layout *layout = watched->desired->layout;
    struct fdp_message told = *message;
    const int gone = message->type == fdp_kinds[watched->desired->kind]->message + 1;
    union fdp_row row;

    if (gone)
        told.type = (uint16_t)(message->type - 1);
    int owner = judge(watched, &told, &row);
    if (owner <= 0)
        return owner;
    watched->events++;
    int64_t at = fdp_table_find(watched->desired, &row);
    if (gone ? at < 0 : (at < 0 && owner != FDP_OURS)) {
        /* Not wanted and gone, or not wanted and not ours: no business of ours. */
        fdp_table_remove(watched->touched, &row);
        return 1;
    }
    if (!gone && at >= 0 && (owner == FDP_OURS || owner == FDP_SHARED)) {
        const uint8_t *want = fdp_table_row(watched->desired, (uint32_t)at);

        if (!memcmp(want + layout->key, row.bytes + layout->key, layout->value)) {
            fdp_table_remove(watched->touched, &row);
            return 1;
        }
    }
    uint32_t who = author(watched, message->port);
    if (!who) { /* a neighbour is deleted in two steps, and only the event of the first has it */
        at = fdp_table_find(watched->touched, &row);
        if (at >= 0)
            who = *fdp_row_tag(layout, fdp_table_row(watched->touched, (uint32_t)at)) & ~3u;
    }
    *fdp_row_tag(layout, &row) = (gone ? FDP_SKIP : (uint32_t)owner) | who;
    int err = fdp_table_put(watched->touched, &row);
    return err < 0 ? err : 1;
}

int fdp_watch_orphans(const struct fdp_watched *nexthops, struct fdp_watched *routes)
{
    const struct fdp_table *gone = nexthops->touched;

    for (uint32_t i = 0; gone->count && i < routes->desired->count; i++) {
        union fdp_row row, key = {.bytes = {0}};

        memcpy(&row, fdp_table_row(routes->desired, i), routes->desired->layout->row);
        key.nexthop.id = row.route.nexthop;
        int64_t at = row.route.nexthop ? fdp_table_find(gone, &key) : -1;
        if (at < 0)
            continue;
        const uint32_t tag = *fdp_row_tag(gone->layout, fdp_table_row(gone, (uint32_t)at));
        if (fdp_touched_owner(tag) != FDP_SKIP)
            continue;
        if (fdp_table_find(routes->touched, &row) >= 0)
            continue; /* more is known already */
        *fdp_row_tag(routes->desired->layout, &row) =
            FDP_SKIP | author(routes, fdp_touched_port(nexthops->ports, tag));
        int err = fdp_table_put(routes->touched, &row);
        if (err < 0)
            return err;
    }
    return 0;
}

/* ---- reading ----------------------------------------------------------------- */

/* Whether a message is about no table of ours: about devices, or about the path that packets
 * take before they reach our routes. */
static int is_for_caller(const struct fdp_message *message)
{
    const struct rtmsg *route = (const void *)message->body;

    switch (message->type) {
    case RTM_NEWROUTE:
    case RTM_DELROUTE:
        return message->size >= sizeof *route && route->rtm_table != RT_TABLE_MAIN;
    case RTM_NEWRULE:
    case RTM_DELRULE:
    case RTM_NEWLINK:
    case RTM_DELLINK:
    case RTM_NEWADDR:
    case RTM_DELADDR:
    case RTM_NEWTFILTER:
    case RTM_DELTFILTER:
    case RTM_NEWQDISC:
    case RTM_DELQDISC:
        return 1;
    default:
        return 0;
    }
}

static int take(const uint8_t *page, size_t size, struct fdp_watched *watched, uint32_t count,
                fdp_link_sink sink, void *context)
{
    const uint8_t *at = page, *last = page + size;
    struct fdp_message message;
    int more, err = 0;

    while (!err && (more = fdp_next_message(&at, last, &message)) > 0) {
        if (is_for_caller(&message)) {
            err = sink(context, &message);
            continue;
        }
        for (uint32_t i = 0; !err && i < count; i++) {
            int result = fdp_watch_message(&watched[i], &message);

            err = result < 0 ? result : 0;
        }
    }
    return err;
}

int fdp_events_read(int fd, uint8_t *page, size_t room, struct fdp_watched *watched,
                    uint32_t count, uint32_t most, fdp_link_sink sink, void *context)
{
    uint32_t done;

    for (done = 0; done < most; done++) {
        struct sockaddr_nl from = {0};
        struct iovec into = {page, room};
        struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from,
                                 .msg_iov = &into, .msg_iovlen = 1};
        ssize_t got = recvmsg(fd, &message, MSG_DONTWAIT);

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? (int)done : -errno;
        if (message.msg_namelen != sizeof from || from.nl_pid != 0)
            continue; /* any process may write to our port */
        if (message.msg_flags & MSG_TRUNC)
            return -ENOBUFS;
        int err = take(page, (size_t)got, watched, count, sink, context);
        if (err)
            return err == -EBADMSG ? -ENOBUFS : err; /* what it said is not known either */
    }
    return (int)done;
}
