/* SPDX-License-Identifier: Apache-2.0
 *
 * What each kind of table is read and written with: the other half of fdp_layouts, which
 * says how its rows are laid out. A kind is one C file that ends in its operations; kinds.c
 * lists them.
 */
#ifndef FDP_KINDS_H
#define FDP_KINDS_H

#include "job.h"
#include "rtnl.h"

struct fdp_kind_ops {
    /* A table that rtnetlink carries: the type of its messages (RTM_NEW..; RTM_DEL.. is the
     * next number), the bytes of their header, and the functions behind fdp_encode_dump(),
     * fdp_encode_get() (NULL: the kernel answers for whole tables only), fdp_encode() and
     * fdp_decode(), which has checked type and size and set the row to zero. */
    uint16_t message, head;
    size_t (*encode_dump)(const struct fdp_scope *scope, uint32_t seq, uint8_t *to);
    size_t (*encode_get)(const void *row, uint32_t seq, uint8_t *to);
    size_t (*encode)(enum fdp_op_kind op, const void *row, uint32_t seq, uint16_t flags,
                     uint8_t *to);
    int (*decode)(const struct fdp_scope *scope, const struct fdp_message *message, void *row);
    /* Whether this errno of a removal says that the row is gone already, beside the errnos of
     * fdp_benign(); NULL: none does. */
    int (*is_gone)(const void *row, int error);

    /* Any other table: the functions behind fdp_dump() and fdp_apply(). */
    int (*dump)(const struct fdp_scope *scope, uint8_t *room, fdp_sink sink, void *context);
    int (*apply)(struct fdp_socket *sock, struct fdp_job *job, uint32_t from, uint32_t to);
};

extern const struct fdp_kind_ops fdp_neighbour_ops, fdp_fdb_ops, fdp_nexthop_ops, fdp_route_ops,
    fdp_peer_ops, fdp_fdb_any_ops;
extern const struct fdp_kind_ops *const fdp_kinds[FDP_KINDS];

/* Write one change. `row` is the desired row (add, replace) or the kernel's
 * (remove). An added route or nexthop is exclusive: it never overwrites. Length, at
 * most FDP_MESSAGE_MAX, or 0. Inline, as it is called for every message. */
static inline size_t fdp_encode(enum fdp_kind kind, enum fdp_op_kind op, const void *row,
                                uint32_t seq, uint16_t more_flags, uint8_t *to)
{
    const struct fdp_kind_ops *ops = fdp_kinds[kind];

    return ops->encode ? ops->encode(op, row, seq, more_flags, to) : 0;
}

#endif
