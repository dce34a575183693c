/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs a harness without libFuzzer: HARNESS RUNS [SEED-FILE]...
 *
 * Every seed is tried as it is and cut off after every byte, then RUNS inputs
 * are made out of seeds by a generator with a fixed start, so that two runs do
 * the same. With RUNS 0 nothing is changed: that repeats a failure from a file.
 * The input that made the harness stop is written to standard error.
 */
#include "fuzz.h"

#include <signal.h>
#include <unistd.h>

#define SIZE 512
#define SEEDS 256

static uint8_t seeds[SEEDS][SIZE];
static size_t sizes[SEEDS];
static size_t seed_count;

static uint8_t *current;
static size_t current_size;

/* Also called by the sanitizers when they have found something. */
void __asan_on_error(void);
void __asan_on_error(void)
{
    static const char digits[] = "0123456789abcdef";
    char text[2 * SIZE + 1];
    size_t length = 0;

    for (size_t i = 0; i < current_size; i++) {
        text[length++] = digits[current[i] >> 4];
        text[length++] = digits[current[i] & 15];
    }
    text[length++] = '\n';
    if (write(STDERR_FILENO, text, length) < 0)
        _exit(2);
}

static void stopped(int number)
{
    __asan_on_error();
    signal(number, SIG_DFL);
    raise(number);
}

/* xorshift64*, from Vigna, "An experimental exploration of Marsaglia's xorshift
 * generators, scrambled" (2016). */
static uint64_t state = 88172645463325252u;

static uint32_t chance(uint32_t below)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 0x2545f4914f6cdd1du) >> 32) % below;
}

/* A block of exactly this size, so that one byte too far is noticed. */
static void run(const uint8_t *data, size_t size)
{
    current = malloc(size ? size : 1);
    if (!current)
        exit(2);
    memcpy(current, data, size);
    current_size = size;
    LLVMFuzzerTestOneInput(current, size);
    free(current);
    current = NULL;
    current_size = 0;
}

static void read_seed(const char *path)
{
    FILE *file = fopen(path, "rb");

    if (!file || seed_count == SEEDS) {
        fprintf(stderr, "%s: not readable, or one seed too many\n", path);
        exit(2);
    }
    sizes[seed_count] = fread(seeds[seed_count], 1, SIZE, file);
    seed_count++;
    fclose(file);
}

static size_t mutate(uint8_t *data)
{
    static const uint8_t telling[] = {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 0x7f, 0x80, 0xfe, 0xff};
    const size_t seed = chance((uint32_t)seed_count);
    size_t size = sizes[seed];

    memcpy(data, seeds[seed], size);
    for (uint32_t changes = chance(8) + 1; changes > 0; changes--) {
        size_t at = size ? chance((uint32_t)size) : 0;
        size_t length = 1 + chance(16);

        switch (chance(7)) {
        case 0:
            if (size)
                data[at] = (uint8_t)chance(256);
            break;
        case 1:
            if (size)
                data[at] ^= (uint8_t)(1 << chance(8));
            break;
        case 2:
            if (size)
                data[at] = telling[chance(sizeof telling)];
            break;
        case 3: /* cut off */
            size = at;
            break;
        case 4: /* cut out */
            if (at + length <= size) {
                memmove(data + at, data + at + length, size - at - length);
                size -= length;
            }
            break;
        case 5: /* repeat */
            if (at + length <= size && size + length <= SIZE) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
            break;
        default: { /* append the end of another seed */
            size_t other = chance((uint32_t)seed_count);
            size_t from = sizes[other] ? chance((uint32_t)sizes[other]) : 0;
            size_t rest = sizes[other] - from;

            rest = rest < SIZE - size ? rest : SIZE - size;
            memcpy(data + size, seeds[other] + from, rest);
            size += rest;
        }
        }
    }
    return size;
}

int main(int count, char **arguments)
{
    uint8_t data[SIZE];
    unsigned long long runs = count > 1 ? strtoull(arguments[1], NULL, 10) : 0;

    signal(SIGABRT, stopped);
    for (int i = 2; i < count; i++)
        read_seed(arguments[i]);
    if (!seed_count) { /* start from nothing */
        for (size_t i = 0; i < 16; i++)
            sizes[i] = i * SIZE / 16;
        for (seed_count = 0; seed_count < 16; seed_count++)
            for (size_t i = 0; i < sizes[seed_count]; i++)
                seeds[seed_count][i] = (uint8_t)chance(256);
    }
    for (size_t i = 0; i < seed_count; i++)
        for (size_t size = 0; size <= sizes[i]; size++)
            run(seeds[i], size);
    for (unsigned long long i = 0; i < runs; i++)
        run(data, mutate(data));
    printf("%llu runs from %zu seeds\n", runs, seed_count);
    return 0;
}
