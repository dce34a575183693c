/* SPDX-License-Identifier: Apache-2.0
 *
 * An index of claims by their names: to find one must not take a look at all of them.
 */
#ifndef FDP_NAMES_H
#define FDP_NAMES_H

#include "claim.h"

struct fdp_names {
    uint32_t *slots; /* a claim's number + 1; 0 is free */
    uint32_t mask, count;
    uint64_t key[2]; /* that nobody who names a node can know */
    uint8_t twice;   /* two claims have one name: the index does not say which is the first */
};

/* Index all claims afresh. 0 or -ENOMEM, and then there is no index (slots is NULL). */
int fdp_names_build(struct fdp_names *names, const struct fdp_claims *claims,
                    fdp_realloc_fn realloc);

/* The number of the claim with this name, or -1. */
int64_t fdp_names_find(const struct fdp_names *names, const struct fdp_claims *claims,
                       const char *name, size_t size);

/* Claim `number` is there as well now. 0 or -ENOMEM. */
int fdp_names_add(struct fdp_names *names, const struct fdp_claims *claims, uint32_t number,
                  fdp_realloc_fn realloc);

/* Claim `number` will go, and claim `last` will have its number; call it before they do. */
void fdp_names_remove(struct fdp_names *names, const struct fdp_claims *claims, uint32_t number,
                      uint32_t last);

void fdp_names_free(struct fdp_names *names, fdp_realloc_fn realloc);

#endif
