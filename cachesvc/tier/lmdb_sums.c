/*
 * lmdb_sums.c: a hash table with an LRU list over immutable, counted entries; see lmdb_sums.h.
 *
 * One leaf lock guards the table, the list, every entry's refs and the pool. Invariant: the bucket
 * array and the pool take max_bytes at most; entries that find no room there are malloc'd and not
 * cached.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/sum.h"
#include "base/thread.h"
#include "lmdb_pool.h"
#include "lmdb_sums.h"

#define BYTES_PER_BUCKET 1024u /* about one entry of 256 rows */
#define MAX_BUCKETS      (1u << 20)

struct kvsi_sums {
    kvc_mutex lock; /* rank LEAF; guards everything */
    kvsi_sums_entry **buckets;
    uint32_t n_buckets;
    kvsi_sums_entry *newest, *oldest;
    kvsi_pool pool; /* of the entries */
};

static uint64_t entry_bytes(uint32_t n_rows)
{
    return sizeof(kvsi_sums_entry) + (uint64_t)n_rows * sizeof(uint32_t);
}

kvc_status kvsi_sums_create(uint64_t max_bytes, kvsi_sums **sums_p)
{
    kvsi_sums *sums = calloc(1, sizeof(*sums));

    *sums_p = NULL;
    if (sums == NULL)
        return KVC_NO_MEMORY;
    sums->n_buckets = 1;
    while (sums->n_buckets < MAX_BUCKETS && sums->n_buckets < max_bytes / BYTES_PER_BUCKET)
        sums->n_buckets *= 2;
    sums->buckets = calloc(sums->n_buckets, sizeof(kvsi_sums_entry *));
    uint64_t table_bytes = sums->n_buckets * sizeof(kvsi_sums_entry *);
    if (sums->buckets == NULL ||
        kvsi_pool_init(&sums->pool, max_bytes > table_bytes ? max_bytes - table_bytes : 0) !=
            KVC_OK) {
        free(sums->buckets);
        free(sums);
        return KVC_NO_MEMORY;
    }
    kvc_mutex_init(&sums->lock, KVC_RANK_LEAF);
    *sums_p = sums;
    return KVC_OK;
}

static void unref(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    KVC_ASSERT(entry->refs > 0);
    if (--entry->refs > 0)
        return;
    if (kvsi_pool_has(&sums->pool, entry))
        kvsi_pool_free(&sums->pool, entry);
    else
        free(entry);
}

static void lru_unlink(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    *(entry->newer != NULL ? &entry->newer->older : &sums->newest) = entry->older;
    *(entry->older != NULL ? &entry->older->newer : &sums->oldest) = entry->newer;
}

static void lru_link(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    entry->newer = NULL;
    entry->older = sums->newest;
    *(sums->newest != NULL ? &sums->newest->newer : &sums->oldest) = entry;
    sums->newest = entry;
}

static kvsi_sums_entry **find_link(kvsi_sums *sums, const uint8_t *key, uint64_t hash)
{
    kvsi_sums_entry **link = &sums->buckets[hash & (sums->n_buckets - 1)];

    while (*link != NULL &&
           ((*link)->hash != hash || memcmp((*link)->key, key, KVSI_KEY_BYTES) != 0))
        link = &(*link)->chain;
    return link;
}

static void uncache(kvsi_sums *sums, kvsi_sums_entry **link)
{
    kvsi_sums_entry *entry = *link;

    *link = entry->chain;
    lru_unlink(sums, entry);
    unref(sums, entry);
}

void kvsi_sums_destroy(kvsi_sums *sums)
{
    if (sums == NULL)
        return;
    while (sums->oldest != NULL)
        uncache(sums, find_link(sums, sums->oldest->key, sums->oldest->hash));
    kvc_mutex_fini(&sums->lock);
    kvsi_pool_fini(&sums->pool);
    free(sums->buckets);
    free(sums);
}

kvsi_sums_entry *kvsi_sums_find(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES])
{
    uint64_t hash = kvc_value_sum(key, KVSI_KEY_BYTES);

    kvc_mutex_lock(&sums->lock);
    kvsi_sums_entry *entry = *find_link(sums, key, hash);
    if (entry != NULL) {
        entry->refs++;
        lru_unlink(sums, entry);
        lru_link(sums, entry);
    }
    kvc_mutex_unlock(&sums->lock);
    return entry;
}

/* Room for an entry in the pool, which the oldest ones make; NULL: it does not fit at all. */
static kvsi_sums_entry *make_room(kvsi_sums *sums, size_t len_bytes)
{
    kvsi_sums_entry *entry = NULL;

    if (len_bytes > kvsi_pool_max(&sums->pool))
        return NULL;
    while ((entry = kvsi_pool_alloc(&sums->pool, len_bytes)) == NULL && sums->oldest != NULL)
        uncache(sums, find_link(sums, sums->oldest->key, sums->oldest->hash));
    return entry;
}

static void cache(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    kvsi_sums_entry **link = &sums->buckets[entry->hash & (sums->n_buckets - 1)];

    entry->chain = *link;
    *link = entry;
    lru_link(sums, entry);
    entry->refs++;
}

kvsi_sums_entry *kvsi_sums_add(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES],
                               const uint32_t *row_sums, uint32_t n_rows)
{
    size_t len_bytes = (size_t)entry_bytes(n_rows);
    uint64_t hash = kvc_value_sum(key, KVSI_KEY_BYTES);

    kvc_mutex_lock(&sums->lock);
    kvsi_sums_entry **link = find_link(sums, key, hash);
    if (*link != NULL) /* another reader was faster */
        uncache(sums, link);
    kvsi_sums_entry *entry = make_room(sums, len_bytes);
    bool in_pool = entry != NULL;
    if (!in_pool)
        entry = malloc(len_bytes);
    if (entry != NULL) {
        memset(entry, 0, sizeof(*entry));
        entry->hash = hash;
        entry->refs = 1;
        entry->n_rows = n_rows;
        memcpy(entry->key, key, KVSI_KEY_BYTES);
        memcpy(entry->sums, row_sums, n_rows * sizeof(uint32_t));
    }
    if (in_pool)
        cache(sums, entry);
    kvc_mutex_unlock(&sums->lock);
    return entry;
}

void kvsi_sums_put(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    kvc_mutex_lock(&sums->lock);
    unref(sums, entry);
    kvc_mutex_unlock(&sums->lock);
}

void kvsi_sums_drop(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES])
{
    uint64_t hash = kvc_value_sum(key, KVSI_KEY_BYTES);

    kvc_mutex_lock(&sums->lock);
    kvsi_sums_entry **link = find_link(sums, key, hash);
    if (*link != NULL)
        uncache(sums, link);
    kvc_mutex_unlock(&sums->lock);
}
