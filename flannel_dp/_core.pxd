# cython: language_level=3
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "heap.h" nogil:
    void *fdp_heap(void *old, size_t size)
    void fdp_heap_trim()


cdef extern from "threads.h" nogil:
    int fdp_drop_in_thread(int tid, uint64_t keep, int no_new_privs, int wait_ms)


cdef extern from "table.h" nogil:
    enum fdp_kind:
        FDP_NEIGHBOUR, FDP_FDB, FDP_NEXTHOP, FDP_ROUTE, FDP_PEER, FDP_FDB_ANY, FDP_KINDS

    struct fdp_neighbour:
        uint32_t ifindex
        uint8_t family
        uint8_t address[16]
        uint8_t mac[6]
        uint16_t state
        uint32_t tag
        uint8_t other

    struct fdp_fdb:
        uint32_t ifindex
        uint8_t mac[6]
        uint8_t on_nexthop
        uint32_t src_vni
        uint8_t endpoint[16]
        uint32_t vni, via, nexthop
        uint16_t port
        uint8_t family
        uint16_t state
        uint8_t other
        uint32_t tag

    struct fdp_remote:
        uint8_t endpoint[16]
        uint32_t vni, via
        uint16_t port
        uint8_t family

    struct fdp_fdb_any:
        uint32_t ifindex
        uint8_t mac[6]
        uint16_t vlan
        uint32_t src_vni
        fdp_remote listed
        uint8_t place, many
        fdp_remote remote
        uint32_t nexthop
        uint16_t state
        uint8_t flags
        uint32_t tag, master
        uint8_t shown

    enum:
        FDP_SELF, FDP_MASTER
        FDP_LISTED
        FDP_LEARNED, FDP_STICKY, FDP_ROUTER

    struct fdp_nexthop:
        uint32_t id
        uint8_t gateway[16]
        uint32_t ifindex
        uint8_t family, onlink, protocol, other
        uint32_t tag

    struct fdp_route:
        uint8_t family, length, tos
        uint32_t table, metric
        uint8_t prefix[16]
        uint8_t gateway[16]
        uint32_t nexthop, ifindex
        uint8_t gateway_family, onlink, protocol, type, other
        uint16_t mtu
        uint32_t tag

    struct fdp_peer:
        uint32_t map
        uint8_t family, length
        uint8_t prefix[16]
        uint8_t endpoint[16]
        uint8_t mac[6]
        uint8_t endpoint_family
        uint32_t tag

    union fdp_row:
        fdp_neighbour neighbour
        fdp_fdb fdb
        fdp_nexthop nexthop
        fdp_route route
        fdp_peer peer
        fdp_fdb_any fdb_any
        uint8_t bytes[96]

    struct fdp_layout:
        uint16_t key, target, value, row
        uint8_t many

    const fdp_layout fdp_layouts[]

    ctypedef void *(*fdp_realloc_fn)(void *old, size_t bytes) noexcept nogil

    struct fdp_table:
        const fdp_layout *layout
        uint8_t *rows
        uint32_t count, room, mask
        uint8_t kind

    void fdp_table_init(fdp_table *table, fdp_kind kind, uint64_t seed, fdp_realloc_fn realloc)
    void fdp_table_free(fdp_table *table)
    int fdp_table_reserve(fdp_table *table, uint32_t count)
    int fdp_table_put(fdp_table *table, const void *row)
    int64_t fdp_table_find(const fdp_table *table, const void *key)
    int fdp_table_remove(fdp_table *table, const void *key)
    uint8_t *fdp_table_row(const fdp_table *table, uint32_t number)
    uint32_t *fdp_row_tag(const fdp_layout *layout, void *row)

    enum fdp_owner:
        FDP_SKIP, FDP_OURS, FDP_FOREIGN, FDP_YIELDS, FDP_SHARED

    enum fdp_op_kind:
        FDP_ADD, FDP_REPLACE, FDP_REMOVE

    const uint32_t FDP_NONE

    struct fdp_op:
        uint32_t kind, desired, old

    struct fdp_diff:
        const fdp_table *desired
        uint8_t *old
        fdp_op *ops
        uint32_t old_count, old_room, writes, removes
        uint32_t adds, unchanged, observed, foreign, conflicts
        uint8_t removes_first

    int fdp_diff_begin(fdp_diff *diff, const fdp_table *desired, fdp_realloc_fn realloc)
    void fdp_diff_restart(fdp_diff *diff)
    int fdp_diff_feed(fdp_diff *diff, const void *row, fdp_owner owner)
    int fdp_diff_feed_many(fdp_diff *diff, const void *rows, size_t stride,
                           const uint8_t *owners, uint32_t count)
    int fdp_diff_finish(fdp_diff *diff)
    int fdp_row_misfits(fdp_kind kind, const void *row)
    int fdp_diff_misfit(const fdp_diff *diff, const uint8_t **row, const uint8_t **second)
    uint16_t fdp_fdb_state(uint16_t state)
    bint fdp_has_list(const uint8_t *mac)
    void fdp_fdb_widen(const fdp_fdb *row, fdp_fdb_any *to)
    void fdp_fdb_settle(fdp_fdb_any *row, const fdp_remote *remote)
    fdp_remote *fdp_fdb_remote(fdp_fdb_any *row)
    bint fdp_rows_differ(const fdp_layout *layout, const void *row, const void *other)
    uint32_t fdp_diff_next_conflict(const fdp_diff *diff, uint32_t start)
    void fdp_diff_adopt(fdp_diff *diff, uint32_t old)
    void fdp_diff_free(fdp_diff *diff)
    uint8_t *fdp_diff_old(const fdp_diff *diff, uint32_t number)


cdef extern from "job.h" nogil:
    enum:
        FDP_UNKNOWN
        FDP_SKIPPED
        FDP_UNSENT

    struct fdp_complaint:
        uint32_t op
        int32_t error
        char text[120]

    struct fdp_job:
        const fdp_table *desired
        const uint8_t *old
        const fdp_op *ops
        int32_t *results
        uint8_t *broken
        uint32_t tags
        fdp_complaint *complaints
        uint32_t complaint_room, complaint_count
        uint32_t failed, unknown, skipped

    int fdp_benign(fdp_op_kind op, int error)


cdef extern from "rtnl.h" nogil:
    enum:
        FDP_TX_SIZE
        FDP_RX_SIZE
        FDP_MESSAGE_MAX

    struct fdp_scope:
        uint8_t kind, family, protocol, exclusive, marked, length, type, owner, sides
        uint32_t ifindex, table, id_first, id_last
        uint8_t prefix[16]

    struct fdp_message:
        uint16_t type, flags
        uint32_t seq
        uint32_t port
        const uint8_t *body
        uint32_t size

    int fdp_next_message(const uint8_t **at, const uint8_t *end, fdp_message *message)
    size_t fdp_encode_dump(const fdp_scope *scope, uint32_t seq, uint8_t *to)
    int fdp_decode(const fdp_scope *scope, const fdp_message *message, fdp_row *row)

    struct fdp_socket:
        int fd
        uint32_t seq
        uint8_t *rx
        uint8_t *tx
        uint64_t messages_sent, batches_sent, overruns, recv_ns
        char text[160]

    int fdp_open(int netns_fd, int rcvbuf)
    uint32_t fdp_port(int fd)
    ctypedef int (*fdp_sink)(void *context, const fdp_row *rows, const uint8_t *owners,
                             uint32_t count) noexcept nogil
    int fdp_dump(fdp_socket *sock, const fdp_scope *scope, fdp_sink sink, void *context)

    struct fdp_pages:
        uint8_t *data
        size_t used, room, expected, most
        uint32_t seq
        uint8_t stops, interrupted

    int fdp_fetch(fdp_socket *sock, const fdp_scope *scope, fdp_pages *pages,
                  fdp_realloc_fn realloc)
    int fdp_replay(const fdp_pages *pages, const fdp_scope *scope, fdp_sink sink,
                   void *context)
    enum:
        FDP_SCOPES
    int fdp_replay_routes(const fdp_pages *pages, const fdp_scope *scopes, uint32_t count,
                          fdp_sink sink, void *context)
    int fdp_route_is_written(const fdp_message *message, const uint8_t *protocols, size_t size,
                             const uint32_t *devices, size_t count)
    int fdp_look_up(fdp_socket *sock, const fdp_scope *scope, const fdp_table *table,
                    fdp_sink sink, void *context)
    int fdp_get(fdp_socket *sock, const fdp_scope *scope, const void *key, fdp_row *row)

    int fdp_apply(fdp_socket *sock, fdp_job *job, uint32_t start, uint32_t stop)


cdef extern from "kinds.h" nogil:
    size_t fdp_encode(fdp_kind kind, fdp_op_kind op, const void *row, uint32_t seq,
                      uint16_t more_flags, uint8_t *to)


cdef extern from "events.h" nogil:
    struct fdp_filter:
        uint32_t tunnels[8]
        uint32_t uplinks[8]
        uint32_t ports[4]
        uint32_t tunnel_count, uplink_count, port_count
        uint8_t programs, every_link, protocol, id_nibble
        uint8_t length[2]
        uint8_t has[2]
        uint8_t prefix[2][16]

    struct fdp_watched:
        const fdp_table *desired
        const fdp_scope *scopes
        uint32_t scope_count
        fdp_table *touched
        uint64_t events
        uint32_t ports[16]
        uint32_t port_count

    fdp_owner fdp_touched_owner(uint32_t tag)
    uint32_t fdp_touched_port(const uint32_t *ports, uint32_t tag)
    ctypedef int (*fdp_link_sink)(void *context, const fdp_message *message) noexcept nogil
    int fdp_events_open(int netns_fd, int rcvbuf, const fdp_filter *filter)
    int fdp_events_filter(int fd, const fdp_filter *filter)
    int fdp_events_read(int fd, uint8_t *page, size_t room, fdp_watched *watched,
                        uint32_t count, uint32_t most, fdp_link_sink sink, void *context)
    int fdp_watch_orphans(const fdp_watched *nexthops, fdp_watched *routes)


cdef extern from "bpfmap.h" nogil:
    struct fdp_map_info:
        uint32_t type, id, key_size, value_size, max_entries, flags
        char name[16]

    struct fdp_prog_info:
        uint32_t type, id, map_count
        uint32_t maps[16]
        uint64_t run_ns, runs
        char name[16]

    struct fdp_map_reading:
        uint8_t begun

    int fdp_bpf_open(const char *path)
    int fdp_bpf_pin(int fd, const char *path)
    int fdp_map_describe(int fd, fdp_map_info *info)
    int fdp_prog_describe(int fd, fdp_prog_info *info)
    int fdp_map_create(uint32_t type, uint32_t key_size, uint32_t value_size,
                       uint32_t max_entries, uint32_t flags, const char *name)
    int fdp_map_lookup(int fd, const void *key, void *value)
    int fdp_map_update(int fd, const void *key, const void *value, uint64_t flags)
    int fdp_map_delete(int fd, const void *key)
    int fdp_map_read(int fd, fdp_map_reading *reading, void *keys, void *values,
                     uint32_t *count)
    int fdp_map_update_many(int fd, const void *keys, const void *values, uint32_t *count)
    void fdp_percpu_merge(const uint64_t *values, uint32_t cpus, uint32_t fields,
                          uint32_t newest, uint64_t *merged)


cdef extern from "claim.h" nogil:
    enum fdp_reason:
        FDP_ACCEPTED, FDP_BAD_CLAIM, FDP_BAD_SUBNET, FDP_BAD_PUBLIC_IP, FDP_BAD_MAC
        FDP_WRONG_BACKEND, FDP_WRONG_VNI, FDP_OUTSIDE_NETWORK, FDP_REASONS, FDP_OWN

    struct fdp_claim:
        uint8_t subnet[16]
        uint8_t endpoint[16]
        uint8_t mac[6]
        uint8_t length, reason
        uint64_t revision, moved
        uint32_t name, origin, rival
        uint8_t winner, stale, odd

    struct fdp_prefix:
        uint8_t address[16]
        uint8_t length, over

    struct fdp_policy:
        uint8_t family, need_mac, has_own_subnet, has_own_mac
        fdp_prefix network, own_subnet
        uint8_t own_mac[6]
        uint8_t link_local, subnet_length, has_pods
        uint8_t pods_first[16]
        uint8_t pods_last[16]
        const fdp_prefix *locals
        uint32_t local_count
        uint8_t (*own)[16]
        uint32_t own_count
        uint8_t (*no_hosts)[16]
        uint32_t no_host_count

    struct fdp_claims:
        fdp_claim *rows
        const uint8_t *names
        uint32_t count

    int fdp_parse_address(uint8_t family, const char *text, size_t size, uint8_t *to)
    int fdp_parse_prefix(uint8_t family, const char *text, size_t size, fdp_prefix *to)
    int fdp_parse_mac(const char *text, size_t size, uint8_t *to)
    void fdp_mask(const uint8_t *address, unsigned length, uint8_t *to)
    int fdp_prefix_holds(const uint8_t *prefix, uint8_t length, const uint8_t *address)
    int fdp_prefix_overlaps(const uint8_t *a, uint8_t a_length, const uint8_t *b,
                            uint8_t b_length)
    void fdp_policy_seal(fdp_policy *policy)
    int fdp_claim_check(const fdp_policy *policy, const fdp_claim *claim)
    int fdp_ways(const fdp_table *underlay, const fdp_claim *claims, uint32_t count,
                 uint8_t family, uint32_t uplink, uint8_t *ways, fdp_realloc_fn realloc)
    int fdp_admit(const fdp_policy *policy, fdp_claims *claims, uint64_t seed, uint32_t *order,
                  uint32_t *accepted, fdp_realloc_fn realloc)


cdef extern from "rows.h" nogil:
    enum fdp_way:
        FDP_TUNNEL, FDP_DIRECT

    struct fdp_leg:
        uint8_t used, onlink, to_endpoint
        uint32_t ifindex

    struct fdp_recipe:
        uint8_t kind, family, protocol, by_object
        uint32_t base, map, table
        fdp_leg legs[2]

    int fdp_make_row(const fdp_recipe *recipe, const fdp_claim *claim, fdp_way way, uint32_t tag,
                     fdp_row *row)
    int fdp_fill_table(const fdp_recipe *recipe, const fdp_claim *claims, uint32_t count,
                       const uint8_t *ways, fdp_table *table)
    fdp_way fdp_way_of(const fdp_recipe *recipe, const uint8_t *ways, uint32_t number)


cdef extern from "names.h" nogil:
    struct fdp_names:
        uint32_t *slots
        uint32_t mask, count
        uint64_t key[2]
        uint8_t twice

    int fdp_names_build(fdp_names *names, const fdp_claims *claims, fdp_realloc_fn realloc)
    int64_t fdp_names_find(const fdp_names *names, const fdp_claims *claims, const char *name,
                           size_t size)
    int fdp_names_add(fdp_names *names, const fdp_claims *claims, uint32_t number,
                      fdp_realloc_fn realloc)
    void fdp_names_remove(fdp_names *names, const fdp_claims *claims, uint32_t number,
                          uint32_t last)
    void fdp_names_free(fdp_names *names, fdp_realloc_fn realloc)


cdef extern from "probe.h" nogil:
    enum fdp_probe_how:
        FDP_PROBE_FRAME, FDP_PROBE_TUNNEL, FDP_PROBE_ECHO
    enum:
        FDP_PROBE_PATHS, FDP_PROBE_LARGEST

    struct fdp_probe_peer:
        uint8_t mac[6]
        uint8_t family
        uint8_t address[16]

    struct fdp_probe:
        int how, family, endpoint_family
        uint32_t ifindex
        uint8_t mac[6]
        uint8_t source[16]
        uint8_t local[16]
        uint16_t tunnel_port
        uint32_t vni
        uint8_t ttl, hops
        unsigned int paths
        uint64_t key[2]
        uint32_t count, rounds
        fdp_probe_peer *peers
        uint32_t *times
        int packet, receiver
        uint16_t port
        uint64_t sent, answered, strange

    void fdp_probe_init(fdp_probe *probe)
    int fdp_probe_open(fdp_probe *probe)
    void fdp_probe_close(fdp_probe *probe)
    int fdp_probe_send(fdp_probe *probe, const uint32_t *which, uint32_t n, uint32_t round,
                       uint32_t size, unsigned int path)
    int fdp_probe_receive(fdp_probe *probe, int wait_ms)
    int fdp_probe_match(fdp_probe *probe, const uint8_t *bytes, size_t have, uint64_t now)

cdef extern from "prober.h" nogil:
    enum:
        FDP_PROBER_BUCKETS
    enum fdp_life:
        FDP_LIFE_NEW, FDP_LIFE_ALIVE, FDP_LIFE_LOSSY, FDP_LIFE_DEAD
    const uint32_t *fdp_prober_bounds

    struct fdp_prober_peer:
        uint64_t added_at, sent_at, answered_at
        uint32_t rtt, sent, answered
        uint32_t *trips
        uint16_t unanswered, loss, silent_paths, takes, fails, mtu
        uint8_t life, told, used, changed, mark, length, mtu_changed
        uint8_t *prefix

    struct fdp_prober:
        fdp_probe probe
        fdp_table index
        fdp_prober_peer *peers
        uint32_t high, used
        uint64_t interval
        uint32_t quick_budget, size, large, large_rate, changed, mtu_changed, most_used, stretch
        uint8_t silent, silent_told, narrow_is_well
        int error
        uint64_t sent, answered, trip_sum, last_answer
        uint64_t *trips
        uint32_t *lives

    void fdp_prober_init(fdp_prober *prober, uint64_t seed, fdp_realloc_fn realloc)
    void fdp_prober_free(fdp_prober *prober)
    int fdp_prober_put(fdp_prober *prober, const fdp_peer *peer, uint64_t now)
    void fdp_prober_set_mac(fdp_prober *prober, uint32_t number, const uint8_t *mac, uint64_t now)
    int fdp_prober_remove(fdp_prober *prober, const fdp_peer *peer)
    int64_t fdp_prober_find(const fdp_prober *prober, const fdp_peer *peer)
    uint64_t fdp_prober_interval(const fdp_prober *prober)
    int fdp_prober_run(fdp_prober **all, unsigned int count, int wake, uint64_t end)
