/* SPDX-License-Identifier: Apache-2.0 */
#include "bpfmap.h"

#include <errno.h>
#include <linux/bpf.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int call(enum bpf_cmd command, union bpf_attr *attr)
{
    long result = syscall(SYS_bpf, command, attr, sizeof *attr);

    return result < 0 ? -errno : (int)result;
}

static uint64_t address(const void *pointer)
{
    return (uint64_t)(uintptr_t)pointer;
}

int fdp_bpf_open(const char *path)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.pathname = address(path);
    return call(BPF_OBJ_GET, &attr);
}

int fdp_bpf_pin(int fd, const char *path)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.pathname = address(path);
    attr.bpf_fd = (uint32_t)fd;
    return call(BPF_OBJ_PIN, &attr);
}

/* The kernel writes as much as it knows of `info`, and leaves the rest as it is. */
static int describe(int fd, void *info, uint32_t size)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.info.bpf_fd = (uint32_t)fd;
    attr.info.info = address(info);
    attr.info.info_len = size;
    return call(BPF_OBJ_GET_INFO_BY_FD, &attr);
}

int fdp_map_describe(int fd, struct fdp_map_info *info)
{
    struct bpf_map_info raw;

    memset(&raw, 0, sizeof raw);
    int err = describe(fd, &raw, sizeof raw);
    info->type = raw.type;
    info->id = raw.id;
    info->key_size = raw.key_size;
    info->value_size = raw.value_size;
    info->max_entries = raw.max_entries;
    info->flags = raw.map_flags;
    memcpy(info->name, raw.name, sizeof info->name);
    return err;
}

int fdp_prog_describe(int fd, struct fdp_prog_info *info)
{
    struct bpf_prog_info raw;
    const uint32_t room = sizeof info->maps / sizeof info->maps[0];

    memset(&raw, 0, sizeof raw);
    memset(info, 0, sizeof *info);
    raw.nr_map_ids = room;
    raw.map_ids = address(info->maps);
    int err = describe(fd, &raw, sizeof raw);
    info->type = raw.type;
    info->id = raw.id;
    info->map_count = raw.nr_map_ids < room ? raw.nr_map_ids : room;
    info->run_ns = raw.run_time_ns;
    info->runs = raw.run_cnt;
    memcpy(info->tag, raw.tag, sizeof info->tag);
    memcpy(info->name, raw.name, sizeof info->name);
    return err;
}

int fdp_map_create(uint32_t type, uint32_t key_size, uint32_t value_size, uint32_t max_entries,
                   uint32_t flags, const char *name)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.map_type = type;
    attr.key_size = key_size;
    attr.value_size = value_size;
    attr.max_entries = max_entries;
    attr.map_flags = flags;
    strncpy(attr.map_name, name, sizeof attr.map_name - 1);
    return call(BPF_MAP_CREATE, &attr);
}

static int one(enum bpf_cmd command, int fd, const void *key, const void *value, uint64_t flags)
{
    union bpf_attr attr;

    memset(&attr, 0, sizeof attr);
    attr.map_fd = (uint32_t)fd;
    attr.key = address(key);
    attr.value = address(value);
    attr.flags = flags;
    return call(command, &attr);
}

int fdp_map_lookup(int fd, const void *key, void *value)
{
    return one(BPF_MAP_LOOKUP_ELEM, fd, key, value, 0);
}

int fdp_map_update(int fd, const void *key, const void *value, uint64_t flags)
{
    return one(BPF_MAP_UPDATE_ELEM, fd, key, value, flags);
}

int fdp_map_delete(int fd, const void *key)
{
    return one(BPF_MAP_DELETE_ELEM, fd, key, NULL, 0);
}

int fdp_map_read(int fd, struct fdp_map_reading *reading, void *keys, void *values,
                 uint32_t *count)
{
    union bpf_attr attr;
    uint8_t next[sizeof reading->token];

    memset(&attr, 0, sizeof attr);
    memset(next, 0, sizeof next);
    attr.batch.map_fd = (uint32_t)fd;
    attr.batch.in_batch = reading->begun ? address(reading->token) : 0;
    attr.batch.out_batch = address(next);
    attr.batch.keys = address(keys);
    attr.batch.values = address(values);
    attr.batch.count = *count;
    int err = call(BPF_MAP_LOOKUP_BATCH, &attr);
    *count = err && err != -ENOENT ? 0 : attr.batch.count;
    if (err)
        return err == -ENOENT ? 0 : err;
    memcpy(reading->token, next, sizeof next);
    reading->begun = 1;
    return 1;
}

static int many(enum bpf_cmd command, int fd, const void *keys, const void *values,
                uint32_t *count)
{
    union bpf_attr attr;

    if (!*count)
        return 0;
    memset(&attr, 0, sizeof attr);
    attr.batch.map_fd = (uint32_t)fd;
    attr.batch.keys = address(keys);
    attr.batch.values = address(values);
    attr.batch.count = *count;
    int err = call(command, &attr);
    /* A kernel that rejects the call itself leaves the count as it was. */
    *count = err && attr.batch.count >= *count ? 0 : attr.batch.count;
    return err;
}

int fdp_map_update_many(int fd, const void *keys, const void *values, uint32_t *count)
{
    return many(BPF_MAP_UPDATE_BATCH, fd, keys, values, count);
}

int fdp_map_delete_many(int fd, const void *keys, uint32_t *count)
{
    return many(BPF_MAP_DELETE_BATCH, fd, keys, NULL, count);
}

void fdp_percpu_merge(const uint64_t *values, uint32_t cpus, uint32_t fields, uint32_t newest,
                      uint64_t *merged)
{
    for (uint32_t field = 0; field < fields; field++) {
        uint64_t total = 0;

        for (uint32_t cpu = 0; cpu < cpus; cpu++) {
            uint64_t value = values[cpu * fields + field];

            if (newest >> field & 1)
                total = value > total ? value : total;
            else
                total += value;
        }
        merged[field] = total;
    }
}
