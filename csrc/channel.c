/* SPDX-License-Identifier: Apache-2.0
 *
 * The netlink socket: who may answer, what an answer means, and how a batch
 * of changes is known to have taken effect.
 */
#include "kinds.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define MAX_ERRNO 4095 /* the kernel's own bound, include/linux/err.h */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Receive one page from the kernel, and from no other process. Bytes, or negative. */
static int receive_into(struct fdp_socket *sock, uint8_t *to, size_t room)
{
    for (;;) {
        struct sockaddr_nl from = {0};
        struct iovec page = {to, room};
        struct msghdr message = {.msg_name = &from, .msg_namelen = sizeof from,
                                 .msg_iov = &page, .msg_iovlen = 1};
        uint64_t before = now_ns();
        ssize_t got = recvmsg(sock->fd, &message, 0);

        sock->recv_ns += now_ns() - before;
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno == EAGAIN ? -ETIMEDOUT : -errno;
        if (message.msg_flags & MSG_TRUNC)
            return -EMSGSIZE;
        if (message.msg_namelen == sizeof from && from.nl_pid == 0)
            return (int)got;
        /* Any process may write to our port: it is not the kernel, drop it. */
    }
}

static int receive(struct fdp_socket *sock)
{
    return receive_into(sock, sock->rx, FDP_RX_SIZE);
}

static int transmit(struct fdp_socket *sock, size_t size)
{
    if (!size)
        return -EOPNOTSUPP; /* no request of rtnetlink asks for that */
    for (;;) {
        ssize_t sent = send(sock->fd, sock->tx, size, 0);

        if (sent == (ssize_t)size)
            return 0;
        if (sent >= 0)
            return -EIO;
        if (errno != EINTR)
            return -errno;
    }
}

/* An acknowledgement or error: the errno (0 = acknowledged), the kernel's
 * words in `text`. */
static int read_error(const struct fdp_message *message, char *text, size_t room)
{
    int32_t error;
    struct nlmsghdr echoed;

    text[0] = 0;
    if (message->size < sizeof error + sizeof echoed)
        return EBADMSG;
    memcpy(&error, message->body, sizeof error);
    memcpy(&echoed, message->body + sizeof error, sizeof echoed);
    if (error > 0 || error < -MAX_ERRNO)
        return EBADMSG;
    if (!(message->flags & NLM_F_ACK_TLVS))
        return -error;

    uint32_t skip = sizeof error + sizeof echoed;
    if (!(message->flags & NLM_F_CAPPED) && echoed.nlmsg_len > sizeof echoed)
        skip += ((echoed.nlmsg_len + 3u) & ~3u) - (uint32_t)sizeof echoed;
    while (skip + sizeof(struct rtattr) <= message->size) {
        struct rtattr head;

        memcpy(&head, message->body + skip, sizeof head);
        if (head.rta_len < sizeof head || head.rta_len > message->size - skip)
            break;
        if ((head.rta_type & NLA_TYPE_MASK) == NLMSGERR_ATTR_MSG) {
            size_t length = head.rta_len - sizeof head;

            length = length < room ? length : room - 1;
            memcpy(text, message->body + skip + sizeof head, length);
            text[length] = 0;
        }
        skip += (head.rta_len + 3u) & ~3u;
    }
    return -error;
}

enum { GROUP = 32 };

/* Rows on their way to a sink. */
struct group {
    union fdp_row rows[GROUP];
    uint8_t owners[GROUP];
    uint32_t count;
};

static int hand_over(struct group *group, fdp_sink sink, void *context)
{
    uint32_t count = group->count;

    group->count = 0;
    return count ? sink(context, group->rows, group->owners, count) : 0;
}

/* One message of a dump. 1: go on, 0: done, negative: failed. */
static int take_message(struct fdp_socket *sock, const struct fdp_scope *scope,
                        const struct fdp_message *message, struct group *group)
{
    if (message->type == NLMSG_DONE) {
        int32_t error = 0;

        if (message->size >= sizeof error)
            memcpy(&error, message->body, sizeof error);
        return error > 0 || error < -MAX_ERRNO ? -EBADMSG : error;
    }
    if (message->type == NLMSG_ERROR) {
        int error = read_error(message, sock->text, sizeof sock->text);

        return error ? -error : 0;
    }
    if (message->type == NLMSG_OVERRUN)
        return -ENOBUFS;
    int owner = fdp_decode(scope, message, &group->rows[group->count]);
    if (owner < 0)
        return owner;
    group->owners[group->count] = (uint8_t)owner;
    group->count += owner != FDP_SKIP;
    return 1;
}

int fdp_take_page(struct fdp_socket *sock, const struct fdp_scope *scope, const uint8_t *page,
                  size_t size, fdp_sink sink, void *context, int *interrupted)
{
    const uint8_t *at = page, *end = page + size;
    struct fdp_message message;
    struct group group;
    int more, state = 1;

    group.count = 0;
    while (state > 0 && (more = fdp_next_message(&at, end, &message)) > 0) {
        if (message.seq != sock->seq)
            continue; /* the rest of something given up earlier */
        if (message.flags & NLM_F_DUMP_INTR)
            *interrupted = 1;
        state = take_message(sock, scope, &message, &group);
        if (group.count == GROUP) {
            int err = hand_over(&group, sink, context);
            if (err)
                return err;
        }
    }
    if (state < 0)
        return state;
    int err = hand_over(&group, sink, context);
    if (err)
        return err;
    return state ? (more < 0 ? more : 1) : 0;
}

int fdp_dump(struct fdp_socket *sock, const struct fdp_scope *scope, fdp_sink sink, void *context)
{
    const struct fdp_kind_ops *ops = fdp_kinds[scope->kind];
    int interrupted = 0, state = 1;

    sock->text[0] = 0;
    if (ops->dump)
        return ops->dump(scope, sock->rx, sink, context);
    int err = transmit(sock, fdp_encode_dump(scope, ++sock->seq, sock->tx));
    while (!err && state > 0) {
        int size = receive(sock);

        if (size < 0)
            return size;
        state = fdp_take_page(sock, scope, sock->rx, (size_t)size, sink, context, &interrupted);
        if (state < 0)
            return state == -ENOENT ? 0 : state; /* a routing table that does not exist is empty */
    }
    return err ? err : interrupted ? -EINTR : 0;
}

/* Whether a page holds the end of the dump that was asked for; notes an interruption. */
static int is_last_page(struct fdp_pages *pages, const uint8_t *page, size_t size)
{
    const uint8_t *end = page + size;
    struct fdp_message message;

    while (fdp_next_message(&page, end, &message) > 0) {
        if (message.seq != pages->seq)
            continue;
        pages->interrupted |= (message.flags & NLM_F_DUMP_INTR) != 0;
        if (message.type == NLMSG_DONE || message.type == NLMSG_ERROR)
            return 1;
    }
    return 0;
}

int fdp_fetch(struct fdp_socket *sock, const struct fdp_scope *scope, struct fdp_pages *pages,
              fdp_realloc_fn realloc)
{
    int too_much = 0, last = 0;

    pages->used = 0;
    pages->interrupted = 0;
    pages->seq = ++sock->seq;
    int err = transmit(sock, fdp_encode_dump(scope, pages->seq, sock->tx));
    while (!err && !last) {
        if (pages->room - pages->used < FDP_DUMP_PAGE) {
            size_t room = pages->room ? pages->room * 2 : pages->expected + 2 * FDP_DUMP_PAGE;
            uint8_t *data = realloc(pages->data, room);

            if (!data)
                return -ENOMEM;
            pages->data = data;
            pages->room = room;
        }
        int size = receive_into(sock, pages->data + pages->used, FDP_DUMP_PAGE);
        if (size < 0)
            return size;
        last = is_last_page(pages, pages->data + pages->used, (size_t)size);
        too_much |= pages->used + (size_t)size > pages->most;
        if (too_much && pages->stops && !last)
            err = -E2BIG;
        if (!too_much)
            pages->used += (size_t)size;
    }
    if (too_much)
        pages->used = 0;
    return err;
}

int fdp_replay(const struct fdp_pages *pages, const struct fdp_scope *scope, fdp_sink sink,
               void *context)
{
    struct fdp_socket record = {.fd = -1, .seq = pages->seq};
    int interrupted = 0;
    int state = fdp_take_page(&record, scope, pages->data, pages->used, sink, context,
                              &interrupted);

    if (state < 0)
        return state == -ENOENT ? 0 : state;
    return state ? -EBADMSG : interrupted ? -EINTR : 0;
}

/* Hand over one route for each scope that it is in. 1, or negative. */
static int sort_route(const struct fdp_scope *scopes, uint32_t count,
                      const struct fdp_message *message, struct group *group, fdp_sink sink,
                      void *context)
{
    uint8_t owners[FDP_SCOPES];
    struct fdp_route row;
    int err = fdp_route_sort(scopes, count, message, &row, owners);

    if (err <= 0)
        return err < 0 ? err : 1;
    for (uint32_t i = 0; i < count; i++) {
        if (owners[i] == FDP_SKIP)
            continue;
        memcpy(&group->rows[group->count].route, &row, sizeof row);
        group->owners[group->count++] = owners[i];
        err = group->count == GROUP ? hand_over(group, sink, context) : 0;
        if (err)
            return err;
    }
    return 1;
}

int fdp_replay_routes(const struct fdp_pages *pages, const struct fdp_scope *scopes,
                      uint32_t count, fdp_sink sink, void *context)
{
    struct fdp_socket record = {.fd = -1, .seq = pages->seq};
    const uint8_t *at = pages->data, *end = pages->data + pages->used;
    struct fdp_message message;
    struct group group;
    int more = 1, state = 1;

    if (!count || count > FDP_SCOPES)
        return count ? -EINVAL : 0;
    if (pages->interrupted)
        return -EINTR;
    group.count = 0;
    while (state > 0 && (more = fdp_next_message(&at, end, &message)) > 0) {
        if (message.seq != pages->seq)
            continue;
        state = message.type == RTM_NEWROUTE
                    ? sort_route(scopes, count, &message, &group, sink, context)
                    : take_message(&record, scopes, &message, &group);
    }
    if (state > 0)
        return more < 0 ? more : -EBADMSG; /* without its end */
    if (state < 0)
        return state == -ENOENT ? 0 : state;
    return hand_over(&group, sink, context);
}

struct catch {
    union fdp_row *row;
    int found;
};

static int catch_one(void *context, const union fdp_row *rows, const uint8_t *owners,
                     uint32_t count)
{
    struct catch *caught = context;

    (void)owners;
    (void)count;
    memcpy(caught->row, rows, sizeof *rows);
    caught->found = 1;
    return 0;
}

int fdp_get(struct fdp_socket *sock, const struct fdp_scope *scope, const void *key,
            union fdp_row *row)
{
    struct catch caught = {row, 0};
    int interrupted = 0;
    union fdp_row blank = {0};

    memcpy(row, &blank, sizeof blank);
    sock->text[0] = 0;
    int err = transmit(sock, fdp_encode_get(scope->kind, key, ++sock->seq, sock->tx));
    while (!err) {
        int size = receive(sock);

        if (size < 0)
            return size;
        err = fdp_take_page(sock, scope, sock->rx, (size_t)size, catch_one, &caught, &interrupted);
        if (err < 0)
            return err == -ENOENT || err == -ESRCH ? 0 : err;
        if (caught.found)
            return 1;
        err = err == 0; /* acknowledged without an entry: not there */
    }
    return err < 0 ? err : 0;
}

enum { LOOKUPS = 64 }; /* questions in one send: twice as many answers fit a default rcvbuf */

/* Write the questions for rows [from, to); only the last one is acknowledged. Bytes. */
static size_t fill_questions(struct fdp_socket *sock, const struct fdp_table *table, uint32_t from,
                             uint32_t to)
{
    uint8_t *at = sock->tx;

    for (uint32_t i = from; i < to; i++) {
        struct nlmsghdr head;
        size_t size = fdp_encode_get(table->kind, fdp_table_row(table, i), ++sock->seq, at);

        memcpy(&head, at, sizeof head);
        if (i + 1 < to)
            head.nlmsg_flags &= (uint16_t)~NLM_F_ACK;
        memcpy(at, &head, sizeof head);
        at += size;
    }
    return (size_t)(at - sock->tx);
}

/* One answer of a batch of questions. 1: go on, 0: that was the last, or negative. */
static int take_answer(struct fdp_socket *sock, const struct fdp_scope *scope,
                       const struct fdp_message *message, fdp_sink sink, void *context)
{
    union fdp_row row;

    if (message->type == NLMSG_ERROR) {
        int error = read_error(message, sock->text, sizeof sock->text);

        if (error && error != ENOENT && error != ESRCH)
            return -error;
        return message->seq != sock->seq;
    }
    int owner = fdp_decode(scope, message, &row);
    if (owner <= 0)
        return owner < 0 ? owner : 1;
    uint8_t owners[1] = {(uint8_t)owner};
    int err = sink(context, &row, owners, 1);
    return err ? err : 1;
}

int fdp_look_up(struct fdp_socket *sock, const struct fdp_scope *scope,
                const struct fdp_table *table, fdp_sink sink, void *context)
{
    sock->text[0] = 0;
    for (uint32_t from = 0, to; from < table->count; from = to) {
        to = table->count - from > LOOKUPS ? from + LOOKUPS : table->count;
        int state = transmit(sock, fill_questions(sock, table, from, to));

        state = state ? state : 1;
        while (state > 0) {
            int size = receive(sock);
            if (size < 0)
                return size;
            const uint8_t *at = sock->rx, *end = at + size;
            struct fdp_message message;
            while (state > 0 && fdp_next_message(&at, end, &message) > 0)
                if (sock->seq - message.seq < to - from)
                    state = take_answer(sock, scope, &message, sink, context);
        }
        if (state < 0)
            return state;
    }
    return 0;
}

struct batch {
    uint32_t from, to; /* ops */
    uint32_t base;     /* sequence number of op `from` */
    uint32_t last;     /* sequence number of the barrier; 0: nothing was encoded */
};

/* Fill a page with as many of ops[from..to) as a batch holds. The last one asks
 * for an acknowledgement: the kernel answers in order, so when that has come,
 * the silence about all others means that they took effect. */
static size_t fill_batch(struct fdp_socket *sock, struct fdp_job *job, struct batch *batch)
{
    const struct fdp_layout *layout = job->desired->layout;
    size_t used = 0, barrier = 0;
    uint32_t messages = 0, i;

    batch->last = 0;
    for (i = batch->from; i < batch->to && messages < FDP_BATCH; i++) {
        const struct fdp_op *op = &job->ops[i];
        const uint8_t *row = fdp_job_row(job, op);
        uint32_t tag = *fdp_row_tag(layout, (void *)row);

        if (op->kind != FDP_REMOVE && job->broken && tag < job->tags && job->broken[tag]) {
            job->results[i] = FDP_SKIPPED;
            job->skipped++;
            continue;
        }
        job->results[i] = 0;
        barrier = used;
        batch->last = batch->base + (i - batch->from);
        used += fdp_encode((enum fdp_kind)job->desired->kind, (enum fdp_op_kind)op->kind, row,
                           batch->last, 0, sock->tx + used);
        messages++;
    }
    batch->to = i;
    sock->seq = batch->base + (i - batch->from);
    if (messages) {
        uint16_t flags;

        memcpy(&flags, sock->tx + barrier + offsetof(struct nlmsghdr, nlmsg_flags), sizeof flags);
        flags |= NLM_F_ACK;
        memcpy(sock->tx + barrier + offsetof(struct nlmsghdr, nlmsg_flags), &flags, sizeof flags);
        sock->messages_sent += messages;
        sock->batches_sent++;
    }
    return used;
}

/* Replies were dropped: nothing is known of the ops that have no error yet. */
static void mark_unknown(struct fdp_socket *sock, struct fdp_job *job, const struct batch *batch)
{
    uint8_t waste[64];

    for (uint32_t i = batch->from; i < batch->to; i++)
        if (job->results[i] == 0) {
            job->results[i] = FDP_UNKNOWN;
            job->unknown++;
        }
    sock->overruns++;
    while (recv(sock->fd, waste, sizeof waste, MSG_DONTWAIT) >= 0 || errno == EINTR ||
           errno == ENOBUFS)
        ;
}

/* The kernel answered with an error; that of a removal may say that the row is gone. */
static void note_answer(struct fdp_job *job, uint32_t number, int error, const char *text)
{
    const struct fdp_kind_ops *ops = fdp_kinds[job->desired->kind];
    const struct fdp_op *op = &job->ops[number];

    if (op->kind == FDP_REMOVE && ops->is_gone && ops->is_gone(fdp_job_row(job, op), error))
        error = ESRCH;
    fdp_note_failure(job, number, error, text);
}

/* Read answers up to the barrier's. 0, or negative when the socket failed. */
static int await_barrier(struct fdp_socket *sock, struct fdp_job *job, const struct batch *batch)
{
    for (;;) {
        int size = receive(sock);

        if (size == -ENOBUFS) {
            mark_unknown(sock, job, batch);
            return 0;
        }
        if (size < 0)
            return size;
        const uint8_t *at = sock->rx, *end = sock->rx + size;
        struct fdp_message message;
        int more;
        while ((more = fdp_next_message(&at, end, &message)) > 0) {
            if (message.type != NLMSG_ERROR || message.seq - batch->base >= batch->to - batch->from)
                continue;
            int error = read_error(&message, sock->text, sizeof sock->text);
            if (error)
                note_answer(job, batch->from + (message.seq - batch->base), error, sock->text);
            if (message.seq == batch->last)
                return 0;
        }
        if (more < 0)
            return more;
    }
}

int fdp_apply(struct fdp_socket *sock, struct fdp_job *job, uint32_t from, uint32_t to)
{
    const struct fdp_kind_ops *ops = fdp_kinds[job->desired->kind];

    sock->text[0] = 0;
    if (ops->apply)
        return ops->apply(sock, job, from, to);
    while (from < to) {
        struct batch batch = {.from = from, .to = to, .base = sock->seq + 1};
        size_t size = fill_batch(sock, job, &batch);

        if (size) {
            int err = transmit(sock, size);
            if (err == -ENOBUFS) { /* not sent at all; the next reading shows it */
                mark_unknown(sock, job, &batch);
                err = 0;
            } else if (!err) {
                err = await_barrier(sock, job, &batch);
            }
            if (err)
                return err;
            if (job->results[batch.from] == EPERM)
                return -EPERM;
        }
        from = batch.to;
    }
    return 0;
}
