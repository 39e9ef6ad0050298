/*
 * blocks.c: block records and their hash, and the contexts that hold blocks; see index.h.
 *
 * Any thread; what ends in _locked or takes a part of the index runs with the index lock held.
 * Invariants: a block is in the hash exactly while it exists; it lives while it has values or
 * stands in a context. Linear hashing: the table grows by one bucket per insertion, so no insertion
 * ever stops to move everything.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/sum.h"
#include "index.h"

#define HASH_PAGE (1u << KVS_HASH_PAGE_SHIFT)

/* ---- hash ------------------------------------------------------------------------------------ */

/* Digests come from callers, who may choose them: every byte counts, and the seed is secret. */
static uint64_t hash_of(const kvs_index *index, uint32_t schema, const kvc_digest *digest)
{
    uint8_t bytes[sizeof(*digest) + sizeof(schema)];
    memcpy(bytes, digest, sizeof(*digest));
    memcpy(bytes + sizeof(*digest), &schema, sizeof(schema));
    return kvc_seeded_sum(bytes, sizeof(bytes), index->seed);
}

static uint32_t *bucket_at(kvs_index *index, uint32_t bucket)
{
    return &index->hash[bucket >> KVS_HASH_PAGE_SHIFT][bucket & (HASH_PAGE - 1)];
}

static uint32_t *bucket_of(kvs_index *index, uint64_t hash)
{
    uint32_t bucket = (uint32_t)hash & ((1u << index->hash_level) - 1);
    if (bucket < index->hash_split)
        bucket = (uint32_t)hash & ((2u << index->hash_level) - 1);
    return bucket_at(index, bucket);
}

/* Splits one bucket, so that the table grows with its content and never stops to rehash. */
static void hash_grow(kvs_index *index)
{
    uint32_t to = (1u << index->hash_level) + index->hash_split;
    uint32_t page = to >> KVS_HASH_PAGE_SHIFT;
    if (page >= KVS_HASH_MAX_PAGES)
        return;
    if (!index->hash[page] && !(index->hash[page] = calloc(HASH_PAGE, sizeof(uint32_t))))
        return;
    uint32_t *from_p = bucket_at(index, index->hash_split);
    uint32_t *to_p = bucket_at(index, to);
    uint32_t id = *from_p;
    *from_p = KVS_NIL;
    while (id != KVS_NIL) {
        kvs_block *block = kvs_block_at(index, id);
        uint32_t next = block->hash_next;
        uint64_t hash = hash_of(index, block->schema, &block->digest);
        uint32_t *head_p = hash >> index->hash_level & 1 ? to_p : from_p;
        block->hash_next = *head_p;
        *head_p = id;
        id = next;
    }
    if (++index->hash_split == 1u << index->hash_level) {
        index->hash_level++;
        index->hash_split = 0;
    }
}

uint32_t kvs_block_find(kvs_index *index, uint32_t schema, const kvc_digest *digest)
{
    uint32_t id = *bucket_of(index, hash_of(index, schema, digest));
    while (id != KVS_NIL) {
        const kvs_block *block = kvs_block_at(index, id);
        if (block->schema == schema && kvc_digest_equal(&block->digest, digest))
            return id;
        id = block->hash_next;
    }
    return KVS_NIL;
}

uint32_t kvs_block_get(kvs_index *index, uint32_t schema, const kvc_digest *digest)
{
    uint32_t id = kvs_block_find(index, schema, digest);
    if (id != KVS_NIL)
        return id;
    id = kvs_slab_alloc(&index->blocks);
    if (id == KVS_NIL)
        return KVS_NIL;
    if (index->blocks.used > (1u << index->hash_level) + index->hash_split)
        hash_grow(index);
    kvs_block *block = kvs_block_at(index, id);
    block->digest = *digest;
    block->schema = schema;
    index->schema_blocks[schema]++;
    uint32_t *head_p = bucket_of(index, hash_of(index, schema, digest));
    block->hash_next = *head_p;
    *head_p = id;
    return id;
}

/* ---- the values of a block ------------------------------------------------------------------- */

/* Gives the table another size; the parts follow the ids. */
static bool table_resize(kvs_block *block, uint32_t room_log)
{
    uint32_t room = 1u << room_log, *values = malloc(room * (sizeof(uint32_t) + sizeof(uint16_t)));
    if (!values)
        return false;
    if (block->values) {
        memcpy(values, block->values, block->n_values * sizeof(uint32_t));
        memcpy(values + room, kvs_block_parts(block), block->n_values * sizeof(uint16_t));
        free(block->values);
    }
    block->values = values;
    block->room_log = room_log & 31u;
    return true;
}

bool kvs_block_add_value(kvs_block *block, uint32_t part, uint32_t value)
{
    if (block->n_values == kvs_block_room(block) &&
        !table_resize(block, block->values ? block->room_log + 1u : 0))
        return false;
    uint32_t at = kvs_block_place(block, part), behind = block->n_values - at;
    uint16_t *parts = kvs_block_parts(block);
    KVC_ASSERT(behind == 0 || parts[at] != part);
    memmove(block->values + at + 1, block->values + at, behind * sizeof(*block->values));
    memmove(parts + at + 1, parts + at, behind * sizeof(*parts));
    block->values[at] = value;
    parts[at] = (uint16_t)part;
    block->n_values++;
    return true;
}

void kvs_block_remove_value(kvs_block *block, uint32_t part)
{
    uint32_t at = kvs_block_place(block, part), behind = block->n_values - at - 1;
    uint16_t *parts = kvs_block_parts(block);
    memmove(block->values + at, block->values + at + 1, behind * sizeof(*block->values));
    memmove(parts + at, parts + at + 1, behind * sizeof(*parts));
    block->n_values--;
    if (block->n_values == 0) {
        free(block->values);
        block->values = NULL;
    } else if (block->n_values <= kvs_block_room(block) / 4) {
        (void)table_resize(block, block->room_log - 1u); /* a table too large serves as well */
    }
}

void kvs_block_coming(kvs_index *index, uint32_t value, bool begins)
{
    kvs_block *block = kvs_block_at(index, kvs_value_at(index, value)->block);
    if (begins) {
        block->n_coming++;
        return;
    }
    KVC_ASSERT(block->n_coming > 0);
    block->n_coming--;
}

void kvs_block_settle(kvs_index *index, uint32_t id)
{
    kvs_block *block = kvs_block_at(index, id);
    if (block->n_values || block->contexts)
        return;
    uint32_t *link_p = bucket_of(index, hash_of(index, block->schema, &block->digest));
    while (*link_p != id)
        link_p = &kvs_block_at(index, *link_p)->hash_next;
    *link_p = block->hash_next;
    index->schema_blocks[block->schema]--;
    free(block->values);
    kvs_slab_free(&index->blocks, id);
}

bool kvs_blocks_init(kvs_index *index)
{
    index->hash[0] = calloc(HASH_PAGE, sizeof(uint32_t));
    index->hash_level = KVS_HASH_PAGE_SHIFT;
    /* Clients choose digests; the seed keeps them from choosing buckets. */
    if (getrandom(&index->seed, sizeof(index->seed), GRND_NONBLOCK) != sizeof(index->seed))
        index->seed = kvc_wall_ns();
    kvs_slab_init(&index->blocks, sizeof(kvs_block));
    return index->hash[0] != NULL;
}

void kvs_blocks_fini(kvs_index *index)
{
    for (uint32_t page = 0; page < KVS_HASH_MAX_PAGES && index->hash[page]; page++) {
        for (uint32_t i = 0; i < HASH_PAGE; i++) {
            for (uint32_t id = index->hash[page][i]; id != KVS_NIL;) {
                kvs_block *block = kvs_block_at(index, id);
                id = block->hash_next;
                free(block->values);
            }
        }
        free(index->hash[page]);
    }
    kvs_slab_fini(&index->blocks);
}

/* ---- contexts -------------------------------------------------------------------------------- */

void kvs_index_drop_blocks(kvs_index *index, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++) {
            KVC_ASSERT(kvs_block_at(index, blocks[i])->contexts > 0);
            kvs_block_at(index, blocks[i])->contexts--;
            kvs_block_settle(index, blocks[i]);
        }
        kvc_mutex_unlock(&index->lock);
    }
}

void kvs_index_share_blocks(kvs_index *index, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++) {
            KVC_ASSERT(kvs_block_at(index, blocks[i])->contexts > 0);
            kvs_block_at(index, blocks[i])->contexts++;
        }
        kvc_mutex_unlock(&index->lock);
    }
}

kvc_status kvs_index_hold_blocks(kvs_index *index, const kvs_schema *schema,
                                 const kvc_digest *digests, uint32_t n, uint32_t *blocks)
{
    bool ok = true;
    uint32_t i = 0;
    while (ok && i < n) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + KVS_INDEX_STEP; i < n && i < end; i++) {
            blocks[i] = kvs_block_get(index, schema->id, &digests[i]);
            ok = blocks[i] != KVS_NIL;
            if (!ok)
                break;
            kvs_block_at(index, blocks[i])->contexts++;
        }
        kvc_mutex_unlock(&index->lock);
    }
    if (!ok)
        kvs_index_drop_blocks(index, blocks, i);
    return ok ? KVC_OK : KVC_NO_MEMORY;
}

bool kvs_index_uses_schema(void *arg, uint32_t schema)
{
    kvs_index *index = arg;
    kvc_mutex_lock(&index->lock);
    bool uses = index->schema_blocks[schema] > 0;
    kvc_mutex_unlock(&index->lock);
    return uses;
}

bool kvs_index_block_is(kvs_index *index, uint32_t block, const kvc_digest *digest)
{
    kvc_mutex_lock(&index->lock);
    bool same = kvc_digest_equal(&kvs_block_at(index, block)->digest, digest);
    kvc_mutex_unlock(&index->lock);
    return same;
}
