/*
 * lmdb_sums.c: a hash table with an LRU list over immutable, counted entries; see lmdb_sums.h.
 *
 * One leaf lock guards the table, the list and every entry's refs. Invariant: used_bytes, the
 * bucket array included, is at most max_bytes once the cache holds anything.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/sum.h"
#include "base/thread.h"
#include "lmdb_sums.h"

#define BYTES_PER_BUCKET 1024u /* about one entry of 256 rows */
#define MAX_BUCKETS      (1u << 20)

struct kvsi_sums {
    kvc_mutex lock; /* rank LEAF; guards everything */
    kvsi_sums_entry **buckets;
    uint32_t n_buckets;
    kvsi_sums_entry *newest, *oldest;
    uint64_t max_bytes, used_bytes;
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
    if (sums->buckets == NULL) {
        free(sums);
        return KVC_NO_MEMORY;
    }
    sums->max_bytes = max_bytes;
    sums->used_bytes = sums->n_buckets * sizeof(kvsi_sums_entry *);
    kvc_mutex_init(&sums->lock, KVC_RANK_LEAF);
    *sums_p = sums;
    return KVC_OK;
}

static void unref(kvsi_sums_entry *entry)
{
    KVC_ASSERT(entry->refs > 0);
    if (--entry->refs == 0)
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
    sums->used_bytes -= entry_bytes(entry->n_rows);
    unref(entry);
}

void kvsi_sums_destroy(kvsi_sums *sums)
{
    if (sums == NULL)
        return;
    while (sums->oldest != NULL)
        uncache(sums, find_link(sums, sums->oldest->key, sums->oldest->hash));
    kvc_mutex_fini(&sums->lock);
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

/* Caches a new entry unless another reader was faster or it does not fit at all. */
static void cache(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    uint64_t bytes = entry_bytes(entry->n_rows);
    kvsi_sums_entry **link = find_link(sums, entry->key, entry->hash);

    if (*link != NULL)
        uncache(sums, link);
    while (sums->oldest != NULL && sums->used_bytes + bytes > sums->max_bytes)
        uncache(sums, find_link(sums, sums->oldest->key, sums->oldest->hash));
    if (sums->used_bytes + bytes > sums->max_bytes)
        return;
    link = &sums->buckets[entry->hash & (sums->n_buckets - 1)];
    entry->chain = *link;
    *link = entry;
    lru_link(sums, entry);
    entry->refs++;
    sums->used_bytes += bytes;
}

kvsi_sums_entry *kvsi_sums_add(kvsi_sums *sums, const uint8_t key[KVSI_KEY_BYTES],
                               const uint32_t *row_sums, uint32_t n_rows)
{
    kvsi_sums_entry *entry = calloc(1, (size_t)entry_bytes(n_rows));

    if (entry == NULL)
        return NULL;
    entry->hash = kvc_value_sum(key, KVSI_KEY_BYTES);
    entry->refs = 1;
    entry->n_rows = n_rows;
    memcpy(entry->key, key, KVSI_KEY_BYTES);
    memcpy(entry->sums, row_sums, n_rows * sizeof(uint32_t));
    kvc_mutex_lock(&sums->lock);
    cache(sums, entry);
    kvc_mutex_unlock(&sums->lock);
    return entry;
}

void kvsi_sums_put(kvsi_sums *sums, kvsi_sums_entry *entry)
{
    kvc_mutex_lock(&sums->lock);
    unref(entry);
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
