/*
 * ttl.h: what the TTL of a put keeps from eviction, and for how long.
 *
 * Each TTL is a hold of the value's block (index_keep.c) without a number: nobody releases or
 * renews it, the ticker drops it when it is due. A second TTL of the same block counts by itself.
 */
#ifndef KVS_TTL_H
#define KVS_TTL_H

#include "index.h"

typedef struct kvs_ttls kvs_ttls;

/* NULL: no memory. max: TTLs of all tenants at a time. */
kvs_ttls *kvs_ttls_create(kvs_index *index, kvs_schemas *schemas, uint64_t max,
                          uint64_t max_ttl_ns);
void kvs_ttls_destroy(kvs_ttls *ttls);
/*
 * Keeps the block from now on, for ttl_ns or as long as a TTL may be; gives that. 0: it cannot be
 * kept, for a cap is reached, memory is out, or part (a place) of it is not there any more. schema
 * is held by the caller. Any thread.
 */
uint64_t kvs_ttl_keep(kvs_ttls *ttls, const kvs_schema *schema, uint16_t part,
                      const kvc_digest *digest, uint64_t ttl_ns);
/* Drops what is due at now_ns. */
void kvs_ttls_sweep(kvs_ttls *ttls, uint64_t now_ns);

#endif
