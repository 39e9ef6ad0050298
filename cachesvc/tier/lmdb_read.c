/*
 * lmdb_read.c: reads rows of values in LMDB.
 *
 * Threads: any disk thread. Invariants: a row leaves only if its sum is right; the sums come from a
 * prefix whose own sum is right; no lock is held while the map is touched, since that may end under
 * a guard; a read transaction is held reader_ns at most.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/log.h"
#include "base/sum.h"
#include "lmdb_cold.h"

#define MAX_TRIES 4u /* of a read whose transaction did not last */

static void log_corrupt(const kvsi_reading *r, const char *what, uint32_t row)
{
    char hex[KVC_DIGEST_HEX_BYTES];

    kvc_digest_hex(&r->key->block, hex);
    KVC_LOG_ERROR(TIER, "lmdb: %s: block %s part %u: %s, row %u", r->class->env.name, hex,
                  r->key->part, what, row);
}

static kvc_status check_ranges(const kvs_row_range *ranges, uint32_t n_ranges, uint32_t n_rows)
{
    for (uint32_t i = 0; i < n_ranges; i++) {
        if (ranges[i].first > n_rows || ranges[i].n > n_rows - ranges[i].first)
            return KVC_INVALID;
    }
    return KVC_OK;
}

/* Under a guard. Touches the tree only, not the record. */
static int look_up(void *arg)
{
    kvsi_reading *r = arg;
    MDB_val name = {sizeof(r->packed), r->packed};

    return mdb_get(r->txn, r->class->env.dbi, &name, &r->record);
}

kvc_status kvsi_reading_look_up(kvsi_reading *r)
{
    kvc_status status = kvsi_lmdb_status(kvsi_env_look(&r->class->env, look_up, r));

    if (status == KVC_OK && !kvsi_record_fits(r->record.mv_size, r->row_bytes, r->n_rows))
        status = KVC_CORRUPT;
    if (status == KVC_OK)
        r->first_page = (const uint8_t *)r->record.mv_data - KVSI_RECORD_OFF;
    return status;
}

/* Opens the transaction and finds the record. */
static kvc_status begin(kvsi_reading *r)
{
    kvc_status status = kvsi_env_read_begin(&r->class->env, &r->txn);

    if (status != KVC_OK)
        return status;
    r->until_ns = kvc_now_ns() + r->tier->reader_ns;
    return kvsi_reading_look_up(r);
}

kvc_status kvsi_reading_prepare(kvsi_reading *r)
{
    r->prefix_bytes = kvsi_record_prefix_bytes(r->row_bytes, r->n_rows);
    r->entry = kvsi_sums_find(r->tier->sums, r->packed);
    if (r->entry != NULL)
        return KVC_OK;
    r->prefix = malloc(r->prefix_bytes);
    return r->prefix != NULL ? KVC_OK : KVC_NO_MEMORY;
}

/* The sums, once the prefix is here and right. */
static kvc_status get_sums(kvsi_reading *r)
{
    if (r->entry != NULL)
        return KVC_OK;
    if (kvsi_record_check(r->prefix, (size_t)kvsi_record_bytes(r->row_bytes, r->n_rows), r->key,
                          r->row_bytes, r->n_rows) != KVC_OK) {
        if (!r->early)
            log_corrupt(r, "the value's own sum or header is wrong", 0);
        return KVC_CORRUPT;
    }
    r->entry = kvsi_sums_add(r->tier->sums, r->packed, kvsi_record_sums(r->prefix), r->n_rows);
    return r->entry != NULL ? KVC_OK : KVC_NO_MEMORY;
}

static kvc_status verify_rows(const kvsi_reading *r)
{
    for (uint32_t i = 0; i < r->n_ranges; i++) {
        const kvs_row_range *range = &r->ranges[i];
        const uint8_t *row = range->dst;
        for (uint32_t k = 0; k < range->n; k++, row += r->row_bytes) {
            if (kvc_row_sum(row, r->row_bytes) == r->entry->sums[range->first + k])
                continue;
            if (!r->early)
                log_corrupt(r, "a row's sum is wrong", range->first + k);
            return KVC_CORRUPT;
        }
    }
    return KVC_OK;
}

kvc_status kvsi_reading_verify(kvsi_reading *r)
{
    kvc_status status = get_sums(r);

    return status == KVC_OK ? verify_rows(r) : status;
}

void kvsi_reading_finish(kvsi_reading *r)
{
    kvsi_reading_let_go(r);
    if (r->entry != NULL)
        kvsi_sums_put(r->tier->sums, r->entry);
    r->entry = NULL;
    free(r->prefix);
    r->prefix = NULL;
    r->span = 0;
    r->span_done = 0;
}

static kvc_status read_once(kvsi_reading *r)
{
    r->early = false;
    kvc_status status = kvsi_reading_prepare(r);
    if (status == KVC_OK)
        status = begin(r);
    if (status == KVC_OK)
        status = kvsi_reading_fill(r);
    while (status == KVC_AGAIN && r->span <= r->n_ranges) {
        kvsi_reading_let_go(r);
        r->early = true;
        status = begin(r);
        if (status == KVC_OK)
            status = kvsi_reading_fill(r);
    }
    kvsi_reading_let_go(r);
    if (status == KVC_OK)
        status = kvsi_reading_verify(r);
    kvsi_reading_finish(r);
    return status;
}

kvc_status kvsi_reading_init(kvsi_reading *r, kvs_tier *tier, const kvs_value_key *key,
                             kvs_slot slot, uint32_t row_bytes, uint32_t n_rows,
                             const kvs_row_range *ranges, uint32_t n_ranges)
{
    if (slot.a >= KVSI_MAX_CLASSES || slot.b != kvsi_slot(0, row_bytes, n_rows).b)
        return KVC_INVALID;
    kvc_status status = check_ranges(ranges, n_ranges, n_rows);
    if (status != KVC_OK)
        return status;
    memset(r, 0, offsetof(kvsi_reading, pieces));
    r->tier = tier;
    r->class = &tier->classes[slot.a];
    r->key = key;
    r->row_bytes = row_bytes;
    r->n_rows = n_rows;
    r->ranges = ranges;
    r->n_ranges = n_ranges;
    kvsi_key_pack(key, row_bytes, n_rows, r->packed);
    return KVC_OK;
}

void kvsi_reading_count(const kvsi_reading *r)
{
    for (uint32_t i = 0; i < r->n_ranges; i++)
        atomic_fetch_add_explicit(&r->tier->bytes_read, (uint64_t)r->ranges[i].n * r->row_bytes,
                                  memory_order_relaxed);
}

kvc_status kvsi_read(kvs_tier *tier, const kvs_value_key *key, kvs_slot slot, uint32_t row_bytes,
                     uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges)
{
    kvsi_reading r;
    kvc_status status = kvsi_reading_init(&r, tier, key, slot, row_bytes, n_rows, ranges, n_ranges);

    if (status != KVC_OK)
        return status;
    for (uint32_t tries = 0; tries < MAX_TRIES; tries++) {
        status = read_once(&r);
        /* Bytes that moved away under a transaction that was let go are not damaged. */
        if (status != KVC_CORRUPT || !r.early)
            break;
    }
    if (status == KVC_IO)
        kvsi_class_check(tier, r.class);
    if (status == KVC_OK)
        kvsi_reading_count(&r);
    return status;
}
