/* SPDX-License-Identifier: Apache-2.0
 *
 * What flanneld asks of the kernel for each peer, from plain C: no Go runtime, no
 * retries, no logging, no event queue. It is faster than flanneld, and slower than
 * need be in just the ways that flanneld's requests are.
 *
 *   flannel vxlan FILE DEVICE     ARP, FDB, route: three requests a peer
 *   flannel host-gw FILE DEVICE   list, list, route, list: four requests a peer
 *
 * FILE has a line for each peer: "10.244.7.0/24 10.244.7.0 02:..:07 192.0.2.7", the
 * subnet, the gateway of its route, its MAC and where it is. The program works in the
 * network namespace that it is started in.
 *
 * Order, flags and attributes are those of pkg/backend/vxlan (vxlan_network.go,
 * device.go) and pkg/backend/route_network.go. Each request has a socket of its own,
 * one message, one send and an acknowledgement that is waited for, as the package
 * functions of github.com/vishvananda/netlink do it: socket, bind, sendto,
 * getsockname, recvfrom, close. For host-gw, routeAdd lists the routes of the family
 * three times to look at those of one destination; the kernel sends all, and the
 * program picks.
 *
 * Prints one JSON object; "ns" is the time on CLOCK_MONOTONIC for all peers. Any
 * error of the kernel ends the program with status 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PAGE (64 * 1024) /* as the Go library's receive buffer */
#define WRITE (NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE)

struct peer {
    uint8_t family, length;
    uint8_t subnet[16], gateway[16], endpoint[16];
    uint8_t mac[6];
};

struct request {
    struct nlmsghdr head;
    uint8_t body[256];
};

static uint8_t page[PAGE] __attribute__((aligned(8)));
static uint32_t sequence;
static uint64_t requests, listed;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list list;

    va_start(list, format);
    fputs("flannel: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(1);
}

static size_t width(const struct peer *peer)
{
    return peer->family == AF_INET ? 4 : 16;
}

/* --- requests ------------------------------------------------------------------- */

static void *start(struct request *request, uint16_t type, uint16_t flags, size_t header)
{
    memset(request, 0, sizeof *request);
    request->head.nlmsg_len = (uint32_t)NLMSG_LENGTH(header);
    request->head.nlmsg_type = type;
    request->head.nlmsg_flags = flags;
    return request->body;
}

static void attribute(struct request *request, uint16_t type, const void *data, size_t size)
{
    struct rtattr *at = (struct rtattr *)((uint8_t *)request + NLMSG_ALIGN(request->head.nlmsg_len));

    at->rta_type = type;
    at->rta_len = (uint16_t)RTA_LENGTH(size);
    memcpy(RTA_DATA(at), data, size);
    request->head.nlmsg_len = (uint32_t)(NLMSG_ALIGN(request->head.nlmsg_len) + RTA_ALIGN(at->rta_len));
}

static void neighbour(struct request *request, const struct peer *peer, int device)
{
    struct ndmsg *body = start(request, RTM_NEWNEIGH, WRITE | NLM_F_REPLACE, sizeof *body);

    body->ndm_family = peer->family;
    body->ndm_ifindex = device;
    body->ndm_state = NUD_PERMANENT;
    body->ndm_type = RTN_UNICAST;
    attribute(request, NDA_DST, peer->gateway, width(peer));
    attribute(request, NDA_LLADDR, peer->mac, sizeof peer->mac);
}

static void forwarding(struct request *request, const struct peer *peer, int device)
{
    struct ndmsg *body = start(request, RTM_NEWNEIGH, WRITE | NLM_F_REPLACE, sizeof *body);

    body->ndm_family = AF_BRIDGE;
    body->ndm_ifindex = device;
    body->ndm_state = NUD_PERMANENT;
    body->ndm_flags = NTF_SELF;
    attribute(request, NDA_DST, peer->endpoint, width(peer));
    attribute(request, NDA_LLADDR, peer->mac, sizeof peer->mac);
}

static void route(struct request *request, const struct peer *peer, int device, uint16_t how,
                  uint32_t flags)
{
    struct rtmsg *body = start(request, RTM_NEWROUTE, (uint16_t)(WRITE | how), sizeof *body);
    uint32_t index = (uint32_t)device;

    body->rtm_family = peer->family;
    body->rtm_dst_len = peer->length;
    body->rtm_table = RT_TABLE_MAIN;
    body->rtm_protocol = RTPROT_BOOT;
    body->rtm_scope = RT_SCOPE_UNIVERSE;
    body->rtm_type = RTN_UNICAST;
    body->rtm_flags = flags;
    attribute(request, RTA_DST, peer->subnet, width(peer));
    attribute(request, RTA_GATEWAY, peer->gateway, width(peer));
    attribute(request, RTA_OIF, &index, sizeof index);
}

/* --- one request, one socket ------------------------------------------------------ */

static int ask(struct request *request)
{
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};
    socklen_t size = sizeof address;
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);

    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("socket: %s", strerror(errno));
    request->head.nlmsg_seq = ++sequence;
    requests++;
    if (sendto(fd, request, request->head.nlmsg_len, 0, (struct sockaddr *)&address,
               sizeof address) < 0)
        fail("send: %s", strerror(errno));
    if (getsockname(fd, (struct sockaddr *)&address, &size) < 0)
        fail("getsockname: %s", strerror(errno));
    return fd;
}

static size_t answer(int fd)
{
    struct sockaddr_nl from;
    socklen_t size = sizeof from;
    ssize_t got = recvfrom(fd, page, sizeof page, 0, (struct sockaddr *)&from, &size);

    if (got < (ssize_t)sizeof(struct nlmsghdr))
        fail("receive: %s", got < 0 ? strerror(errno) : "too short");
    return (size_t)got;
}

static void write_one(struct request *request, const char *what)
{
    int fd = ask(request);
    const struct nlmsghdr *head = (const struct nlmsghdr *)page;

    answer(fd);
    if (head->nlmsg_type != NLMSG_ERROR || head->nlmsg_seq != sequence)
        fail("%s: no acknowledgement", what);
    int error = ((const struct nlmsgerr *)NLMSG_DATA(head))->error;
    if (error)
        fail("%s: %s", what, strerror(-error));
    close(fd);
}

static int is_to(const struct nlmsghdr *head, const struct peer *peer)
{
    const struct rtmsg *body = NLMSG_DATA(head);
    int left = (int)RTM_PAYLOAD(head), found = 0;

    if (body->rtm_table != RT_TABLE_MAIN || body->rtm_dst_len != peer->length)
        return 0;
    for (const struct rtattr *at = RTM_RTA(body); RTA_OK(at, left); at = RTA_NEXT(at, left))
        if (at->rta_type == RTA_DST && RTA_PAYLOAD(at) == width(peer))
            found = memcmp(RTA_DATA(at), peer->subnet, width(peer)) == 0;
    return found;
}

/* RouteListFiltered(family, {Dst}, RT_FILTER_DST): how many routes there are to a subnet. */
static unsigned list_routes(const struct peer *peer)
{
    struct request request;
    struct rtmsg *body = start(&request, RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP, sizeof *body);
    unsigned found = 0;

    body->rtm_family = peer->family;
    for (int fd = ask(&request), done = 0; !done;) {
        int left = (int)answer(fd);

        for (struct nlmsghdr *head = (struct nlmsghdr *)page; NLMSG_OK(head, left);
             head = NLMSG_NEXT(head, left)) {
            if (head->nlmsg_type == NLMSG_ERROR)
                fail("list routes: the kernel refused");
            if (head->nlmsg_type == NLMSG_DONE)
                done = 1;
            else if (++listed)
                found += (unsigned)is_to(head, peer);
        }
        if (done)
            close(fd);
    }
    return found;
}

/* --- the two backends --------------------------------------------------------------- */

static void add_vxlan(const struct peer *peer, int device)
{
    struct request request;

    neighbour(&request, peer, device);
    write_one(&request, "AddARP");
    forwarding(&request, peer, device);
    write_one(&request, "AddFDB");
    route(&request, peer, device, NLM_F_REPLACE, RTNH_F_ONLINK);
    write_one(&request, "RouteReplace");
}

static void add_host_gw(const struct peer *peer, int device)
{
    struct request request;

    if (list_routes(peer) || list_routes(peer))
        fail("a route of a peer is there already: start from an empty table");
    route(&request, peer, device, NLM_F_EXCL, 0);
    write_one(&request, "RouteAdd");
    if (list_routes(peer) != 1)
        fail("the kernel has not kept a route");
}

static int parse(const char *line, struct peer *peer)
{
    char subnet[64], gateway[64], endpoint[64];
    unsigned length, mac[6];

    if (sscanf(line, "%63[^/]/%u %63s %x:%x:%x:%x:%x:%x %63s", subnet, &length, gateway, &mac[0],
               &mac[1], &mac[2], &mac[3], &mac[4], &mac[5], endpoint) != 10)
        return 0;
    peer->family = strchr(subnet, ':') ? AF_INET6 : AF_INET;
    peer->length = (uint8_t)length;
    for (int at = 0; at < 6; at++)
        peer->mac[at] = (uint8_t)mac[at];
    return inet_pton(peer->family, subnet, peer->subnet) == 1 &&
           inet_pton(peer->family, gateway, peer->gateway) == 1 &&
           inet_pton(peer->family, endpoint, peer->endpoint) == 1;
}

static struct peer *read_peers(const char *path, size_t *count)
{
    char line[512];
    size_t room = 1024;
    struct peer *peers = malloc(room * sizeof *peers);
    FILE *file = fopen(path, "re");

    if (!file)
        fail("%s: %s", path, strerror(errno));
    for (*count = 0; peers && fgets(line, sizeof line, file); ++*count) {
        if (*count == room)
            peers = realloc(peers, (room *= 2) * sizeof *peers);
        if (peers && !parse(line, &peers[*count]))
            fail("%s:%zu: not \"subnet gateway mac endpoint\"", path, *count + 1);
    }
    if (!peers)
        fail("%s: no memory", path);
    fclose(file);
    return peers;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int main(int argc, char **argv)
{
    size_t count;

    if (argc != 4 || (strcmp(argv[1], "vxlan") != 0 && strcmp(argv[1], "host-gw") != 0)) {
        fputs("usage: flannel vxlan|host-gw FILE DEVICE\n", stderr);
        return 2;
    }
    struct peer *peers = read_peers(argv[2], &count);
    void (*add)(const struct peer *, int) = argv[1][0] == 'v' ? add_vxlan : add_host_gw;
    int device = (int)if_nametoindex(argv[3]);
    if (!device)
        fail("%s: %s", argv[3], strerror(errno));

    memset(page, 0, sizeof page); /* no page faults while the clock runs */
    uint64_t started = now_ns();
    for (size_t at = 0; at < count; at++)
        add(&peers[at], device);
    uint64_t taken = now_ns() - started;

    printf("{\"ns\": %llu, \"peers\": %zu, \"requests\": %llu, \"listed\": %llu}\n",
           (unsigned long long)taken, count, (unsigned long long)requests,
           (unsigned long long)listed);
    free(peers);
    return 0;
}
