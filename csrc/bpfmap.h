/* SPDX-License-Identifier: Apache-2.0
 *
 * bpf(2) on existing objects: pinned maps and programs are opened, looked
 * at, and maps read and written in batches. Nothing is compiled or loaded here.
 *
 * No function allocates; buffers belong to the caller. All results are 0 or
 * more for success, a negative errno for failure.
 */
#ifndef FDP_BPFMAP_H
#define FDP_BPFMAP_H

#include <stdint.h>

struct fdp_map_info {
    uint32_t type, id, key_size, value_size, max_entries, flags;
    char name[16];
};

struct fdp_prog_info {
    uint32_t type, id, map_count;
    uint32_t maps[16]; /* ids */
    uint64_t run_ns, runs; /* counted while kernel.bpf_stats_enabled is 1 */
    uint8_t tag[8];
    char name[16];
};

/* BPF_OBJ_GET: a descriptor of what is pinned at `path`. */
int fdp_bpf_open(const char *path);

/* BPF_OBJ_PIN. -EEXIST where something is pinned there already. */
int fdp_bpf_pin(int fd, const char *path);

int fdp_map_describe(int fd, struct fdp_map_info *info);
int fdp_prog_describe(int fd, struct fdp_prog_info *info);

/* A new map: for tests and measurements (`bpftool map create`). Descriptor. */
int fdp_map_create(uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
                   uint32_t flags, const char *name);

int fdp_map_lookup(int fd, const void *key, void *value);
int fdp_map_update(int fd, const void *key, const void *value, uint64_t flags);
int fdp_map_delete(int fd, const void *key);

/* Where a reading of a whole map stands: begin with all zero. */
struct fdp_map_reading {
    uint8_t token[64]; /* no key of ours is longer */
    uint8_t begun;
};

/* The next entries of a map: up to `*count`, which becomes how many there were. 1: there
 * is more, 0: that was all, -ENOSPC: `*count` is too small for a bucket of the hash. */
int fdp_map_read(int fd, struct fdp_map_reading *reading, void *keys, void *values,
                 uint32_t *count);

/* Write or delete `*count` entries, which becomes how many were done before the first
 * that could not be: that is the one which the error is about. */
int fdp_map_update_many(int fd, const void *keys, const void *values, uint32_t *count);
int fdp_map_delete_many(int fd, const void *keys, uint32_t *count);

/* One value of a per-CPU map: 64-bit fields of all processors (`cpus` times `fields`)
 * into one of each. Bit i of `newest` takes the largest of field i and not the sum. */
void fdp_percpu_merge(const uint64_t *values, uint32_t cpus, uint32_t fields, uint32_t newest,
                      uint64_t *merged);

#endif
