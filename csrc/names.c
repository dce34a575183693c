/* SPDX-License-Identifier: Apache-2.0 */
#include "names.h"

#include "siphash.h"

#include <errno.h>

static const uint8_t *name_of(const struct fdp_claims *claims, uint32_t number, size_t *size)
{
    const uint8_t *at = claims->names + claims->rows[number].name;
    uint16_t stored;

    memcpy(&stored, at, sizeof stored);
    *size = stored;
    return at + sizeof stored;
}

static uint32_t hash_of(const struct fdp_names *names, const void *text, size_t size)
{
    const uint8_t *at = text;
    uint64_t words[8] = {size};

    for (;;) {
        const size_t part = size < 56 ? size : 56;

        memset(words + 1, 0, sizeof words - sizeof *words);
        memcpy(words + 1, at, part);
        words[0] = fdp_siphash(names->key, words, 1 + (part + 7) / 8);
        at += part;
        size -= part;
        if (!size)
            return (uint32_t)words[0];
    }
}

static uint32_t hash_claim(const struct fdp_names *names, const struct fdp_claims *claims,
                           uint32_t number)
{
    size_t size;
    const uint8_t *name = name_of(claims, number, &size);

    return hash_of(names, name, size);
}

/* The slot of this name, or the free one where it would be. */
static uint32_t slot_of(const struct fdp_names *names, const struct fdp_claims *claims,
                        const void *name, size_t size)
{
    uint32_t at = hash_of(names, name, size) & names->mask;

    for (; names->slots[at]; at = (at + 1) & names->mask) {
        size_t held_size;
        const uint8_t *held = name_of(claims, names->slots[at] - 1, &held_size);

        if (held_size == size && memcmp(held, name, size) == 0)
            break;
    }
    return at;
}

static void put(struct fdp_names *names, const struct fdp_claims *claims, uint32_t number)
{
    size_t size;
    const uint8_t *name = name_of(claims, number, &size);
    const uint32_t at = slot_of(names, claims, name, size);

    if (names->slots[at]) {
        names->twice = 1;
        return;
    }
    names->slots[at] = number + 1;
    names->count++;
}

int fdp_names_build(struct fdp_names *names, const struct fdp_claims *claims,
                    fdp_realloc_fn realloc)
{
    uint32_t slots = 16;

    while (slots < claims->count + claims->count / 2 + 8)
        slots *= 2;
    fdp_names_free(names, realloc);
    names->slots = realloc(NULL, (size_t)slots * sizeof *names->slots);
    if (!names->slots)
        return -ENOMEM;
    memset(names->slots, 0, (size_t)slots * sizeof *names->slots);
    names->mask = slots - 1;
    for (uint32_t i = 0; i < claims->count && !names->twice; i++)
        put(names, claims, i);
    return 0;
}

int64_t fdp_names_find(const struct fdp_names *names, const struct fdp_claims *claims,
                       const char *name, size_t size)
{
    return (int64_t)names->slots[slot_of(names, claims, name, size)] - 1;
}

int fdp_names_add(struct fdp_names *names, const struct fdp_claims *claims, uint32_t number,
                  fdp_realloc_fn realloc)
{
    if ((names->count + 1) * 5 / 4 > names->mask)
        return fdp_names_build(names, claims, realloc); /* this claim, too */
    put(names, claims, number);
    return 0;
}

void fdp_names_remove(struct fdp_names *names, const struct fdp_claims *claims, uint32_t number,
                      uint32_t last)
{
    size_t size;
    const uint8_t *name = name_of(claims, number, &size);
    uint32_t hole = slot_of(names, claims, name, size);

    if (names->slots[hole]) {
        names->slots[hole] = 0;
        names->count--;
        for (uint32_t at = (hole + 1) & names->mask; names->slots[at]; at = (at + 1) & names->mask) {
            const uint32_t home = hash_claim(names, claims, names->slots[at] - 1) & names->mask;

            if (((at - home) & names->mask) < ((at - hole) & names->mask))
                continue; /* it would come before the place where it is looked for */
            names->slots[hole] = names->slots[at];
            names->slots[at] = 0;
            hole = at;
        }
    }
    if (last != number) {
        name = name_of(claims, last, &size);
        names->slots[slot_of(names, claims, name, size)] = number + 1;
    }
}

void fdp_names_free(struct fdp_names *names, fdp_realloc_fn realloc)
{
    if (names->slots)
        realloc(names->slots, 0);
    names->slots = NULL;
    names->mask = names->count = 0;
    names->twice = 0;
}
