/*
 * hold.h: the table of holds, so that what a context holds outlives the handle and is not evicted.
 *
 * A hold has a number, a tenant and a TTL, and keeps the blocks that its context had. Handles begin
 * with bits of the boot id, so that one of another run is not found. What a hold means for values
 * is index_keep.c.
 */
#ifndef KVS_HOLD_H
#define KVS_HOLD_H

#include "context.h"

typedef struct kvs_holds kvs_holds;

typedef struct kvs_holds_opts {
    kvs_index *index;
    kvs_schemas *schemas; /* a hold keeps its schema */
    uint64_t boot_id;
    uint32_t max_per_tenant;
    uint64_t max_blocks; /* in all holds of all tenants */
    uint64_t default_ttl_ns, max_ttl_ns;
} kvs_holds_opts;

/* What an answer says of a hold. */
typedef struct kvs_hold_info {
    uint64_t hold, ttl_ns, tenant_bytes;
    uint32_t n_blocks;
} kvs_hold_info;

kvs_holds *kvs_holds_create(const kvs_holds_opts *opts); /* NULL: no memory */
void kvs_holds_destroy(kvs_holds *holds);
/*
 * Holds the blocks of a context, which the caller references. ttl_ns 0: the default. NO_SPACE: a
 * cap of bytes, holds or blocks; why_p gets a static text, and info_p->tenant_bytes is set.
 */
kvc_status kvs_hold_add(kvs_holds *holds, const kvs_context *context, uint64_t ttl_ns,
                        kvs_hold_info *info_p, const char **why_p) KVC_MUST_CHECK;
/* The same for blocks by name, there or not. */
kvc_status kvs_hold_add_named(kvs_holds *holds, const kvs_schema *schema, const kvc_digest *digests,
                              uint32_t n, uint64_t ttl_ns, kvs_hold_info *info_p,
                              const char **why_p) KVC_MUST_CHECK;
/* Its TTL begins anew. NOT_FOUND: released, run out, another tenant's or another boot's. */
kvc_status kvs_hold_renew(kvs_holds *holds, const kvc_digest *tenant, uint64_t handle,
                          uint64_t ttl_ns, kvs_hold_info *info_p) KVC_MUST_CHECK;
kvc_status kvs_hold_release(kvs_holds *holds, const kvc_digest *tenant,
                            uint64_t handle) KVC_MUST_CHECK;
/* Drops what expired before now_ns; returns how many. */
uint32_t kvs_holds_sweep(kvs_holds *holds, uint64_t now_ns);

#endif
