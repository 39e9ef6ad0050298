/*
 * context.h: open contexts, so that a request can name a row by its token position alone.
 *
 * A handle is 64 bits: 24 of the boot id, 20 of the slot's generation, 20 of the slot. Its context
 * lives until it is closed or ttl passes without a use; users in flight keep it a moment longer.
 * The block list grows at its end only, in chunks that never move, so readers take no lock on it.
 * A truncate puts a shorter object under the handle; readers in flight end with the old one.
 */
#ifndef KVS_CONTEXT_H
#define KVS_CONTEXT_H

#include <stdatomic.h>

#include "index.h"

#define KVS_CONTEXT_SLOTS        (1u << 20)
#define KVS_CONTEXT_FIRST_BLOCKS 64u
#define KVS_CONTEXT_CHUNKS       15u /* 64 << 15 - 64 blocks in all >= KVC_MAX_CONTEXT_BLOCKS */

typedef struct kvs_context {
    const kvs_schema *schema;
    kvc_digest tenant;
    uint64_t handle, ttl_ns;
    atomic_uint_least64_t expires_ns;
    uint32_t refs;       /* the table's one included; guarded by the table's lock */
    kvc_mutex grow_lock; /* rank GROW: who extends or truncates; guards replaced */
    bool replaced;       /* by a truncate: the handle names another object now */
    atomic_uint n_blocks;
    uint32_t n_counted; /* of max_blocks; by who grows it or, once nobody can, who frees it */
    uint32_t *chunks[KVS_CONTEXT_CHUNKS]; /* block ids; chunk c holds 64 << c of them */
} kvs_context;

typedef struct kvs_contexts kvs_contexts;

typedef struct kvs_contexts_opts {
    kvs_index *index;
    kvs_schemas *schemas; /* a context holds its schema */
    uint64_t boot_id;
    uint32_t max_per_tenant, max_context_blocks;
    uint64_t max_blocks; /* in all open contexts of all tenants */
    uint64_t default_ttl_ns, max_ttl_ns;
} kvs_contexts_opts;

kvs_contexts *kvs_contexts_create(const kvs_contexts_opts *opts);
void kvs_contexts_destroy(kvs_contexts *contexts); /* nobody may be using one */

/*
 * Opens a context over digests [n]; *context_p is referenced. ttl_ns 0: the default; longer than
 * the longest: the longest. NO_SPACE: the tenant has too many open, or all contexts too many
 * blocks; why_p gets a static text. INVALID: more than max_context_blocks. NO_MEMORY.
 */
kvc_status kvs_context_open(kvs_contexts *contexts, const kvs_schema *schema,
                            const kvc_digest *digests, uint32_t n, uint64_t ttl_ns,
                            kvs_context **context_p, const char **why_p) KVC_MUST_CHECK;
/* Finds, references and renews. STALE_HANDLE: another boot or tenant, closed or expired. */
kvc_status kvs_context_get(kvs_contexts *contexts, const kvc_digest *tenant, uint64_t handle,
                           kvs_context **context_p) KVC_MUST_CHECK;
void kvs_context_put(kvs_contexts *contexts, kvs_context *context);
/*
 * Opens a context over the first n blocks of another, which the caller references; n 0: all of
 * them. Statuses as for open, INVALID also where from is shorter.
 */
kvc_status kvs_context_fork(kvs_contexts *contexts, const kvs_context *from, uint32_t n,
                            uint64_t ttl_ns, kvs_context **context_p,
                            const char **why_p) KVC_MUST_CHECK;
/*
 * Cuts to the first n blocks. The caller's reference stays with the old length; the handle has the
 * new one. INVALID: it is shorter. STALE_HANDLE: closed meanwhile. AGAIN: another truncate came
 * first, get it by its handle once more. NO_MEMORY. It needs no room in max_blocks.
 */
kvc_status kvs_context_truncate(kvs_contexts *contexts, kvs_context *context, uint32_t n,
                                const char **why_p) KVC_MUST_CHECK;
/*
 * Appends digests [n]. n_before must be the length, or the digests must be what is there already (a
 * retry). INVALID, NO_SPACE, NO_MEMORY as for open; AGAIN as for truncate.
 */
kvc_status kvs_context_extend(kvs_contexts *contexts, kvs_context *context, uint32_t n_before,
                              const kvc_digest *digests, uint32_t n,
                              const char **why_p) KVC_MUST_CHECK;
/* The handle is stale from now on, whatever object stands under it. The caller's reference stays.
 */
void kvs_context_close(kvs_contexts *contexts, kvs_context *context);
/* Drops what expired before now_ns; returns how many. */
uint32_t kvs_contexts_sweep(kvs_contexts *contexts, uint64_t now_ns);

/* Block id at place i < n_blocks. */
static inline uint32_t kvs_context_block(const kvs_context *context, uint32_t i)
{
    uint32_t chunk = 25u - (uint32_t)__builtin_clz(i + KVS_CONTEXT_FIRST_BLOCKS);
    return context
        ->chunks[chunk][i + KVS_CONTEXT_FIRST_BLOCKS - (KVS_CONTEXT_FIRST_BLOCKS << chunk)];
}

#endif
