/* SPDX-License-Identifier: Apache-2.0
 *
 * Probes of peers that run nothing of ours: frames sent in batches, answers matched and timed.
 *
 * A packet whose source and destination are this node's own address goes to the peer's MAC. The
 * peer's kernel forwards it by its route to this node, so that it comes back with a TTL one lower
 * only if every entry and rule on the way there and back lets it. A tag that takes this process's
 * key says which answers are ours.
 */
#include "probe.h"
#include "probe_frame.h"
#include "siphash.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in6.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 32,
    READ = 192 /* bytes of an answer that are read: its headers with options, and the payload */
};

static const uint8_t zeros[FDP_PROBE_LARGEST];

static uint64_t tag_of(const struct fdp_probe *probe, const struct fdp_probe_payload *payload)
{
    uint64_t words[2];

    memcpy(words, payload, sizeof words);
    return fdp_siphash(probe->key, words, 2);
}

/* ---- the sockets ---- */

/* Answers only: what comes in as UDP from our address to itself and our port. */
static int attach_filter(const struct fdp_probe *probe, int fd)
{
    struct sock_filter code[20];
    unsigned n = 0;
    uint32_t words[4];
    const int v6 = fdp_probe_is_v6(probe);
    const unsigned addresses = v6 ? 4 : 1;
    const uint32_t source = v6 ? 22 : 26, target = v6 ? 38 : 30;

    memcpy(words, probe->source, sizeof words);
    /* The checks jump to the end, whose place is known when all are there. */
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             (uint32_t)(SKF_AD_OFF + SKF_AD_PKTTYPE));
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 1, 0);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                                             fdp_probe_is_v6(probe) ? ETH_P_IPV6 : ETH_P_IP, 0, 1);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_B | BPF_ABS, v6 ? 20 : 23);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_UDP, 0, 1);
    for (unsigned i = 0; i < addresses; i += 3) { /* the first word and the last */
        code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, source + 4 * i);
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(words[i]), 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, target + 4 * i);
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ntohl(words[i]), 0, 1);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_H | BPF_ABS, v6 ? 56 : 36);
    code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, probe->port, 0, 1);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, READ);
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, 0);
    for (unsigned i = 0; i < n; i++) {
        if (BPF_CLASS(code[i].code) != BPF_JMP)
            continue;
        if (code[i].jt)
            code[i].jt = (uint8_t)(n - 2 - i);
        else
            code[i].jf = (uint8_t)(n - 2 - i);
    }
    const struct sock_fprog program = {(unsigned short)n, code};

    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) < 0 ? -errno : 0;
}

static void set_buffers(int fd)
{
    const int size = 8 << 20, on = 1;

    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, SOL_SOCKET, SO_TIMESTAMPNS, &on, sizeof on);
}

static int plug(int fd)
{
    static struct sock_filter none[] = {BPF_STMT(BPF_RET | BPF_K, 0)};
    const struct sock_fprog program = {1, none};

    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) < 0 ? -errno : 0;
}

static socklen_t set_address(int family, const uint8_t *address, uint16_t port,
                             struct sockaddr_storage *to)
{
    memset(to, 0, sizeof *to);
    if (family == AF_INET) {
        struct sockaddr_in *in = (void *)to;

        in->sin_family = AF_INET;
        in->sin_port = htons(port);
        memcpy(&in->sin_addr, address, 4);
        return sizeof *in;
    }
    struct sockaddr_in6 *in6 = (void *)to;

    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(port);
    memcpy(&in6->sin6_addr, address, 16);
    return sizeof *in6;
}

static int open_bound(int family, int type, int protocol, const uint8_t *address, uint16_t port)
{
    const int on = 1;
    struct sockaddr_storage here;
    int fd = socket(family, type | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol);

    if (fd < 0)
        return -errno;
    if (family == AF_INET)
        setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &on, sizeof on);
    else
        setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &on, sizeof on);
    socklen_t size = set_address(family, address, port, &here);
    if (bind(fd, (struct sockaddr *)&here, size) < 0) {
        int err = -errno;

        close(fd);
        return err;
    }
    return fd;
}

/* A UDP port of our address, which no other program gets, so that an answer which reaches our own
 * stack meets a socket that drops it: else the stack would answer that the port is closed. */
static int open_guard(struct fdp_probe *probe)
{
    struct sockaddr_storage here;
    socklen_t size = sizeof here;
    int fd = open_bound(probe->family, SOCK_DGRAM, 0, probe->source, 0);

    if (fd < 0)
        return fd;
    int err = plug(fd);
    if (!err && getsockname(fd, (struct sockaddr *)&here, &size) < 0)
        err = -errno;
    if (err) {
        close(fd);
        return err;
    }
    probe->port = ntohs(fdp_probe_is_v6(probe) ? ((struct sockaddr_in6 *)&here)->sin6_port
                                  : ((struct sockaddr_in *)&here)->sin_port);
    probe->guard = fd;
    return 0;
}

static int open_receiver(struct fdp_probe *probe)
{
    struct sockaddr_ll here = {.sll_family = AF_PACKET,
                               .sll_protocol = htons(ETH_P_ALL), /* before programs on the device */
                               .sll_ifindex = (int)probe->ifindex};
    int fd = probe->packet >= 0
                 ? fcntl(probe->packet, F_DUPFD_CLOEXEC, 3)
                 : socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return -errno;
    int err = attach_filter(probe, fd);
    if (!err && bind(fd, (struct sockaddr *)&here, sizeof here) < 0)
        err = -errno;
    if (err) {
        close(fd);
        return err;
    }
    set_buffers(fd);
    probe->receiver = fd;
    return 0;
}

static int open_echo(struct fdp_probe *probe)
{
    const int protocol = fdp_probe_is_v6(probe) ? IPPROTO_ICMPV6 : IPPROTO_ICMP;
    int fd = open_bound(probe->family, SOCK_RAW, protocol, probe->source, 0);

    if (fd < 0)
        return fd;
    if (fdp_probe_is_v6(probe)) {
        const int probing = IPV6_PMTUDISC_PROBE;
        struct {
            uint32_t data[8];
        } blocked; /* of icmp6_filter: a bit for each type */

        memset(&blocked, 0xff, sizeof blocked);
        blocked.data[ICMPV6_ECHO_REPLY >> 5] &= ~(1u << (ICMPV6_ECHO_REPLY & 31));
        setsockopt(fd, IPPROTO_ICMPV6, 1, &blocked, sizeof blocked);
        setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &probing, sizeof probing);
    } else {
        const int probing = IP_PMTUDISC_PROBE;
        const struct icmp_filter blocked = {~(1u << ICMP_ECHOREPLY)};

        setsockopt(fd, SOL_RAW, ICMP_FILTER, &blocked, sizeof blocked);
        setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &probing, sizeof probing);
    }
    set_buffers(fd);
    probe->receiver = probe->senders[0] = fd;
    return 0;
}

static int open_tunnel(struct fdp_probe *probe)
{
    for (unsigned i = 0; i < probe->paths; i++) {
        const int off = probe->endpoint_family == AF_INET ? IP_PMTUDISC_DONT : IPV6_PMTUDISC_DONT;
        int fd = open_bound(probe->endpoint_family, SOCK_DGRAM, 0, probe->local, 0);

        if (fd < 0)
            return fd;
        probe->senders[i] = fd;
        int err = plug(fd); /* nothing is answered there */
        if (err)
            return err;
        /* As the kernel's vxlan device does without "df set". */
        if (probe->endpoint_family == AF_INET)
            setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &off, sizeof off);
        else
            setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &off, sizeof off);
        set_buffers(fd);
    }
    return 0;
}

void fdp_probe_init(struct fdp_probe *probe)
{
    probe->receiver = probe->guard = probe->packet = -1;
    probe->hops = 1;
    for (unsigned i = 0; i < FDP_PROBE_PATHS; i++)
        probe->senders[i] = -1;
}

int fdp_probe_open(struct fdp_probe *probe)
{
    int err = open_guard(probe);

    if (!err && probe->how == FDP_PROBE_ECHO) {
        err = open_echo(probe);
    } else if (!err) {
        err = open_receiver(probe);
        if (!err && probe->how == FDP_PROBE_TUNNEL)
            err = open_tunnel(probe);
    }
    if (err)
        fdp_probe_close(probe);
    return err;
}

void fdp_probe_close(struct fdp_probe *probe)
{
    for (unsigned i = 0; i < FDP_PROBE_PATHS; i++) {
        if (probe->senders[i] >= 0 && probe->senders[i] != probe->receiver)
            close(probe->senders[i]);
        probe->senders[i] = -1;
    }
    if (probe->receiver >= 0) {
        if (probe->packet >= 0)
            plug(probe->receiver); /* it stays open: nothing is queued there meanwhile */
        close(probe->receiver);
    }
    if (probe->guard >= 0)
        close(probe->guard);
    probe->receiver = probe->guard = -1;
}

/* ---- sending ---- */

struct outgoing {
    uint8_t bytes[BATCH][FDP_PROBE_HEADERS];
    struct sockaddr_storage to[BATCH];
    struct iovec parts[BATCH][2];
    struct mmsghdr messages[BATCH];
};

static void prepare(const struct fdp_probe *probe, struct outgoing *out, unsigned slot,
                    const struct fdp_probe_shot *shot, uint32_t size)
{
    const struct fdp_probe_peer *peer = &probe->peers[shot->index];
    struct fdp_probe_payload payload = {
        .index = shot->index, .round = shot->round, .path = shot->path};
    struct msghdr *message = &out->messages[slot].msg_hdr;
    const size_t inside = fdp_probe_ip_header(probe) + FDP_PROBE_UDP + FDP_PROBE_PAYLOAD;
    size_t used;

    payload.sent = fdp_probe_clock(CLOCK_REALTIME);
    payload.tag = tag_of(probe, &payload);
    memset(message, 0, sizeof *message);
    if (probe->how == FDP_PROBE_ECHO)
        used = fdp_probe_put_echo(probe, out->bytes[slot], &payload);
    else
        used = fdp_probe_put_frame(probe, out->bytes[slot], size, shot->path, peer, &payload);
    out->parts[slot][0] = (struct iovec){out->bytes[slot], used};
    out->parts[slot][1] = (struct iovec){(void *)zeros, size - inside};
    message->msg_iov = out->parts[slot];
    message->msg_iovlen = size > inside ? 2 : 1;
    if (probe->how == FDP_PROBE_FRAME)
        return;
    message->msg_name = &out->to[slot];
    message->msg_namelen =
        probe->how == FDP_PROBE_ECHO
            ? set_address(probe->family, peer->address, 0, &out->to[slot])
            : set_address(probe->endpoint_family, peer->address, probe->tunnel_port,
                          &out->to[slot]);
}

/* An error of one address, which is no reason to leave out the others. */
static int is_of_one(int err)
{
    return err == EHOSTUNREACH || err == ENETUNREACH || err == EINVAL || err == EACCES ||
           err == ECONNREFUSED || err == EPERM;
}

int fdp_probe_shoot(struct fdp_probe *probe, const struct fdp_probe_shot *shots, uint32_t n,
                    uint32_t size)
{
    struct outgoing out;
    uint32_t done = 0;
    const uint32_t smallest = fdp_probe_is_v6(probe) ? FDP_PROBE_SMALLEST6 : FDP_PROBE_SMALLEST4;

    if (size < smallest || size > FDP_PROBE_LARGEST || probe->receiver < 0)
        return -EINVAL;
    while (done < n) {
        const unsigned path = shots[done].path;
        unsigned batch = 0;

        for (; batch < BATCH && done + batch < n; batch++) {
            const struct fdp_probe_shot *shot = &shots[done + batch];

            if (shot->index >= probe->count || shot->path >= probe->paths ||
                (shot->size && (shot->size < smallest || shot->size > FDP_PROBE_LARGEST)))
                return -EINVAL;
            if (probe->how == FDP_PROBE_TUNNEL && shot->path != path)
                break; /* it goes by another socket */
            prepare(probe, &out, batch, shot, shot->size ? shot->size : size);
        }
        const int fd = probe->how == FDP_PROBE_FRAME  ? probe->receiver
                       : probe->how == FDP_PROBE_ECHO ? probe->senders[0]
                                                      : probe->senders[path];
        int sent = sendmmsg(fd, out.messages, batch, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0) {
            done += (uint32_t)sent;
            probe->sent += (uint32_t)sent;
        } else if (errno == EAGAIN || errno == ENOBUFS) {
            break;
        } else if (is_of_one(errno) || (errno == EMSGSIZE && shots[done].size)) {
            done++; /* it was not sent, and will have no answer */
        } else if (errno != EINTR) {
            return done ? (int)done : -errno;
        }
    }
    return (int)done;
}

int fdp_probe_send(struct fdp_probe *probe, const uint32_t *which, uint32_t n, uint32_t round,
                   uint32_t size, unsigned path)
{
    struct fdp_probe_shot shots[BATCH];
    uint32_t done = 0;

    if (round >= probe->rounds || path >= probe->paths)
        return -EINVAL;
    while (done < n) {
        uint32_t batch = n - done < BATCH ? n - done : BATCH;

        for (uint32_t i = 0; i < batch; i++)
            shots[i] =
                (struct fdp_probe_shot){which[done + i], (uint16_t)round, (uint16_t)path, 0};
        int sent = fdp_probe_shoot(probe, shots, batch, size);
        if (sent < 0)
            return done && sent != -EINVAL ? (int)done : sent;
        done += (uint32_t)sent;
        if ((uint32_t)sent < batch)
            break;
    }
    return (int)done;
}

/* ---- answers ---- */

/* Where the payload of an answer begins; 0 where it is none of ours. */
static size_t payload_of(const struct fdp_probe *probe, const uint8_t *bytes, size_t have)
{
    size_t at;

    if (probe->how == FDP_PROBE_ECHO) {
        at = fdp_probe_is_v6(probe) ? 0 : have ? (size_t)(bytes[0] & 15) * 4 : 0;
        const uint8_t reply = fdp_probe_is_v6(probe) ? ICMPV6_ECHO_REPLY : ICMP_ECHOREPLY;
        if (have < at + 8 + FDP_PROBE_PAYLOAD || bytes[at] != reply)
            return 0;
        return at + 8;
    }
    at = FDP_PROBE_ETHER;
    if (have < at + fdp_probe_ip_header(probe) + FDP_PROBE_UDP + FDP_PROBE_PAYLOAD)
        return 0;
    const uint8_t *ip = bytes + at;
    const uint8_t ttl = fdp_probe_is_v6(probe) ? ip[7] : ip[8];
    const size_t header = fdp_probe_is_v6(probe) ? 40 : (size_t)(ip[0] & 15) * 4;
    if (ip[0] >> 4 != (fdp_probe_is_v6(probe) ? 6 : 4) || header != fdp_probe_ip_header(probe))
        return 0;
    if (ttl + probe->hops != probe->ttl) /* it was not forwarded, or by more than the peer */
        return 0;
    return at + header + FDP_PROBE_UDP;
}

int fdp_probe_read(struct fdp_probe *probe, const uint8_t *bytes, size_t have,
                   struct fdp_probe_payload *payload)
{
    const size_t at = payload_of(probe, bytes, have);

    if (at) {
        memcpy(payload, bytes + at, sizeof *payload);
        if (payload->index < probe->count && payload->tag == tag_of(probe, payload))
            return 1;
    }
    probe->strange++;
    return 0;
}

static int note_time(void *context, const struct fdp_probe_payload *payload, uint64_t now)
{
    struct fdp_probe *probe = context;

    if (payload->round >= probe->rounds) {
        probe->strange++;
        return 0;
    }
    uint32_t *time = &probe->times[(size_t)payload->index * probe->rounds + payload->round];
    if (*time)
        return 0; /* a copy */
    const uint64_t trip = now > payload->sent ? (now - payload->sent) / 100 : 0;
    *time = trip < 1 ? 1 : trip > UINT32_MAX ? UINT32_MAX : (uint32_t)trip;
    probe->answered++;
    return 1;
}

int fdp_probe_match(struct fdp_probe *probe, const uint8_t *bytes, size_t have, uint64_t now)
{
    struct fdp_probe_payload payload;

    return fdp_probe_read(probe, bytes, have, &payload) && note_time(probe, &payload, now);
}

/* When the kernel received it. */
static uint64_t arrival(struct msghdr *message)
{
    for (struct cmsghdr *one = CMSG_FIRSTHDR(message); one; one = CMSG_NXTHDR(message, one))
        if (one->cmsg_level == SOL_SOCKET && one->cmsg_type == SCM_TIMESTAMPNS) {
            struct timespec when;

            memcpy(&when, CMSG_DATA(one), sizeof when);
            return (uint64_t)when.tv_sec * 1000000000 + (uint64_t)when.tv_nsec;
        }
    return fdp_probe_clock(CLOCK_REALTIME);
}

int fdp_probe_take(struct fdp_probe *probe, fdp_probe_note note, void *context)
{
    uint8_t bytes[BATCH][READ];
    union {
        struct cmsghdr aligned;
        char space[CMSG_SPACE(sizeof(struct timespec))];
    } control[BATCH];
    struct iovec parts[BATCH];
    struct mmsghdr messages[BATCH];
    int found = 0;

    if (probe->receiver < 0)
        return -EINVAL;
    for (;;) {
        for (unsigned i = 0; i < BATCH; i++) {
            parts[i] = (struct iovec){bytes[i], READ};
            messages[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &parts[i],
                                                       .msg_iovlen = 1,
                                                       .msg_control = &control[i],
                                                       .msg_controllen = sizeof control[i]}};
        }
        int count = recvmmsg(probe->receiver, messages, BATCH, MSG_DONTWAIT, NULL);
        if (count < 0) {
            if (errno == EINTR)
                continue;
            /* ENETDOWN: the device went down; the peers' silence says it. */
            return errno == EAGAIN || errno == ENETDOWN ? found : -errno;
        }
        for (int i = 0; i < count; i++) {
            struct fdp_probe_payload payload;

            if (fdp_probe_read(probe, bytes[i], messages[i].msg_len, &payload))
                found += note(context, &payload, arrival(&messages[i].msg_hdr));
        }
        if (count < BATCH)
            return found;
    }
}

int fdp_probe_receive(struct fdp_probe *probe, int wait_ms)
{
    struct pollfd ready = {probe->receiver, POLLIN, 0};

    if (probe->receiver < 0)
        return -EINVAL;
    if (poll(&ready, 1, wait_ms) < 0)
        return errno == EINTR ? 0 : -errno;
    return fdp_probe_take(probe, note_time, probe);
}
