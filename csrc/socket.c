/* SPDX-License-Identifier: Apache-2.0
 *
 * Opening a netlink socket in a namespace, without moving the caller there.
 */
#include "rtnl.h"

#include <errno.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#ifndef NETLINK_GET_STRICT_CHK
#define NETLINK_GET_STRICT_CHK 12
#endif

struct opening {
    int netns_fd, result;
    fdp_set_up set_up;
    const void *argument;
};

static int set_up(int fd, const void *argument)
{
    const int on = 1, rcvbuf = *(const int *)argument;
    const struct timeval patience = {.tv_sec = 30};
    struct sockaddr_nl address = {.nl_family = AF_NETLINK};

    /* Texts of errors, short errors, filters that are checked: kernels without
     * one of these work, with less to say. */
    setsockopt(fd, SOL_NETLINK, NETLINK_EXT_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_CAP_ACK, &on, sizeof on);
    setsockopt(fd, SOL_NETLINK, NETLINK_GET_STRICT_CHK, &on, sizeof on);
    if (rcvbuf && setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &rcvbuf, sizeof rcvbuf) < 0)
        return -errno;
    /* A kernel that does not answer for this long is not going to. */
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0)
        return -errno;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return -errno;
    return fd;
}

static void *open_there(void *argument)
{
    struct opening *opening = argument;

    if (opening->netns_fd >= 0 && setns(opening->netns_fd, CLONE_NEWNET) < 0) {
        opening->result = -errno;
        return NULL;
    }
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    opening->result = fd < 0 ? -errno : opening->set_up(fd, opening->argument);
    if (fd >= 0 && opening->result < 0)
        close(fd);
    return NULL;
}

int fdp_open_with(int netns_fd, fdp_set_up set_up, const void *argument)
{
    struct opening opening = {netns_fd, -EAGAIN, set_up, argument};
    pthread_t thread;

    if (netns_fd < 0) {
        open_there(&opening);
        return opening.result;
    }
    int err = pthread_create(&thread, NULL, open_there, &opening);
    if (err)
        return -err;
    pthread_join(thread, NULL);
    return opening.result;
}

int fdp_open(int netns_fd, int rcvbuf)
{
    return fdp_open_with(netns_fd, set_up, &rcvbuf);
}

uint32_t fdp_port(int fd)
{
    struct sockaddr_nl address = {0};
    socklen_t size = sizeof address;

    return getsockname(fd, (struct sockaddr *)&address, &size) < 0 ? 0 : address.nl_pid;
}
