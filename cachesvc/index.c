/*
 * index.c: block and value records, their lookup and their states; see index.h.
 *
 * Any thread; the one lock is taken and left inside each public function. Invariants: a block is in
 * the hash exactly while it exists; a value is in its class's dram list exactly if it has DRAM and
 * not WRITING, in the lmdb list exactly if it has LMDB; a block lives while it has values or stands
 * in a context.
 */
#include "index.h"

#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "evict.h"

#define HASH_PAGE    (1u << KVS_HASH_PAGE_SHIFT)
#define STEP_VALUES  256u  /* digests looked at in one critical section */
#define CLASS_ROUND  4096u /* as the tiers cut their size classes */
#define HEAT_ROWS    0xfffu
#define HEAT_WINDOWS 0xfu

_Static_assert(sizeof(kvs_value) == 64, "memory per value is promised");

/* ---- hash ------------------------------------------------------------------------------------ */

static uint64_t hash_of(const kvs_index *index, uint32_t schema, const kvc_digest *digest)
{
    uint64_t a, b;
    memcpy(&a, digest->bytes, sizeof(a));
    memcpy(&b, digest->bytes + 8, sizeof(b));
    a = (a ^ index->seed) * 0x9e3779b97f4a7c15ull;
    a = (a ^ (a >> 32) ^ b ^ schema) * 0xd6e8feb86659fd93ull;
    return a ^ (a >> 29);
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

static uint32_t block_find(kvs_index *index, uint32_t schema, const kvc_digest *digest)
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

static uint32_t block_get(kvs_index *index, uint32_t schema, const kvc_digest *digest)
{
    uint32_t id = block_find(index, schema, digest);
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
    uint32_t *head_p = bucket_of(index, hash_of(index, schema, digest));
    block->hash_next = *head_p;
    *head_p = id;
    return id;
}

/* Frees a block that nothing needs any more. */
static void block_settle(kvs_index *index, uint32_t id)
{
    kvs_block *block = kvs_block_at(index, id);
    if (block->n_values || block->contexts)
        return;
    uint32_t *link_p = bucket_of(index, hash_of(index, block->schema, &block->digest));
    while (*link_p != id)
        link_p = &kvs_block_at(index, *link_p)->hash_next;
    *link_p = block->hash_next;
    free(block->values);
    kvs_slab_free(&index->blocks, id);
}

/* ---- life ------------------------------------------------------------------------------------ */

kvs_index *kvs_index_create(kvs_schema *const *schemas)
{
    kvs_index *index = calloc(1, sizeof(*index));
    if (!index)
        return NULL;
    index->hash[0] = calloc(HASH_PAGE, sizeof(uint32_t));
    if (!index->hash[0]) {
        free(index);
        return NULL;
    }
    index->hash_level = KVS_HASH_PAGE_SHIFT;
    index->schemas = schemas;
    if (getrandom(&index->seed, sizeof(index->seed), GRND_NONBLOCK) != sizeof(index->seed))
        index->seed = kvc_wall_ns();
    index->n_classes = 1;
    kvs_slab_init(&index->blocks, sizeof(kvs_block));
    kvs_slab_init(&index->values, sizeof(kvs_value));
    kvc_mutex_init(&index->lock, KVC_RANK_INDEX);
    return index;
}

void kvs_index_destroy(kvs_index *index)
{
    if (!index)
        return;
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
    kvs_slab_fini(&index->values);
    kvc_mutex_fini(&index->lock);
    free(index);
}

uint32_t kvs_index_class(void *arg, const kvc_digest *tenant, uint32_t value_bytes)
{
    kvs_index *index = arg;
    value_bytes = (value_bytes + CLASS_ROUND - 1) / CLASS_ROUND * CLASS_ROUND;
    kvc_mutex_lock(&index->lock);
    uint32_t cls = 1;
    while (cls < index->n_classes && (index->classes[cls].value_bytes != value_bytes ||
                                      !kvc_digest_equal(&index->classes[cls].tenant, tenant)))
        cls++;
    if (cls == KVS_MAX_CLASSES) {
        cls = 0;
    } else if (cls == index->n_classes) {
        index->classes[cls].tenant = *tenant;
        index->classes[cls].value_bytes = value_bytes;
        index->n_classes++;
    }
    kvc_mutex_unlock(&index->lock);
    return cls;
}

/* ---- values ---------------------------------------------------------------------------------- */

static uint32_t value_find(kvs_index *index, uint32_t block_id, uint32_t part)
{
    const kvs_block *block = kvs_block_at(index, block_id);
    return block->values ? block->values[part] : KVS_NIL;
}

/* Whether a read finds it. */
static bool value_visible(const kvs_value *value)
{
    return (value->flags & (KVS_DRAM | KVS_LMDB)) && !(value->flags & (KVS_FILLING | KVS_DOOMED));
}

static uint32_t value_create(kvs_index *index, const kvs_schema *schema, uint32_t part,
                             const kvc_digest *digest)
{
    uint32_t block_id = block_get(index, schema->id, digest);
    if (block_id == KVS_NIL)
        return KVS_NIL;
    kvs_block *block = kvs_block_at(index, block_id);
    if (!block->values)
        block->values = calloc(schema->n_parts, sizeof(*block->values));
    uint32_t id = block->values ? kvs_slab_alloc(&index->values) : KVS_NIL;
    if (id == KVS_NIL) {
        block_settle(index, block_id);
        return KVS_NIL;
    }
    KVC_ASSERT(block->values[part] == KVS_NIL);
    block->values[part] = id;
    block->n_values++;
    kvs_value *value = kvs_value_at(index, id);
    value->block = block_id;
    value->part = (uint16_t)part;
    return id;
}

void kvs_value_free_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    kvs_block *block = kvs_block_at(index, value->block);
    KVC_ASSERT(value->refs == 0 && block->values[value->part] == id);
    uint32_t block_id = value->block;
    block->values[value->part] = KVS_NIL;
    block->n_values--;
    kvs_slab_free(&index->values, id);
    block_settle(index, block_id);
}

kvs_class *kvs_value_class(kvs_index *index, const kvs_value *value)
{
    const kvs_schema *schema = index->schemas[kvs_block_at(index, value->block)->schema];
    return &index->classes[schema->parts[value->part].cls];
}

void kvs_key_locked(kvs_index *index, uint32_t id, kvs_value_key *key_p)
{
    const kvs_value *value = kvs_value_at(index, id);
    const kvs_block *block = kvs_block_at(index, value->block);
    const kvs_schema *schema = index->schemas[block->schema];
    key_p->tenant = schema->tenant;
    key_p->schema = schema->digest;
    key_p->block = block->digest;
    key_p->part = schema->parts[value->part].id;
}

void kvs_index_key(kvs_index *index, uint32_t value, kvs_value_key *key_p)
{
    kvc_mutex_lock(&index->lock);
    kvs_key_locked(index, value, key_p);
    kvc_mutex_unlock(&index->lock);
}

const kvs_schema *kvs_index_schema(kvs_index *index, uint32_t id, uint32_t *part_p)
{
    kvc_mutex_lock(&index->lock);
    const kvs_value *value = kvs_value_at(index, id);
    const kvs_schema *schema = index->schemas[kvs_block_at(index, value->block)->schema];
    *part_p = value->part;
    kvc_mutex_unlock(&index->lock);
    return schema;
}

/* ---- put ------------------------------------------------------------------------------------- */

static kvs_claim claim_old(kvs_index *index, uint32_t id, bool durable, kvs_slot *dram_p)
{
    kvs_value *value = kvs_value_at(index, id);
    if (value->flags & (KVS_FILLING | KVS_DOOMED))
        return KVS_CLAIM_BUSY;
    if (!durable || (value->flags & (KVS_LMDB | KVS_SYNCED)) == (KVS_LMDB | KVS_SYNCED))
        return KVS_CLAIM_EXISTS;
    if (value->flags & KVS_WRITING || value->refs == UINT16_MAX)
        return KVS_CLAIM_BUSY;
    if (value->flags & KVS_LMDB) {
        value->refs++;
        return KVS_CLAIM_SYNC;
    }
    kvs_evict_dram_remove(index, id);
    value->flags |= KVS_WRITING;
    *dram_p = value->dram;
    return KVS_CLAIM_WRITE;
}

kvs_claim kvs_index_claim(kvs_index *index, const kvs_schema *schema, uint32_t part,
                          const kvc_digest *digest, bool durable, uint32_t *value_p,
                          kvs_slot *dram_p)
{
    kvs_claim claim;
    kvc_mutex_lock(&index->lock);
    uint32_t block = block_find(index, schema->id, digest);
    uint32_t id = block == KVS_NIL ? KVS_NIL : value_find(index, block, part);
    if (id != KVS_NIL) {
        claim = claim_old(index, id, durable, dram_p);
    } else if ((id = value_create(index, schema, part, digest)) != KVS_NIL) {
        kvs_value_at(index, id)->flags = KVS_FILLING;
        claim = KVS_CLAIM_MINE;
    } else {
        claim = KVS_CLAIM_NO_MEMORY;
    }
    kvc_mutex_unlock(&index->lock);
    *value_p = id;
    return claim;
}

void kvs_index_abandon(kvs_index *index, uint32_t value)
{
    kvc_mutex_lock(&index->lock);
    KVC_ASSERT(kvs_value_at(index, value)->flags == KVS_FILLING);
    kvs_value_free_locked(index, value);
    kvc_mutex_unlock(&index->lock);
}

static void dirty_push(kvs_index *index, uint32_t id)
{
    kvs_value_at(index, id)->chain = KVS_NIL;
    if (index->dirty_tail)
        kvs_value_at(index, index->dirty_tail)->chain = id;
    else
        index->dirty_head = id;
    index->dirty_tail = id;
    index->n_dirty++;
}

void kvs_index_publish_dram(kvs_index *index, uint32_t id, kvs_slot slot, bool dirty)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->flags == KVS_FILLING);
    value->dram = slot;
    value->flags = KVS_DRAM;
    if (dirty) {
        value->flags |= KVS_WRITING;
        dirty_push(index, id);
    } else {
        kvs_evict_dram_add(index, id);
    }
    index->n_visible++;
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_publish_lmdb(kvs_index *index, uint32_t id, kvs_slot lmdb, bool synced,
                            const kvs_slot *dram)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->flags == KVS_FILLING);
    value->lmdb = lmdb;
    value->flags = synced ? KVS_LMDB | KVS_SYNCED : KVS_LMDB;
    kvs_evict_lmdb_add(index, id);
    if (dram) {
        value->dram = *dram;
        value->flags |= KVS_DRAM;
        kvs_evict_dram_add(index, id);
    }
    index->n_visible++;
    kvc_mutex_unlock(&index->lock);
}

void kvs_index_wrote(kvs_index *index, uint32_t id, bool ok, kvs_slot lmdb, bool synced)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT((value->flags & (KVS_WRITING | KVS_DRAM)) == (KVS_WRITING | KVS_DRAM));
    value->flags &= (uint16_t)~KVS_WRITING;
    if (ok) {
        value->lmdb = lmdb;
        value->flags |= synced ? KVS_LMDB | KVS_SYNCED : KVS_LMDB;
        kvs_evict_lmdb_add(index, id);
    }
    kvs_evict_dram_add(index, id);
    kvc_mutex_unlock(&index->lock);
}

static void unref_locked(kvs_index *index, uint32_t id)
{
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->refs > 0);
    if (--value->refs == 0 && value->flags & KVS_DOOMED) {
        value->chain = index->dead_head;
        index->dead_head = id;
    }
}

void kvs_index_synced(kvs_index *index, uint32_t id, bool ok)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    if (ok && value->flags & KVS_LMDB)
        value->flags |= KVS_SYNCED;
    unref_locked(index, id);
    kvc_mutex_unlock(&index->lock);
}

uint32_t kvs_index_next_dirty(kvs_index *index, kvs_slot *dram_p)
{
    kvc_mutex_lock(&index->lock);
    uint32_t id = index->dirty_head;
    if (id != KVS_NIL) {
        kvs_value *value = kvs_value_at(index, id);
        index->dirty_head = value->chain;
        if (index->dirty_head == KVS_NIL)
            index->dirty_tail = KVS_NIL;
        value->chain = KVS_NIL;
        index->n_dirty--;
        *dram_p = value->dram;
    }
    kvc_mutex_unlock(&index->lock);
    return id;
}

uint64_t kvs_index_dirty_count(kvs_index *index)
{
    kvc_mutex_lock(&index->lock);
    uint64_t n = index->n_dirty;
    kvc_mutex_unlock(&index->lock);
    return n;
}

bool kvs_index_recovered(kvs_index *index, const kvs_schema *schema, uint32_t part,
                         const kvc_digest *digest, kvs_slot lmdb)
{
    uint32_t id = KVS_NIL;
    kvc_mutex_lock(&index->lock);
    uint32_t block = block_find(index, schema->id, digest);
    if (block == KVS_NIL || value_find(index, block, part) == KVS_NIL)
        id = value_create(index, schema, part, digest);
    if (id != KVS_NIL) {
        kvs_value *value = kvs_value_at(index, id);
        value->lmdb = lmdb;
        value->flags = KVS_LMDB | KVS_SYNCED;
        kvs_evict_lmdb_add(index, id);
        index->n_visible++;
    }
    kvc_mutex_unlock(&index->lock);
    return id != KVS_NIL;
}

/* ---- read ------------------------------------------------------------------------------------ */

/* Adds rows to the value's count in this window; true once it makes the value worth loading. */
static bool heat_add(kvs_value *value, uint32_t rows, uint32_t promote_rows, uint32_t window)
{
    uint32_t have = value->heat >> 12 == (window & HEAT_WINDOWS) ? value->heat & HEAT_ROWS : 0;
    have = have + rows > HEAT_ROWS ? HEAT_ROWS : have + rows;
    value->heat = (uint16_t)((window & HEAT_WINDOWS) << 12 | have);
    return promote_rows && have >= promote_rows;
}

static void read_ref(kvs_index *index, uint32_t part, uint32_t promote_rows, uint32_t window,
                     kvs_read *read)
{
    read->where = KVS_NOWHERE;
    read->promote = false;
    read->value = value_find(index, read->block, part);
    if (read->value == KVS_NIL)
        return;
    kvs_value *value = kvs_value_at(index, read->value);
    if (!value_visible(value))
        return;
    if (value->refs >= UINT16_MAX - 1) {
        read->where = KVS_BUSY;
        return;
    }
    value->refs++;
    if (value->flags & KVS_DRAM) {
        value->flags |= KVS_VISITED;
        read->where = KVS_IN_DRAM;
        read->slot = value->dram;
        return;
    }
    read->where = KVS_IN_LMDB;
    read->slot = value->lmdb;
    if (heat_add(value, read->n_rows, promote_rows, window) && !(value->flags & KVS_LOADING)) {
        value->flags |= KVS_LOADING;
        value->refs++;
        read->promote = true;
    }
}

void kvs_index_ref(kvs_index *index, const kvs_schema *schema, uint32_t part, uint32_t promote_rows,
                   uint32_t window, kvs_read *reads, uint32_t n)
{
    KVC_ASSERT(part < schema->n_parts);
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + STEP_VALUES; i < n && i < end; i++)
            read_ref(index, part, promote_rows, window, &reads[i]);
        kvc_mutex_unlock(&index->lock);
    }
}

void kvs_index_unref(kvs_index *index, const uint32_t *values, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + STEP_VALUES; i < n && i < end; i++)
            unref_locked(index, values[i]);
        kvc_mutex_unlock(&index->lock);
    }
}

bool kvs_index_doom(kvs_index *index, uint32_t id)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->refs > 0);
    /* A copy in dram was verified when it was loaded and keeps serving. */
    bool doomed = value->flags & KVS_LMDB && !(value->flags & (KVS_DRAM | KVS_DOOMED));
    if (doomed) {
        kvs_evict_lmdb_remove(index, id);
        value->flags = (uint16_t)((value->flags & KVS_LOADING) | KVS_DOOMED);
        index->n_visible--;
    }
    kvc_mutex_unlock(&index->lock);
    return doomed;
}

bool kvs_index_loaded(kvs_index *index, uint32_t id, const kvs_slot *slot)
{
    kvc_mutex_lock(&index->lock);
    kvs_value *value = kvs_value_at(index, id);
    KVC_ASSERT(value->flags & KVS_LOADING);
    value->flags &= (uint16_t)~KVS_LOADING;
    bool taken = slot && !(value->flags & (KVS_DRAM | KVS_DOOMED));
    if (taken) {
        value->dram = *slot;
        value->flags |= KVS_DRAM;
        kvs_evict_dram_add(index, id);
    }
    unref_locked(index, id);
    kvc_mutex_unlock(&index->lock);
    return taken;
}

/* ---- match and contexts ---------------------------------------------------------------------- */

static bool value_present(kvs_index *index, uint32_t block, uint32_t part)
{
    uint32_t id = block == KVS_NIL ? KVS_NIL : value_find(index, block, part);
    return id != KVS_NIL && value_visible(kvs_value_at(index, id));
}

/* Judges block i given run [n_parts], the lengths of the present runs that end before it. False: a
   part without a window is missing, so no longer prefix can match. *good_p: i + 1 blocks match. */
static bool match_block(kvs_index *index, const kvs_schema *schema, const uint16_t *parts,
                        uint32_t n_parts, bool windowed, uint32_t block, uint32_t i, uint32_t *run,
                        bool *good_p)
{
    *good_p = true;
    for (uint32_t p = 0; p < n_parts; p++) {
        uint32_t need = windowed ? schema->parts[parts[p]].window_blocks : 0;
        bool present = value_present(index, block, parts[p]);
        if (!need && !present)
            return false;
        run[p] = present ? run[p] + 1 : 0;
        if (need && run[p] < (need < i + 1 ? need : i + 1))
            *good_p = false;
    }
    return true;
}

uint32_t kvs_index_match(kvs_index *index, const kvs_schema *schema, const uint16_t *parts,
                         uint32_t n_parts, bool windowed, const kvc_digest *digests, uint32_t n)
{
    uint32_t hits = 0;
    bool more = true;
    uint32_t *run = calloc(n_parts ? n_parts : 1, sizeof(*run));
    if (!run)
        return 0;
    for (uint32_t i = 0; more && i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + STEP_VALUES; more && i < n && i < end; i++) {
            bool good;
            more = match_block(index, schema, parts, n_parts, windowed,
                               block_find(index, schema->id, &digests[i]), i, run, &good);
            if (more && good)
                hits = i + 1;
        }
        kvc_mutex_unlock(&index->lock);
    }
    free(run);
    return hits;
}

void kvs_index_drop_blocks(kvs_index *index, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t i = 0; i < n;) {
        kvc_mutex_lock(&index->lock);
        for (uint32_t end = i + STEP_VALUES; i < n && i < end; i++) {
            KVC_ASSERT(kvs_block_at(index, blocks[i])->contexts > 0);
            kvs_block_at(index, blocks[i])->contexts--;
            block_settle(index, blocks[i]);
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
        for (uint32_t end = i + STEP_VALUES; i < n && i < end; i++) {
            blocks[i] = block_get(index, schema->id, &digests[i]);
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

bool kvs_index_block_is(kvs_index *index, uint32_t block, const kvc_digest *digest)
{
    kvc_mutex_lock(&index->lock);
    bool same = kvc_digest_equal(&kvs_block_at(index, block)->digest, digest);
    kvc_mutex_unlock(&index->lock);
    return same;
}
