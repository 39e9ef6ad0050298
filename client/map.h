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
    const uint8_t *base; /* NULL: not mapped */
    size_t len_bytes;
} kvci_segment;

typedef struct kvci_epoch {
    atomic_uint refs;
    kvc_map_opts opts;
    const _Atomic uint64_t *lease;
    size_t lease_bytes;
    kvci_segment *segments; /* [n_segments] by id; who maps alone grows it */
    uint32_t n_segments;
} kvci_epoch;

typedef struct kvci_map {
    atomic_uint refs;
    kvci_epoch *epoch;
    uint64_t number, boot_id;
    uint32_t slot, block_tokens, n_parts;
    atomic_uint n_blocks;        /* may fall */
    atomic_bool was_cut;         /* it has; the server's map is longer, so another is to be begun */
    uint32_t *parts, *row_bytes; /* [n_parts] */
    const uint8_t **values;      /* [blocks * n_parts]; NULL: by request */
    uint64_t n_values;           /* that are not NULL */
    kvc_map_info info;
} kvci_map;

/* ---- map.c: pure but for mmap, and for counts */
/* Takes lease_fd. NULL: it cannot be mapped. */
kvci_epoch *kvci_epoch_create(const kvc_map_opts *opts, int lease_fd, size_t lease_bytes);
/* Maps a segment read-only; takes fd. */
kvc_status kvci_epoch_add(kvci_epoch *epoch, uint32_t id, int fd, size_t len_bytes) KVC_MUST_CHECK;
void kvci_epoch_unref(kvci_epoch *epoch); /* NULL is fine */
/* A map of the first n_old blocks of old (NULL: none) with room for n_blocks; references epoch. */
kvci_map *kvci_map_create(kvci_epoch *epoch, const kvci_map *old, uint32_t n_old, uint32_t n_blocks,
                          uint32_t n_parts);
void kvci_map_unref(kvci_map *map); /* NULL is fine */
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
    uint32_t *index; /* [n] numbers of the picks among all */
    int8_t *status;  /* [n] */
    int8_t *final;   /* the caller's, of all picks; may be NULL */
} kvci_left;

/* Serves what it can of checked groups. NULL: nothing was served, fetch it all. */
kvci_left *kvci_serve(const kvc_pick_group *groups, uint32_t n_groups, const kvc_region *dst,
                      int8_t *status, kvc_fetch_info *info);

/* ---- map_call.c */
/* After open, fork and extend: maps what is new where that is wanted. Blocks; best effort. */
void kvci_map_follow(kvc_context *context, uint64_t deadline_ns);
/* The context has n blocks now, before anybody can put others in their place. */
void kvci_map_cut(kvc_context *context, uint32_t n);
/* Gives the map back; best effort. */
void kvci_map_drop(kvc_context *context);

#endif
