/* SPDX-License-Identifier: Apache-2.0 */
#include "threads.h"

#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define STEP_MS 1

/* What the handler has to do. It runs in the other thread, between any two of its
 * instructions, so it uses system calls and this alone. */
static struct {
    uint64_t keep;
    int no_new_privs;
    _Atomic pid_t wanted; /* the thread that is asked; 0: none */
    _Atomic int result;
} job;

static int drop(uint64_t keep, int no_new_privs)
{
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    if (syscall(SYS_capget, &head, data))
        return -errno;
    if (data[0].effective & (1u << CAP_SETPCAP))
        for (unsigned long n = 0; n < 64; n++) {
            long held = syscall(SYS_prctl, PR_CAPBSET_READ, n, 0, 0, 0);

            if (held < 0)
                break; /* beyond the last capability of this kernel */
            if (held && !(keep >> n & 1) && syscall(SYS_prctl, PR_CAPBSET_DROP, n, 0, 0, 0))
                return -errno;
        }
    for (int half = 0; half < 2; half++) {
        uint32_t kept = (uint32_t)(keep >> 32 * half);

        data[half].effective &= kept;
        data[half].permitted &= kept;
        data[half].inheritable &= kept;
    }
    if (syscall(SYS_capset, &head, data))
        return -errno;
    if (no_new_privs && syscall(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -errno;
    return 0;
}

static void handle(int number)
{
    int before = errno;

    (void)number;
    if (atomic_load(&job.wanted) == (pid_t)syscall(SYS_gettid)) {
        atomic_store(&job.result, drop(job.keep, job.no_new_privs));
        atomic_store(&job.wanted, 0);
    }
    errno = before;
}

int fdp_drop_in_thread(pid_t tid, uint64_t keep, int no_new_privs, int wait_ms)
{
    struct sigaction action, old;
    const struct timespec step = {.tv_nsec = STEP_MS * 1000000L};
    int number = SIGRTMAX, result = -ETIMEDOUT;

    memset(&action, 0, sizeof action);
    action.sa_handler = handle;
    action.sa_flags = SA_RESTART;
    sigfillset(&action.sa_mask);
    if (sigaction(number, &action, &old))
        return -errno;
    job.keep = keep;
    job.no_new_privs = no_new_privs;
    atomic_store(&job.result, 0);
    atomic_store(&job.wanted, tid);
    if (syscall(SYS_tgkill, getpid(), tid, number))
        result = errno == ESRCH ? 0 : -errno;
    else
        for (int waited = 0; waited <= wait_ms; waited += STEP_MS) {
            if (!atomic_load(&job.wanted)) {
                result = atomic_load(&job.result);
                break;
            }
            if (syscall(SYS_tgkill, getpid(), tid, 0) && errno == ESRCH) {
                result = 0;
                break;
            }
            nanosleep(&step, NULL);
        }
    /* Where the signal is still to come it must find the handler, which then does nothing:
     * its default ends the process. */
    if (result != -ETIMEDOUT)
        sigaction(number, &old, NULL);
    atomic_store(&job.wanted, 0);
    return result;
}
