/* SPDX-License-Identifier: Apache-2.0
 *
 * What the fuzz harnesses share: bytes taken from an input one after the other,
 * a check that stops the program, and memory that comes from the C library.
 */
#ifndef FDP_FUZZ_H
#define FDP_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                  \
        }                                                                             \
    } while (0)

static inline void *fuzz_realloc(void *old, size_t size)
{
    if (size == 0) {
        free(old);
        return NULL;
    }
    return realloc(old, size);
}

struct input {
    const uint8_t *at, *end;
};

/* The next byte; 0 when there are no more. */
static inline uint8_t take(struct input *input)
{
    return input->at < input->end ? *input->at++ : 0;
}

#endif
