/* SPDX-License-Identifier: Apache-2.0
 *
 * The floor: what the kernel alone takes for a given sequence of netlink
 * messages, with nobody encoding, decoding or deciding anything.
 *
 *   floor send FILE [NETNS]   send each record, wait for its last message's ack
 *   floor dump FILE [NETNS]   send each record, receive until the dump is done
 *
 * FILE is a sequence of records: a native 32-bit length, then that many bytes
 * of netlink messages. NETNS is a path such as /run/netns/host1. The socket is
 * set up as the library sets up its own. Prints one JSON object; "ns" is the
 * time on CLOCK_MONOTONIC from the first send to the last answer, "cpu_ns" the
 * processor time of it (the kernel works inside our system calls). Any error
 * the kernel reports ends the program with status 1: a floor that did other
 * work than it was given would be no floor.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef NETLINK_GET_STRICT_CHK
#define NETLINK_GET_STRICT_CHK 12
#endif

#define PAGE (64 * 1024) /* as FDP_RX_SIZE; the kernel's dump pages are 32 KiB at most */

static uint8_t page[PAGE] __attribute__((aligned(8)));

struct totals {
    uint64_t records, sent_bytes, received_bytes, messages;
};

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list list;

    va_start(list, format);
    fputs("floor: ", stderr);
    vfprintf(stderr, format, list);
    fputc('\n', stderr);
    va_end(list);
    exit(1);
}

static uint64_t now_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint8_t *read_file(const char *path, size_t *size)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0 || fstat(fd, &status) < 0)
        fail("%s: %s", path, strerror(errno));
    *size = (size_t)status.st_size;
    uint8_t *data = malloc(*size + 1);
    if (!data)
        fail("%s: no memory for %zu bytes", path, *size);
    for (size_t have = 0; have < *size;) {
        ssize_t got = read(fd, data + have, *size - have);
        if (got <= 0)
            fail("%s: cannot be read to its end", path);
        have += (size_t)got;
    }
    close(fd);
    return data;
}

static int open_socket(const char *netns)
{
    const int on = 1;
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};

    if (netns) {
        int fd = open(netns, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
            fail("%s: %s", netns, strerror(errno));
        close(fd);
    }
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        fail("socket: %s", strerror(errno));
    setsockopt(fd, SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_GET_STRICT_CHK, &on, sizeof on);
    return fd;
}

/* The sequence number of the last message of a record. */
static uint32_t last_sequence(const uint8_t *record, uint32_t size)
{
    struct nlmsghdr head;
    uint32_t at = 0, sequence = 0;

    while (at + sizeof head <= size) {
        memcpy(&head, record + at, sizeof head);
        if (head.nlmsg_len < sizeof head || head.nlmsg_len > size - at)
            fail("the file holds a message of %u bytes where %u are left", head.nlmsg_len,
                 size - at);
        sequence = head.nlmsg_seq;
        at += NLMSG_ALIGN(head.nlmsg_len);
    }
    return sequence;
}

/* Walk one received page; 1 when it holds the end of the answer. */
static int is_end(ssize_t size, uint32_t sequence, struct totals *totals)
{
    for (ssize_t at = 0; at + (ssize_t)sizeof(struct nlmsghdr) <= size;) {
        const struct nlmsghdr *head = (const struct nlmsghdr *)(page + at);

        if (head->nlmsg_len < sizeof *head)
            fail("the kernel sent a message of %u bytes", head->nlmsg_len);
        if (head->nlmsg_type == NLMSG_ERROR) {
            int error = ((const struct nlmsgerr *)NLMSG_DATA(head))->error;
            if (error)
                fail("message %u: %s", head->nlmsg_seq, strerror(-error));
            if (head->nlmsg_seq == sequence)
                return 1;
        } else if (head->nlmsg_type == NLMSG_DONE) {
            return 1;
        } else {
            totals->messages++;
        }
        at += NLMSG_ALIGN(head->nlmsg_len);
    }
    return 0;
}

static void exchange(int fd, const uint8_t *record, uint32_t size, uint32_t sequence,
                     struct totals *totals)
{
    if (send(fd, record, size, 0) != (ssize_t)size)
        fail("send: %s", strerror(errno));
    totals->records++;
    totals->sent_bytes += size;
    for (int done = 0; !done;) {
        ssize_t got = recv(fd, page, sizeof page, 0);
        if (got < 0)
            fail("receive: %s", strerror(errno));
        totals->received_bytes += (uint64_t)got;
        done = is_end(got, sequence, totals);
    }
}

int main(int argc, char **argv)
{
    struct totals totals = {0};
    size_t size;

    if (argc < 3 || argc > 4 || (strcmp(argv[1], "send") != 0 && strcmp(argv[1], "dump") != 0)) {
        fputs("usage: floor send|dump FILE [NETNS]\n", stderr);
        return 2;
    }
    uint8_t *data = read_file(argv[2], &size);
    int fd = open_socket(argc == 4 ? argv[3] : NULL);

    memset(page, 0, sizeof page); /* no page faults while the clock runs */
    uint64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID), started = now_ns(CLOCK_MONOTONIC);
    for (size_t at = 0; at < size;) {
        uint32_t length;

        if (size - at < sizeof length)
            fail("%s: cut short", argv[2]);
        memcpy(&length, data + at, sizeof length);
        at += sizeof length;
        if (length > size - at)
            fail("%s: cut short", argv[2]);
        exchange(fd, data + at, length, last_sequence(data + at, length), &totals);
        at += length;
    }
    uint64_t taken = now_ns(CLOCK_MONOTONIC) - started;
    cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;

    printf("{\"ns\": %llu, \"cpu_ns\": %llu, \"records\": %llu, \"sent_bytes\": %llu, \"received_bytes\": %llu, "
           "\"objects\": %llu}\n",
           (unsigned long long)taken, (unsigned long long)cpu,
           (unsigned long long)totals.records, (unsigned long long)totals.sent_bytes,
           (unsigned long long)totals.received_bytes, (unsigned long long)totals.messages);
    free(data);
    return 0;
}
