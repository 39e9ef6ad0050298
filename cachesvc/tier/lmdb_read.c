/*
 * lmdb_read.c: reads rows of values in LMDB, and lists the values after a start.
 *
 * Threads: any disk thread; a page of the map that is not in RAM is waited for here. Invariants:
 * a row leaves only if its sum is right; the sums come from a prefix whose own sum is right; a
 * read transaction lives for one copy. Rows of a value that is cold are asked for all at once
 * before the first is touched, so that the disk works on them side by side.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/digest.h"
#include "base/log.h"
#include "base/sum.h"
#include "lmdb_tier.h"

#define SAMPLES 3u /* pages looked at to tell whether a value is cold */

static void log_corrupt(const kvsi_class *class, const kvs_value_key *key, const char *what,
                        uint32_t row)
{
    char hex[KVC_DIGEST_HEX_BYTES];

    kvc_digest_hex(&key->block, hex);
    KVC_LOG_ERROR(TIER, "lmdb: %s: block %s part %u: %s, row %u", class->env.name, hex, key->part,
                  what, row);
}

static kvc_status check_ranges(const kvs_row_range *ranges, uint32_t n_ranges, uint32_t n_rows)
{
    for (uint32_t i = 0; i < n_ranges; i++) {
        if (ranges[i].first > n_rows || ranges[i].n > n_rows - ranges[i].first)
            return KVC_INVALID;
    }
    return KVC_OK;
}

/* --- cold values --- */

static uint8_t *page_of(const uint8_t *p)
{
    return (uint8_t *)((uintptr_t)p & ~(uintptr_t)(KVSI_PAGE_BYTES - 1));
}

static bool in_ram(const uint8_t *p)
{
    unsigned char state = 1;

    return mincore(page_of(p), 1, &state) != 0 || (state & 1);
}

/* A look at a few of the pages; a row alone is not worth a look, its own fault fetches it. */
static bool looks_cold(const uint8_t *rows, uint32_t row_bytes, const kvs_row_range *ranges,
                       uint32_t n_ranges)
{
    if (n_ranges == 0 || (n_ranges == 1 && (uint64_t)ranges[0].n * row_bytes <= KVSI_PAGE_BYTES))
        return false;
    for (uint32_t i = 0; i < SAMPLES; i++) {
        const kvs_row_range *range = &ranges[(uint64_t)(n_ranges - 1) * i / (SAMPLES - 1)];
        uint64_t last = range->n > 0 ? range->n - 1 : 0;
        uint64_t row = range->first + last * i / (SAMPLES - 1);
        if (!in_ram(rows + row * row_bytes))
            return true;
    }
    return false;
}

/* Starts reading every page that the ranges touch; neighbours in one call. */
static void ask_for(const uint8_t *rows, uint32_t row_bytes, const kvs_row_range *ranges,
                    uint32_t n_ranges)
{
    uint8_t *from = NULL, *to = NULL;

    for (uint32_t i = 0; i < n_ranges; i++) {
        const uint8_t *first = rows + (uint64_t)ranges[i].first * row_bytes;
        uint8_t *start = page_of(first);
        uint8_t *end = page_of(first + (uint64_t)ranges[i].n * row_bytes + KVSI_PAGE_BYTES - 1);
        if (from != NULL && start >= from && start <= to) {
            to = end > to ? end : to;
            continue;
        }
        if (from != NULL)
            (void)madvise(from, (size_t)(to - from), MADV_WILLNEED);
        from = start;
        to = end;
    }
    if (to > from)
        (void)madvise(from, (size_t)(to - from), MADV_WILLNEED);
}

/* --- one read --- */

/* A held entry with the value's row sums: from the cache, or from its prefix once that is right. */
static kvc_status get_sums(kvs_tier *tier, const kvsi_class *class, const MDB_val *record,
                           const kvs_value_key *key, const uint8_t *packed, uint32_t row_bytes,
                           uint32_t n_rows, kvsi_sums_entry **entry_p)
{
    *entry_p = kvsi_sums_find(tier->sums, packed);
    if (*entry_p != NULL)
        return KVC_OK;
    if (kvsi_record_check(record->mv_data, record->mv_size, key, row_bytes, n_rows) != KVC_OK) {
        log_corrupt(class, key, "the value's own sum or header is wrong", 0);
        return KVC_CORRUPT;
    }
    *entry_p = kvsi_sums_add(tier->sums, packed, kvsi_record_sums(record->mv_data), n_rows);
    return *entry_p != NULL ? KVC_OK : KVC_NO_MEMORY;
}

static void copy_rows(const uint8_t *rows, uint32_t row_bytes, const kvs_row_range *ranges,
                      uint32_t n_ranges)
{
    if (looks_cold(rows, row_bytes, ranges, n_ranges))
        ask_for(rows, row_bytes, ranges, n_ranges);
    for (uint32_t i = 0; i < n_ranges; i++)
        memcpy(ranges[i].dst, rows + (uint64_t)ranges[i].first * row_bytes,
               (size_t)ranges[i].n * row_bytes);
}

static kvc_status verify_rows(const kvsi_class *class, const kvs_value_key *key,
                              const uint32_t *sums, uint32_t row_bytes, const kvs_row_range *ranges,
                              uint32_t n_ranges)
{
    for (uint32_t i = 0; i < n_ranges; i++) {
        const uint8_t *row = ranges[i].dst;
        for (uint32_t k = 0; k < ranges[i].n; k++, row += row_bytes) {
            if (kvc_row_sum(row, row_bytes) != sums[ranges[i].first + k]) {
                log_corrupt(class, key, "a row's sum is wrong", ranges[i].first + k);
                return KVC_CORRUPT;
            }
        }
    }
    return KVC_OK;
}

kvc_status kvsi_read(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges)
{
    kvsi_sums_entry *entry = NULL;
    uint8_t packed[KVSI_KEY_BYTES];
    MDB_val name = {sizeof(packed), packed}, record;
    MDB_txn *txn;

    if (slot.a >= KVSI_MAX_CLASSES || slot.b != kvsi_slot(0, row_bytes, n_rows).b)
        return KVC_INVALID;
    kvc_status status = check_ranges(ranges, n_ranges, n_rows);
    if (status != KVC_OK)
        return status;
    kvsi_class *class = &tier->classes[slot.a];
    kvsi_key_pack(key, row_bytes, n_rows, packed);
    status = kvsi_env_read_begin(&class->env, &txn);
    if (status != KVC_OK)
        return status;
    status = kvsi_lmdb_status(mdb_get(txn, class->env.dbi, &name, &record));
    if (status == KVC_OK && record.mv_size != kvsi_record_bytes(row_bytes, n_rows))
        status = KVC_CORRUPT;
    if (status == KVC_OK)
        status = get_sums(tier, class, &record, key, packed, row_bytes, n_rows, &entry);
    if (status == KVC_OK)
        copy_rows((const uint8_t *)record.mv_data + kvsi_record_prefix_bytes(n_rows), row_bytes,
                  ranges, n_ranges);
    kvsi_env_read_end(&class->env, txn);
    if (status != KVC_OK)
        return status;
    status = verify_rows(class, key, entry->sums, row_bytes, ranges, n_ranges);
    kvsi_sums_put(tier->sums, entry);
    for (uint32_t i = 0; i < n_ranges && status == KVC_OK; i++)
        atomic_fetch_add_explicit(&tier->bytes_read, (uint64_t)ranges[i].n * row_bytes,
                                  memory_order_relaxed);
    return status;
}

/* --- recover --- */

typedef struct listing {
    kvs_tier *tier;
    kvs_tier_found *found; /* NULL: only walk, to see whether the walk gets through */
    void *arg;
    bool stopped;
    uint64_t n_bad;
} listing;

/* Whether key and length make sense together; says whose value it is. Touches no record. */
static bool parse_entry(const kvsi_class *class, const MDB_val *name, const MDB_val *record,
                        kvs_value_key *key_p, uint32_t *row_bytes_p, uint32_t *n_rows_p)
{
    if (name->mv_size != KVSI_KEY_BYTES)
        return false;
    kvsi_key_unpack(name->mv_data, key_p, row_bytes_p, n_rows_p);
    if (*row_bytes_p == 0 || *n_rows_p == 0 || *n_rows_p > KVSI_MAX_ROWS)
        return false;
    return record->mv_size == kvsi_record_bytes(*row_bytes_p, *n_rows_p) &&
           class->record_pages == kvsi_record_pages(*row_bytes_p, *n_rows_p);
}

static void drop_bad(listing *list, uint32_t class_number, const MDB_val *name)
{
    kvsi_drop *drop = malloc(sizeof(*drop));

    list->n_bad++;
    if (drop == NULL || name->mv_size > KVSI_KEY_BYTES) {
        free(drop);
        return;
    }
    drop->class_number = class_number;
    drop->key_bytes = (uint32_t)name->mv_size;
    memcpy(drop->key, name->mv_data, name->mv_size);
    kvsi_drop_push(list->tier, drop);
}

static int list_class(listing *list, uint32_t number, MDB_cursor *cursor)
{
    const kvsi_class *class = &list->tier->classes[number];
    uint32_t row_bytes, n_rows;
    kvs_value_key key;
    MDB_val name, record;
    int rc;

    while (!list->stopped &&
           (rc = mdb_cursor_get(cursor, &name, &record, MDB_NEXT)) == MDB_SUCCESS) {
        bool fits = parse_entry(class, &name, &record, &key, &row_bytes, &n_rows);
        if (list->found == NULL)
            continue;
        if (!fits)
            drop_bad(list, number, &name);
        else if (!list->found(list->arg, &key, kvsi_slot(number, row_bytes, n_rows), row_bytes,
                              n_rows))
            list->stopped = true;
    }
    return list->stopped || rc == MDB_NOTFOUND ? MDB_SUCCESS : rc;
}

static kvc_status walk_class(listing *list, uint32_t number)
{
    kvsi_env *env = &list->tier->classes[number].env;
    MDB_cursor *cursor;
    MDB_txn *txn;
    kvc_status status = kvsi_env_read_begin(env, &txn);

    if (status != KVC_OK)
        return status;
    int rc = mdb_cursor_open(txn, env->dbi, &cursor);
    if (rc == MDB_SUCCESS) {
        rc = list_class(list, number, cursor);
        mdb_cursor_close(cursor);
    }
    kvsi_env_read_end(env, txn);
    if (rc != MDB_SUCCESS)
        KVC_LOG_ERROR(TIER, "lmdb: %s: listing its values: %s", env->name, mdb_strerror(rc));
    return kvsi_lmdb_status(rc);
}

/* The next write of this size makes the class anew. Nothing was read or written here since open. */
static kvc_status lose_class(kvs_tier *tier, kvsi_class *class)
{
    char name[sizeof(class->env.name)];

    memcpy(name, class->env.name, sizeof(name));
    kvsi_env_close(&class->env);
    kvc_mutex_lock(&tier->lock);
    class->map_pages = class->live_pages = class->tree_pages = class->values = 0;
    kvc_mutex_unlock(&tier->lock);
    return kvsi_set_aside(tier, name);
}

/* Walks once before anything is given away: what is given cannot be taken back. */
static kvc_status recover_class(listing *list, uint32_t number)
{
    listing dry = {.tier = list->tier};
    kvc_status status = walk_class(&dry, number);

    if (status == KVC_OK)
        return walk_class(list, number);
    return status == KVC_CORRUPT ? lose_class(list->tier, &list->tier->classes[number]) : status;
}

kvc_status kvsi_recover(kvs_tier *tier, kvs_tier_found *found, void *arg)
{
    listing list = {.tier = tier, .found = found, .arg = arg};
    kvc_status status = KVC_OK;

    for (uint32_t i = 0; i < tier->n_classes && status == KVC_OK && !list.stopped; i++) {
        if (tier->classes[i].map_pages > 0)
            status = recover_class(&list, i);
    }
    if (list.n_bad > 0)
        KVC_LOG_WARN(TIER, "lmdb: dropped %llu records that make no sense",
                     (unsigned long long)list.n_bad);
    return status;
}
