/* SPDX-License-Identifier: Apache-2.0 */
#include "job.h"

#include <errno.h>
#include <string.h>

int fdp_benign(enum fdp_op_kind op, int error)
{
    return op == FDP_REMOVE &&
           (error == ENOENT || error == ESRCH || error == ENODEV || error == ENXIO);
}

const void *fdp_job_row(const struct fdp_job *job, const struct fdp_op *op)
{
    const struct fdp_layout *layout = job->desired->layout;

    if (op->kind == FDP_REMOVE)
        return job->old + (size_t)op->old * layout->row;
    return fdp_table_row(job->desired, op->desired);
}

void fdp_note_failure(struct fdp_job *job, uint32_t number, int error, const char *text)
{
    const struct fdp_op *op = &job->ops[number];

    job->results[number] = error;
    if (fdp_benign((enum fdp_op_kind)op->kind, error))
        return;
    job->failed++;
    if (op->kind != FDP_REMOVE && job->broken) {
        uint32_t tag = *fdp_row_tag(job->desired->layout, (void *)fdp_job_row(job, op));

        if (tag < job->tags)
            job->broken[tag] = 1;
    }
    if (job->complaint_count < job->complaint_room) {
        struct fdp_complaint *complaint = &job->complaints[job->complaint_count++];
        size_t length = strnlen(text, sizeof complaint->text - 1);

        complaint->op = number;
        complaint->error = error;
        memcpy(complaint->text, text, length);
        complaint->text[length] = 0;
    }
}
