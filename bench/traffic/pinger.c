/* SPDX-License-Identifier: Apache-2.0
 *
 * pinger ADDRESS MICROSECONDS: ICMP echo requests at a steady pace until SIGTERM, then
 * one line of JSON: sent, lost, and the round trips' median, 99th percentile and
 * maximum in microseconds. Requests of the last half second may still be on their way:
 * they are waited for. SIGUSR1 begins the counts anew and answers with a line "ready".
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/icmp6.h>
#include <netinet/ip.h>
#include <netinet/ip_icmp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 4000000, PATIENCE_MS = 500 };

static volatile sig_atomic_t ending, beginning;
static uint64_t sent_at[MOST]; /* 0: answered */
static uint32_t round_trips[MOST];
static uint32_t sent, answered, first, refused;

static void on_end(int number)
{
    (void)number;
    ending = 1;
}

static void on_begin(int number)
{
    (void)number;
    beginning = 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint16_t checksum(const void *data, size_t size)
{
    const uint16_t *words = data;
    uint32_t sum = 0;

    for (size_t i = 0; i < size / 2; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~(sum + (sum >> 16));
}

struct echo {
    uint8_t type, code;
    uint16_t check, id, sequence;
    uint32_t number, pad;
};

static void request(int fd, int six, const struct sockaddr *to, socklen_t size)
{
    struct echo echo = {.type = six ? ICMP6_ECHO_REQUEST : ICMP_ECHO,
                        .id = (uint16_t)getpid(), .number = sent};

    if (!six) /* for IPv6 the kernel does it */
        echo.check = checksum(&echo, sizeof echo);
    sent_at[sent] = now_ns();
    if (sendto(fd, &echo, sizeof echo, 0, to, size) < 0) {
        refused++;
        sent_at[sent] = 0;
    }
    sent++;
}

static void take(int fd, int six)
{
    uint8_t data[256];
    struct echo echo;
    ssize_t size;

    while ((size = recv(fd, data, sizeof data, MSG_DONTWAIT)) > 0) {
        const size_t skip = six ? 0 : (size_t)(data[0] & 15) * 4;

        if ((size_t)size < skip + sizeof echo)
            continue;
        memcpy(&echo, data + skip, sizeof echo);
        if (echo.type != (six ? ICMP6_ECHO_REPLY : ICMP_ECHOREPLY) ||
            echo.id != (uint16_t)getpid() || echo.number >= sent || echo.number < first ||
            !sent_at[echo.number])
            continue;
        round_trips[answered++] = (uint32_t)((now_ns() - sent_at[echo.number]) / 1000);
        sent_at[echo.number] = 0;
    }
}

static int by_size(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

static void begin_anew(void)
{
    beginning = 0;
    first = sent;
    answered = refused = 0;
    puts("ready");
    fflush(stdout);
}

int main(int count, char **words)
{
    union {
        struct sockaddr_in four;
        struct sockaddr_in6 six;
    } to = {0};
    const struct sigaction end = {.sa_handler = on_end}, begin = {.sa_handler = on_begin};

    if (count != 3) {
        fprintf(stderr, "pinger ADDRESS MICROSECONDS\n");
        return 2;
    }
    const int six = strchr(words[1], ':') != NULL;
    const uint64_t pace = strtoull(words[2], NULL, 10) * 1000;
    if (six ? inet_pton(AF_INET6, words[1], &to.six.sin6_addr) != 1
            : inet_pton(AF_INET, words[1], &to.four.sin_addr) != 1)
        return 2;
    to.four.sin_family = six ? AF_INET6 : AF_INET;
    const int fd = socket(six ? AF_INET6 : AF_INET, SOCK_RAW, six ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
    const int room = 8 << 20;
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0) {
        perror("pinger");
        return 1;
    }
    sigaction(SIGTERM, &end, NULL);
    sigaction(SIGUSR1, &begin, NULL);

    uint64_t due = now_ns(), stop = 0;
    while (!stop || now_ns() < stop) {
        const uint64_t now = now_ns();
        struct pollfd waiting = {.fd = fd, .events = POLLIN};
        struct timespec left = {0, 0};

        if (beginning)
            begin_anew();
        if (ending && !stop)
            stop = now + PATIENCE_MS * 1000000ull;
        if (!stop && now >= due && sent < MOST) {
            request(fd, six, (struct sockaddr *)&to, six ? sizeof to.six : sizeof to.four);
            due = now > due + 100 * pace ? now : due + pace; /* never a burst to catch up */
        }
        if (due > now && !stop)
            left.tv_nsec = (long)(due - now);
        else if (stop)
            left.tv_nsec = 1000000;
        ppoll(&waiting, 1, &left, NULL);
        take(fd, six);
    }
    qsort(round_trips, answered, sizeof *round_trips, by_size);
    printf("{\"sent\": %u, \"lost\": %u, \"refused\": %u, \"p50\": %u, \"p99\": %u, \"max\": %u}\n",
           sent - first, sent - first - answered, refused, answered ? round_trips[answered / 2] : 0,
           answered ? round_trips[(uint64_t)answered * 99 / 100] : 0,
           answered ? round_trips[answered - 1] : 0);
    return 0;
}
