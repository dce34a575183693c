/* SPDX-License-Identifier: Apache-2.0
 *
 * What reading and writing netlink messages have in common: a writer that fills a page and
 * a cursor that checks every length.
 */
#ifndef FDP_WIRE_H
#define FDP_WIRE_H

#include "kinds.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <string.h>

#define ALIGN(n) (((n) + 3u) & ~3u)

/* Sizes are constants where these are called: inlined, a message is a few moves. */
#define INLINE inline __attribute__((always_inline))

/* ---- writing ---------------------------------------------------------------- */

struct writer {
    uint8_t *start, *at;
};

static INLINE struct writer begin(uint8_t *to, uint16_t type, uint16_t flags, uint32_t seq)
{
    struct nlmsghdr head = {.nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags,
                            .nlmsg_seq = seq};

    memcpy(to, &head, sizeof head);
    return (struct writer){to, to + sizeof head};
}

static INLINE void put(struct writer *writer, const void *data, size_t size)
{
    memcpy(writer->at, data, size);
    memset(writer->at + size, 0, ALIGN(size) - size);
    writer->at += ALIGN(size);
}

static INLINE void put_attribute(struct writer *writer, uint16_t type, const void *data, size_t size)
{
    struct rtattr head = {(uint16_t)(sizeof head + size), type};

    put(writer, &head, sizeof head);
    put(writer, data, size);
}

static INLINE void put_address(struct writer *writer, uint16_t type, const uint8_t *address,
                               uint8_t family)
{
    if (family == AF_INET6)
        put_attribute(writer, type, address, 16);
    else
        put_attribute(writer, type, address, 4);
}

static INLINE void put_u32(struct writer *writer, uint16_t type, uint32_t value)
{
    if (value)
        put_attribute(writer, type, &value, sizeof value);
}

static INLINE size_t finish(struct writer *writer)
{
    uint32_t length = (uint32_t)(writer->at - writer->start);

    memcpy(writer->start, &length, sizeof length);
    return length;
}

/* What an addition or a replacement is asked to do. An added route or nexthop is
 * exclusive: it never overwrites. */
static INLINE uint16_t change_flags(enum fdp_op_kind op)
{
    return op == FDP_ADD       ? NLM_F_CREATE | NLM_F_EXCL
           : op == FDP_REPLACE ? NLM_F_CREATE | NLM_F_REPLACE
                               : 0;
}

/* ---- reading ---------------------------------------------------------------- */

struct cursor {
    const uint8_t *at, *end;
};

struct attribute {
    uint16_t type, size;
    const uint8_t *data;
};

/* The only place where lengths of attributes are checked. 1, 0 at the end,
 * -EBADMSG. */
static INLINE int next_attribute(struct cursor *cursor, struct attribute *attribute)
{
    struct rtattr head;
    size_t left = (size_t)(cursor->end - cursor->at);

    if (left < sizeof head)
        return left ? -EBADMSG : 0;
    memcpy(&head, cursor->at, sizeof head);
    if (head.rta_len < sizeof head || head.rta_len > left)
        return -EBADMSG;
    attribute->type = head.rta_type & NLA_TYPE_MASK;
    attribute->size = (uint16_t)(head.rta_len - sizeof head);
    attribute->data = cursor->at + sizeof head;
    cursor->at += ALIGN(head.rta_len) < left ? ALIGN(head.rta_len) : left;
    return 1;
}

static INLINE int read_u32(const struct attribute *attribute, uint32_t *to)
{
    if (attribute->size < 4)
        return -EBADMSG;
    memcpy(to, attribute->data, 4);
    return 0;
}

/* 4 or 16 bytes, each of which is a move or two. */
static INLINE void copy_address(uint8_t *to, const uint8_t *from, size_t size)
{
    if (size == 16)
        memcpy(to, from, 16);
    else
        memcpy(to, from, 4);
}

static INLINE size_t address_size(uint8_t family)
{
    return family == AF_INET6 ? 16 : 4;
}

/* An address attribute; its family follows from its size. */
static INLINE int read_address(const struct attribute *attribute, uint8_t to[16], uint8_t *family)
{
    if (attribute->size != 4 && attribute->size != 16)
        return -EBADMSG;
    copy_address(to, attribute->data, attribute->size);
    if (family)
        *family = attribute->size == 4 ? AF_INET : AF_INET6;
    return 0;
}

/* The attributes of a message behind a header of `head` bytes, which are copied out. */
static INLINE struct cursor open_message(const struct fdp_message *message, void *to, size_t head)
{
    struct cursor cursor = {message->body + ALIGN(head), message->body + message->size};

    memcpy(to, message->body, head);
    if (cursor.at > cursor.end)
        cursor.at = cursor.end;
    return cursor;
}

#endif
