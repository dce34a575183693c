/* SPDX-License-Identifier: Apache-2.0
 *
 * Capabilities are a thread's (capabilities(7)), and only the thread itself can
 * give them up. Another one is made to by a signal, as glibc does it for
 * setuid(2) and libpsx for capset(2).
 */
#ifndef FDP_THREADS_H
#define FDP_THREADS_H

#include <stdint.h>
#include <sys/types.h>

/* Have thread `tid` of this process give up all capabilities but `keep`, a mask,
 * cut its bounding set to them and, if asked for, set no_new_privs. Returns 0,
 * also when there is no such thread any more, or a negative errno: -ETIMEDOUT
 * when it did not run for `wait_ms`, which a thread that blocks signals does not.
 * For one caller at a time. */
int fdp_drop_in_thread(pid_t tid, uint64_t keep, int no_new_privs, int wait_ms);

#endif
