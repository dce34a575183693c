/* SPDX-License-Identifier: Apache-2.0 */
#include "heap.h"

#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* malloc() maps large blocks, too, but raises its own threshold with every one
 * that is freed (mallopt(3), M_MMAP_THRESHOLD), and then keeps what it gets. */
#define LARGE ((size_t)128 * 1024)

struct head {
    _Alignas(16) size_t mapped; /* bytes of the mapping; 0: from malloc() */
    size_t size;                /* bytes of the block, this head included */
};

static struct head *map(size_t size)
{
    size_t whole = (size + 4095) & ~(size_t)4095;
    struct head *head =
        mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (head == MAP_FAILED)
        return NULL;
    head->mapped = whole;
    return head;
}

static struct head *remap(struct head *head, size_t size)
{
    size_t whole = (size + 4095) & ~(size_t)4095;
    struct head *moved = mremap(head, head->mapped, whole, MREMAP_MAYMOVE);

    if (moved == MAP_FAILED)
        return NULL;
    moved->mapped = whole;
    return moved;
}

static void release(struct head *head)
{
    if (head->mapped)
        munmap(head, head->mapped);
    else
        free(head);
}

static struct head *resize(struct head *old, size_t size)
{
    if (old && old->mapped && size >= LARGE)
        return remap(old, size);
    if ((!old || !old->mapped) && size < LARGE) {
        struct head *head = realloc(old, size);

        if (head)
            head->mapped = 0;
        return head;
    }
    struct head *head = size >= LARGE ? map(size) : malloc(size);
    if (!head)
        return NULL;
    if (size < LARGE)
        head->mapped = 0;
    if (old) {
        memcpy(head + 1, old + 1, (old->size < size ? old->size : size) - sizeof *head);
        release(old);
    }
    return head;
}

void *fdp_heap(void *old, size_t size)
{
    struct head *head = old ? (struct head *)old - 1 : NULL;

    if (!size) {
        if (head)
            release(head);
        return NULL;
    }
    if (size > SIZE_MAX / 2)
        return NULL;
    head = resize(head, size + sizeof *head);
    if (!head)
        return NULL;
    head->size = size + sizeof *head;
    return head + 1;
}

void fdp_heap_trim(void)
{
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}
