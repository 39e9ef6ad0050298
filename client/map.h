/*
 * map.h: what the client has mapped of a server's memory on the same host (shm), and reading it.
 *
 * An epoch is what one connection was passed: segments by their ids, and the lease. A map is one
 * context's table of where its values lie in them; it never changes but for getting shorter, and
 * is replaced by a longer one. Both are counted, so a reader keeps what it reads mapped. Whether
 * the bytes are still the values' is in the lease: copy first, then ask kvci_map_holds.
 */
#ifndef KVCI_MAP_H
#define KVCI_MAP_H

#include "internal.h"

typedef struct kvci_segment {
    const uint8_t *base;
    size_t len_bytes;
    uint32_t id;
    atomic_uint users;                        /* maps that have a value in it */
    void (*gpu_close)(void *arg, void *base); /* of a GPU, which the host cannot read; else NULL */
    void *gpu_arg;
} kvci_segment;

typedef struct kvci_epoch {
    atomic_uint refs;
    kvc_map_opts opts;
    const _Atomic uint64_t *lease;
    size_t lease_bytes;
    kvci_segment **segments; /* [n_segments] by id, NULL: none; who maps alone changes it */
    uint32_t n_segments;
} kvci_epoch;

typedef struct kvci_map {
    atomic_uint refs;
    kvci_epoch *epoch;
    kvc_client *client; /* to be told when the map has gone; NULL: nobody */
    uint64_t number, boot_id;
    uint32_t slot, block_tokens, n_parts;
    atomic_uint n_blocks;        /* may fall */
    atomic_bool was_cut;         /* it has; the server's map is longer, so another is to be begun */
    uint32_t *parts, *row_bytes; /* [n_parts] */
    const uint8_t **values;      /* [blocks * n_parts]; NULL: by request */
    const uint8_t **gpu;         /* [the same] where they are in a GPU, then values has NULL; or
                                    NULL: none is */
    kvci_segment **used;         /* [n_used] that values lie in */
    uint32_t n_used, room_used;
    uint64_t n_values; /* that are not NULL */
    kvc_map_info info;
} kvci_map;

/* ---- map.c: pure but for mmap, and for counts */
/* Takes lease_fd. NULL: it cannot be mapped. */
kvci_epoch *kvci_epoch_create(const kvc_map_opts *opts, int lease_fd, size_t lease_bytes);
/* Maps a segment read-only; takes fd. */
kvc_status kvci_epoch_add(kvci_epoch *epoch, uint32_t id, int fd, size_t len_bytes) KVC_MUST_CHECK;
/* The same of a GPU, opened as opts says. */
kvc_status kvci_epoch_add_gpu(kvci_epoch *epoch, const kvc_map_opts *opts,
                              const kvc_map_segment *passed) KVC_MUST_CHECK;
/* Unmaps segments (gpu: only those of a GPU) that no map has a value in, at most max; ids [max]
   gets theirs. Who maps alone. */
uint32_t kvci_epoch_sweep(kvci_epoch *epoch, bool gpu, uint32_t *ids, uint32_t max);
void kvci_epoch_unref(kvci_epoch *epoch); /* NULL is fine */
/* A value of the map lies in the segment. False: no memory. */
bool kvci_map_uses(kvci_map *map, kvci_segment *segment);
/* A map of the first n_old blocks of old (NULL: none) with room for n_blocks; references epoch.
   gpu: values may lie in a GPU. */
kvci_map *kvci_map_create(kvci_epoch *epoch, const kvci_map *old, uint32_t n_old, uint32_t n_blocks,
                          uint32_t n_parts, bool gpu);
void kvci_map_unref(kvci_map *map); /* not under client->lock; NULL is fine */
/* The context's map, referenced, or NULL. Takes client->lock. */
kvci_map *kvci_map_of(kvc_context *context);
/* Whether what was read meanwhile was the values'. */
bool kvci_map_holds(const kvci_map *map);
/* The place of a part in the map, or -1. */
int kvci_map_part(const kvci_map *map, uint32_t part);

/* ---- map_serve.c */
/* Picks that the maps did not serve, as groups of their own, in one block of memory. */
typedef struct kvci_left {
    uint32_t n_groups, n;
    kvc_pick_group *groups;
    uint32_t *index;   /* [n] numbers of the picks among all */
    int8_t *status;    /* [n] */
    int8_t *final;     /* the caller's, of all picks; may be NULL */
    size_t room_bytes; /* of all of it */
} kvci_left;

/* Serves what it can of checked groups. NULL: nothing was served, fetch it all. */
kvci_left *kvci_serve(kvc_client *client, const kvc_pick_group *groups, uint32_t n_groups,
                      const kvc_region *dst, int8_t *status, kvc_fetch_info *info);
/* Under the lock: keeps the memory for the next one. NULL is fine. */
void kvci_left_put(kvc_client *client, kvci_left *left);

/* ---- map_ask.c: one thread of a client maps at a time (client->mapping) */

/* One reply, as it comes on the transport's thread: copied, and its descriptors taken. */
typedef struct kvci_map_answer {
    kvc_reply reply; /* without pointers */
    kvc_map_segment segments[KVC_MAX_MAP_SEGMENTS];
    int fds[KVT_MAX_FDS];
    uint32_t n_fds;
    uint8_t *table;
    size_t table_bytes;
} kvci_map_answer;

/* Waits for its turn. TIMED_OUT, said. */
kvc_status kvci_mapping_begin(kvc_client *client, uint64_t deadline_ns) KVC_MUST_CHECK;
void kvci_mapping_end(kvc_client *client);
/*
 * Asks, and maps what came with the answer; number_p: the server's map, as soon as it has one. Its
 * segments are in client->epoch then. The answer is the caller's, also after a failure. TIMED_OUT:
 * the caller waits no longer, but the answer is waited for, since without it the connection would
 * have to end; until it has come, nobody else maps.
 */
kvc_status kvci_map_ask(kvc_context *context, const kvc_request *req, uint64_t deadline_ns,
                        kvci_map_answer *answer, uint64_t *number_p) KVC_MUST_CHECK;
void kvci_map_answer_fini(kvci_map_answer *answer);
/* Tells the server that the map is over, best effort; wait: until it knows, for a second at most.
 */
void kvci_map_release(kvc_client *client, uint64_t number, bool wait);
/* Before the client closes: memory of a GPU is closed and the server told, which can use it again
 * then, else only once this process has ended. Blocks for a second at most. */
void kvci_map_goodbye(kvc_client *client);
/* Under the lock: a map has gone, so segments may be without one; they are looked at later. */
void kvci_map_left(kvc_client *client);
/* Under the lock, held again on return; kvc-prog's: gives back what no map has used for a while. */
void kvci_map_sweep(kvc_client *client, uint64_t now_ns);

/* ---- map_call.c */
/* After open, fork and extend: maps what is new where that is wanted. Blocks; best effort. */
void kvci_map_follow(kvc_context *context, uint64_t deadline_ns);
/* The context has n blocks now, before anybody can put others in their place. */
void kvci_map_cut(kvc_context *context, uint32_t n);
/* Gives the map back; best effort. */
void kvci_map_drop(kvc_context *context);

#endif
