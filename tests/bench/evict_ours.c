/*
 * evict_ours.c: cachesvc's own eviction under a trace: the index and evict.c, without the tiers.
 *
 * A read that misses puts its value, as a promotion or a put does, after one value gave way where
 * the cache is full.
 */
#include <stdlib.h>
#include <string.h>

#include "evict.h"
#include "evict_policy.h"
#include "index.h"

static void name_of(uint32_t key, kvc_digest *digest_p)
{
    uint64_t x = key;
    for (size_t i = 0; i < sizeof(*digest_p) / sizeof(x); i++) {
        x += 0x9e3779b97f4a7c15ull;
        uint64_t word = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
        word ^= word >> 27;
        memcpy((char *)digest_p + i * sizeof(word), &word, sizeof(word));
    }
}

static bool put(kvs_index *index, const kvs_schema *schema, const kvc_digest *digest)
{
    kvs_slot slot = {0};
    uint32_t value;
    if (kvs_index_claim(index, schema, 0, digest, false, &value, &slot) != KVS_CLAIM_MINE)
        return false;
    kvs_index_publish_dram(index, value, slot, false);
    return true;
}

static int run(kvs_index *index, const kvs_schema *schema, const evict_trace *trace,
               uint32_t capacity, evict_result *result_p)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < trace->n; i++) {
        kvc_digest digest;
        const kvc_digest *digests[1] = {&digest};
        const uint16_t part = 0;
        kvs_read read = {.n_rows = 1};
        kvs_victim victim;
        name_of(trace->keys[i], &digest);
        kvs_index_ref_named(index, schema, digests, &part, &read, 1);
        if (read.where == KVS_IN_DRAM) {
            kvs_index_unref(index, &read.value, 1);
            result_p->hits++;
            continue;
        }
        if (n == capacity) {
            if (!kvs_evict_dram(index, schema->parts[0].cls, &victim))
                return 1;
            kvs_evict_finish(index, &victim);
            result_p->n_evictions++;
            n--;
        }
        if (!put(index, schema, &digest))
            return 1;
        n++;
    }
    return 0;
}

int evict_run_ours(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    kvs_part part = {.row_bytes = 256, .value_bytes = 16384};
    kvs_schema schema = {.id = 1, .block_tokens = 64, .n_parts = 1, .parts = &part};
    kvs_schema **by_id = calloc(KVS_MAX_SCHEMAS + 1, sizeof(*by_id));
    kvs_index *index = by_id ? kvs_index_create(by_id) : NULL;
    int failed = 1;
    *result_p = (evict_result){0};
    if (index) {
        by_id[1] = &schema;
        part.cls = kvs_index_class(index, &schema.tenant, part.value_bytes, schema.block_tokens);
        failed = run(index, &schema, trace, capacity, result_p);
        kvs_index_destroy(index);
    }
    free(by_id);
    return failed;
}
