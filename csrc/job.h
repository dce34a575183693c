/* SPDX-License-Identifier: Apache-2.0
 *
 * A job: operations of a difference on their way to the kernel, and what became of each.
 */
#ifndef FDP_JOB_H
#define FDP_JOB_H

#include "table.h"

#define FDP_UNKNOWN (-1)   /* result: the reply was lost; read the table again */
#define FDP_SKIPPED (-2)   /* result: not sent, an earlier table failed for this tag */
#define FDP_UNSENT (-3)    /* result: not tried yet */

/* What the kernel said about the first failures of an apply. */
struct fdp_complaint {
    uint32_t op;
    int32_t error;
    char text[120];
};

struct fdp_job {
    const struct fdp_table *desired;
    const uint8_t *old;        /* rows that removals refer to */
    const struct fdp_op *ops;
    int32_t *results;          /* per op: 0, a positive errno, or FDP_UNKNOWN .. */
    uint8_t *broken;           /* per tag: set where a write failed; NULL: not kept */
    uint32_t tags;             /* length of broken */
    struct fdp_complaint *complaints;
    uint32_t complaint_room, complaint_count;
    uint32_t failed, unknown, skipped;
};

/* The row that an operation writes, or removes. */
const void *fdp_job_row(const struct fdp_job *job, const struct fdp_op *op);

/* An operation failed: its result, and, unless that is a success, all that follows from it. */
void fdp_note_failure(struct fdp_job *job, uint32_t number, int error, const char *text);

/* Is this errno a success for that operation (gone already, ..)? */
int fdp_benign(enum fdp_op_kind op, int error);

#endif
