/*
 * lmdb_recover.c: lists the values of every class after a start.
 *
 * Thread: recover's caller, before any other use of the tier. Invariants: keys alone are looked at,
 * under a guard, a batch of them at a time: no read transaction is held longer than that, and what
 * is told of is told with none open.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "lmdb_tier.h"

#define BATCH 256u /* entries a read transaction */

typedef struct listing {
    kvs_tier *tier;
    kvs_tier_found *found; /* NULL: only walk, to see whether the walk gets through */
    void *arg;
    bool stopped;
    uint64_t n_bad;
} listing;

/* Some keys of a class, copied out of the map. */
typedef struct batch {
    kvsi_env *env;
    MDB_txn *txn;
    MDB_cursor *cursor;
    uint32_t n;
    bool started, last; /* after names[n - 1] of the batch before; there is no more */
    uint32_t name_bytes[BATCH];
    uint64_t record_bytes[BATCH];
    uint8_t names[BATCH][KVSI_MAX_NAME];
} batch;

/* Whether key and length make sense together; says whose value it is. Touches no record. */
static bool parse_entry(const kvsi_class *class, const batch *b, uint32_t i, kvs_value_key *key_p,
                        uint32_t *row_bytes_p, uint32_t *n_rows_p)
{
    return kvsi_key_parse(b->names[i], b->name_bytes[i], b->record_bytes[i], key_p, row_bytes_p,
                          n_rows_p) &&
           class->record_pages ==
               (b->record_bytes[i] + KVSI_RECORD_OFF + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;
}

static void drop_bad(listing *list, uint32_t class_number, const batch *b, uint32_t i)
{
    kvsi_drop *drop = malloc(sizeof(*drop));

    list->n_bad++;
    if (drop == NULL || b->name_bytes[i] > KVSI_KEY_BYTES) {
        free(drop);
        return;
    }
    drop->class_number = class_number;
    drop->key_bytes = b->name_bytes[i];
    memcpy(drop->key, b->names[i], b->name_bytes[i]);
    kvsi_drop_push(list->tier, drop);
}

/* Under a guard: the first entry after the batch before, if there was one. */
static int first_entry(batch *b, MDB_val *name, MDB_val *record)
{
    if (!b->started)
        return mdb_cursor_get(b->cursor, name, record, MDB_FIRST);
    uint32_t last_bytes = b->name_bytes[BATCH - 1];
    *name = (MDB_val){last_bytes, b->names[BATCH - 1]};
    int rc = mdb_cursor_get(b->cursor, name, record, MDB_SET_RANGE);
    if (rc == MDB_SUCCESS && name->mv_size == last_bytes &&
        memcmp(name->mv_data, b->names[BATCH - 1], last_bytes) == 0)
        rc = mdb_cursor_get(b->cursor, name, record, MDB_NEXT);
    return rc;
}

/* Under a guard. */
static int fill_batch(void *arg)
{
    batch *b = arg;
    MDB_val name, record;
    int rc = mdb_cursor_open(b->txn, b->env->dbi, &b->cursor);

    if (rc != MDB_SUCCESS)
        return rc;
    rc = first_entry(b, &name, &record);
    for (b->n = 0; rc == MDB_SUCCESS;) {
        if (name.mv_size > KVSI_MAX_NAME)
            return MDB_CORRUPTED;
        b->name_bytes[b->n] = (uint32_t)name.mv_size;
        b->record_bytes[b->n] = record.mv_size;
        memcpy(b->names[b->n], name.mv_data, name.mv_size);
        if (++b->n == BATCH)
            break;
        rc = mdb_cursor_get(b->cursor, &name, &record, MDB_NEXT);
    }
    b->started = true;
    b->last = rc == MDB_NOTFOUND;
    return rc == MDB_NOTFOUND ? MDB_SUCCESS : rc;
}

static kvc_status next_batch(batch *b)
{
    kvc_status status = kvsi_env_read_begin(b->env, &b->txn);

    if (status != KVC_OK)
        return status;
    b->cursor = NULL;
    int rc = kvsi_env_look(b->env, fill_batch, b);
    if (b->cursor != NULL)
        mdb_cursor_close(b->cursor);
    kvsi_env_read_end(b->env, b->txn);
    if (rc != MDB_SUCCESS)
        KVC_LOG_ERROR(TIER, "lmdb: %s: listing its values: %s", b->env->name, mdb_strerror(rc));
    return kvsi_lmdb_status(rc);
}

static void tell_batch(listing *list, uint32_t number, const batch *b)
{
    const kvsi_class *class = &list->tier->classes[number];
    uint32_t row_bytes, n_rows;
    kvs_value_key key;

    for (uint32_t i = 0; i < b->n && !list->stopped; i++) {
        if (!parse_entry(class, b, i, &key, &row_bytes, &n_rows))
            drop_bad(list, number, b, i);
        else if (!list->found(list->arg, &key, kvsi_slot(number, row_bytes, n_rows), row_bytes,
                              n_rows))
            list->stopped = true;
    }
}

static kvc_status walk_class(listing *list, uint32_t number)
{
    batch *b = calloc(1, sizeof(*b));
    kvc_status status = b != NULL ? KVC_OK : KVC_NO_MEMORY;

    if (b != NULL)
        b->env = &list->tier->classes[number].env;
    while (status == KVC_OK && !b->last && !list->stopped) {
        status = next_batch(b);
        if (status == KVC_OK && list->found != NULL)
            tell_batch(list, number, b);
    }
    free(b);
    return status;
}

/* The next write of this size makes the class anew. Nothing was read or written here since open. */
static void forget_class(kvs_tier *tier, kvsi_class *class)
{
    kvc_mutex_lock(&tier->lock);
    class->claim_pages = class->live_pages = class->tree_pages = class->values = 0;
    class->empty_ns = 0;
    kvc_mutex_unlock(&tier->lock);
}

/* An assertion of LMDB's means the same as an answer of its that something is wrong. */
static kvc_status walk_dry(kvs_tier *tier, uint32_t number)
{
    listing dry = {.tier = tier};
    kvc_status status = walk_class(&dry, number);

    return status == KVC_IO && atomic_load(&tier->classes[number].env.faulted) ? KVC_CORRUPT
                                                                               : status;
}

/* What failed once is opened and walked again: a sound class is not lost to one read. What fails
 * twice is closed, and set aside if it is damaged. *lost_p: it was. */
static kvc_status walk_again(kvs_tier *tier, uint32_t number, bool *lost_p)
{
    kvsi_class *class = &tier->classes[number];
    char name[sizeof(class->env.name)];

    uint64_t map_pages = class->env.map_pages;

    memcpy(name, class->env.name, sizeof(name));
    kvsi_env_close(&class->env);
    kvc_status status = kvsi_check_and_open(tier, &class->env, name, map_pages, class->claim_pages);
    if (status == KVC_OK && (status = walk_dry(tier, number)) != KVC_OK)
        kvsi_env_close(&class->env);
    if (status != KVC_OK)
        forget_class(tier, class);
    *lost_p = status == KVC_CORRUPT;
    return *lost_p ? kvsi_set_aside(tier, name) : status;
}

/* Walks once before anything is given away: what is given cannot be taken back. */
static kvc_status recover_class(listing *list, uint32_t number)
{
    kvs_tier *tier = list->tier;
    kvc_status status = walk_dry(tier, number);
    bool is_lost = false;

    if (status == KVC_CORRUPT)
        status = walk_again(tier, number, &is_lost);
    return status == KVC_OK && !is_lost ? walk_class(list, number) : status;
}

/* Classes that hold nothing wait from now on, as those that become empty later. Not before: what
   the writer removes cannot be walked. */
static void start_waits(kvs_tier *tier)
{
    kvc_mutex_lock(&tier->lock);
    for (uint32_t i = 0; i < tier->n_classes; i++)
        if (tier->classes[i].claim_pages > 0 && tier->classes[i].values == 0)
            tier->classes[i].empty_ns = kvc_now_ns();
    kvc_cond_signal(&tier->work);
    kvc_mutex_unlock(&tier->lock);
}

kvc_status kvsi_recover(kvs_tier *tier, kvs_tier_found *found, void *arg)
{
    listing list = {.tier = tier, .found = found, .arg = arg};
    kvc_status status = KVC_OK;

    for (uint32_t i = 0; i < tier->n_classes && status == KVC_OK && !list.stopped; i++) {
        if (tier->classes[i].claim_pages > 0)
            status = recover_class(&list, i);
    }
    start_waits(tier);
    if (list.n_bad > 0)
        KVC_LOG_WARN(TIER, "lmdb: dropped %llu records that make no sense",
                     (unsigned long long)list.n_bad);
    return status;
}
