/* SPDX-License-Identifier: Apache-2.0
 *
 * The memory behind tables: small blocks from malloc(), large ones mapped, so
 * that what a large table held is given back when it goes, however many others
 * were made meanwhile, and grows without being copied.
 */
#ifndef FDP_HEAP_H
#define FDP_HEAP_H

#include <stddef.h>

/* realloc(); a size of 0 frees and returns NULL. */
void *fdp_heap(void *old, size_t size);

/* Give the system back what malloc() holds unused, where libc can. */
void fdp_heap_trim(void);

#endif
