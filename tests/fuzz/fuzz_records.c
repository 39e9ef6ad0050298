/*
 * fuzz_records.c: any bytes as records and their names come out of LMDB: values, saved contexts,
 * schemas, the day's count.
 *
 * Besides what the sanitizers see: what is taken is what the writer writes under that name, what is
 * left out leaves nothing behind, and a value of which a row sum is wrong is not taken.
 */
#include "fuzz.h"

#include "admission_record.h"
#include "base/clock.h"
#include "base/le.h"
#include "base/log.h"
#include "base/sum.h"
#include "lmdb_record.h"
#include "record_input.h"
#include "saved_record.h"
#include "schema_record.h"

#define SUM_OFF      8u /* of a value's sum in its header, and what it covers */
#define SUMMED_OFF   16u
#define BUDGET_BYTES (64ull << 20)
#define MAX_WRITTEN  (64u << 10) /* larger values are not written again */
#define MAX_READ     (1u << 20)

typedef struct input {
    int kind;
    bool mend;
    const uint8_t *name, *data;
    size_t name_bytes, len_bytes;
} input;

static void require(int holds)
{
    if (!holds)
        __builtin_trap();
}

static void silent(void *arg, const char *line, size_t len_bytes)
{
    (void)arg, (void)line, (void)len_bytes;
}

static bool parse(const uint8_t *data, size_t size, input *in)
{
    if (size < RECORD_HEAD_BYTES)
        return false;
    *in = (input){.kind = data[0] % (RECORD_DAY + 1), .mend = data[1] & 1};
    in->name_bytes = kvc_le_get(data + 2, 2);
    if (in->name_bytes > RECORD_NAME_BYTES || in->name_bytes > size - RECORD_HEAD_BYTES)
        return false;
    in->name = data + RECORD_HEAD_BYTES;
    in->data = in->name + in->name_bytes;
    in->len_bytes = size - RECORD_HEAD_BYTES - in->name_bytes;
    return true;
}

/* --- values --- */

/* The record that goes with key and sums, as the writer makes it; its rows are zeros. */
static void require_written(const uint8_t *prefix, const kvs_value_key *key, uint32_t row_bytes,
                            uint32_t n_rows)
{
    size_t record_bytes = kvsi_record_bytes(row_bytes, n_rows);
    uint8_t *record = malloc(record_bytes), *rows = calloc(n_rows, row_bytes);
    require(record != NULL && rows != NULL);
    kvs_tier_write write = {.key = *key,
                            .row_bytes = row_bytes,
                            .n_rows = n_rows,
                            .rows = rows,
                            .row_sums = kvsi_record_sums(prefix)};
    kvsi_record_write(&write, record_bytes, record);
    require(memcmp(record, prefix, sizeof(kvsi_record_header) + n_rows * sizeof(uint32_t)) == 0);
    free(record);
    free(rows);
}

/* As many bytes as a read has when it looks at a record: zeros follow what the input has. */
static uint8_t *make_prefix(const input *in, uint32_t prefix_bytes, size_t summed_bytes)
{
    uint8_t *prefix = calloc(1, prefix_bytes);
    require(prefix != NULL);
    memcpy(prefix, in->data, in->len_bytes < prefix_bytes ? in->len_bytes : prefix_bytes);
    if (in->mend)
        kvc_le_put(prefix + SUM_OFF, kvc_value_sum(prefix + SUMMED_OFF, summed_bytes), 8);
    return prefix;
}

static void try_value(const input *in)
{
    uint8_t again[KVSI_KEY_BYTES];
    uint32_t row_bytes = 0, n_rows = 0;
    uint64_t record_bytes = in->len_bytes;
    kvs_value_key key;

    if (in->name_bytes == KVSI_KEY_BYTES) {
        kvsi_key_unpack(in->name, &key, &row_bytes, &n_rows);
        if (in->mend && n_rows <= KVSI_MAX_ROWS)
            record_bytes = kvsi_record_bytes(row_bytes, n_rows);
    }
    if (!kvsi_key_parse(in->name, in->name_bytes, record_bytes, &key, &row_bytes, &n_rows))
        return;
    kvsi_key_pack(&key, row_bytes, n_rows, again);
    require(in->name_bytes == sizeof(again) && memcmp(again, in->name, sizeof(again)) == 0);
    uint32_t prefix_bytes = kvsi_record_prefix_bytes(row_bytes, n_rows);
    size_t sums_bytes = n_rows * sizeof(uint32_t);
    size_t summed_bytes = sizeof(kvsi_record_header) - SUMMED_OFF + sums_bytes;
    require(n_rows > 0 && n_rows <= KVSI_MAX_ROWS && row_bytes > 0);
    require(prefix_bytes >= SUMMED_OFF + summed_bytes);
    require(record_bytes >= prefix_bytes + (uint64_t)row_bytes * n_rows);

    uint8_t *prefix = make_prefix(in, prefix_bytes, summed_bytes);
    if (kvsi_record_check(prefix, record_bytes, &key, row_bytes, n_rows) == KVC_OK) {
        if (record_bytes <= MAX_WRITTEN)
            require_written(prefix, &key, row_bytes, n_rows);
        prefix[sizeof(kvsi_record_header) + in->len_bytes % sums_bytes] ^= 1;
        require(kvsi_record_check(prefix, record_bytes, &key, row_bytes, n_rows) == KVC_CORRUPT);
    }
    free(prefix);
}

/* --- saved contexts --- */

typedef struct walk {
    record_store *store;
    kvs_store *as_store;
    uint32_t n;
} walk;

static bool found_head(void *arg, const kvc_digest *tenant, const kvc_saved_context *saved)
{
    walk *w = arg;
    w->n++;
    require(saved->name[0] != '\0' && saved->piece_bytes > 0 && saved->body_bytes > 0);
    require(kvs_head_write(w->as_store, tenant, saved) == KVC_OK);
    return true;
}

static void try_head(record_store *store, kvs_store *as_store)
{
    walk w = {.store = store, .as_store = as_store};
    require(kvs_heads_each(as_store, found_head, &w) == KVC_OK);
    if (w.n == 0)
        return;
    require(strcmp(store->put_name, store->name) == 0);
    /* What was written is read too, and written the same. */
    uint8_t *data = store->put_data;
    size_t len_bytes = store->put_bytes;
    store->data = data;
    store->len_bytes = len_bytes;
    store->put_data = NULL;
    require(kvs_heads_each(as_store, found_head, &w) == KVC_OK && w.n == 2);
    require(store->put_data != NULL && store->put_bytes == len_bytes);
    require(memcmp(store->put_data, data, len_bytes) == 0);
    store->data = NULL;
    free(data);
}

static bool want_none(void *arg, uint64_t generation)
{
    walk *w = arg;
    (void)generation;
    w->n++;
    return false;
}

static void try_body(record_store *store, kvs_store *as_store)
{
    walk w = {.store = store};
    uint64_t last = 0;
    bool was_there = store->data != NULL;
    require(kvs_bodies_clean(as_store, want_none, &w, &last) == KVC_OK);
    if (w.n > 0) /* else it would be met again and again */
        require(store->data == NULL || store->n_drops > RECORD_MAX_DROPS);
    else
        require(store->n_drops == 0 && (store->data != NULL) == was_there);
}

static void try_piece(const input *in, record_store *store, kvs_store *as_store)
{
    const kvs_body body = {.generation = 1, .n_pieces = 1};
    if (in->name_bytes < 8)
        return;
    size_t off = kvc_le_get(in->name, 4), len = kvc_le_get(in->name + 4, 4) % MAX_READ;
    uint8_t *dst = malloc(len + 1);
    require(dst != NULL);
    kvc_status status = kvs_body_read(as_store, &body, 0, off, len, dst);
    require((status == KVC_OK) == (off + len <= store->len_bytes));
    if (status == KVC_OK)
        require(memcmp(dst, store->data + off, len) == 0);
    free(dst);
}

/* --- schemas, and the day's count --- */

static bool used_by_none(void *arg, uint32_t id)
{
    (void)arg, (void)id;
    return false;
}

static void try_schema(record_store *store, kvs_server *server)
{
    kvc_status status = kvs_schema_records_load(server);
    const kvs_schema *schema = kvs_schemas_retire(server->schemas, UINT64_MAX, used_by_none, NULL);
    bool is_one = strncmp(store->name, "schema/", 7) == 0;
    require((schema != NULL) == (status == KVC_OK && is_one));
    if (schema == NULL)
        return;
    require(kvs_schema_record_put(&server->lmdb, &schema->tenant, schema->schema) == KVC_OK);
    require(strcmp(store->put_name, store->name) == 0);
    kvs_schemas_remove(server->schemas, schema);
    require(kvs_schemas_count(server->schemas) == 0);
}

/* The day goes on: what it has spent stays spent, also in the record of it. */
static void try_day(const input *in, record_store *store, kvs_server *server)
{
    kvs_admission *admission = &server->admission;
    uint8_t *data = malloc(in->len_bytes + 1);
    require(data != NULL);
    memcpy(data, in->data, in->len_bytes);
    if (in->mend && in->len_bytes >= 8)
        kvc_le_put(data, kvc_wall_ns(), 8);
    store->data = data;
    kvs_admission_init(admission, KVS_ADMIT_ALL, BUDGET_BYTES, kvc_now_ns());
    kvs_admission_load(server);
    uint64_t spent = admission->spent_bytes;
    bool taken = kvs_admission_take(admission, 1, kvc_now_ns());
    require(taken == (spent < BUDGET_BYTES) || admission->spent_bytes <= 1); /* a new day */
    spent = admission->spent_bytes;
    kvs_admission_save(server, true);
    kvs_admission_fini(admission);
    if (store->put_data != NULL) {
        store->data = store->put_data;
        store->len_bytes = store->put_bytes;
        kvs_admission_init(admission, KVS_ADMIT_ALL, BUDGET_BYTES, kvc_now_ns());
        kvs_admission_load(server);
        require(admission->spent_bytes == spent);
        kvs_admission_fini(admission);
    }
    free(data);
}

static kvs_server *the_server(void)
{
    static kvs_server server;
    if (server.schemas == NULL) {
        kvc_log_set_sink(silent, NULL);
        server.schemas = kvs_schemas_create();
        server.index = kvs_index_create(server.schemas != NULL ? server.schemas->by_id : NULL);
        require(server.schemas != NULL && server.index != NULL);
    }
    return &server;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static record_store store;
    kvs_server *server = the_server();
    input in;

    if (!parse(data, size, &in))
        return 0;
    store = (record_store){.n_drops = 0};
    memcpy(store.name, in.name, in.name_bytes);
    store.data = in.data;
    store.len_bytes = in.len_bytes;
    record_open(&store, &server->lmdb);
    if (in.kind == RECORD_VALUE)
        try_value(&in);
    else if (in.kind == RECORD_HEAD)
        try_head(&store, &server->lmdb);
    else if (in.kind == RECORD_BODY)
        try_body(&store, &server->lmdb);
    else if (in.kind == RECORD_PIECE)
        try_piece(&in, &store, &server->lmdb);
    else if (in.kind == RECORD_SCHEMA)
        try_schema(&store, server);
    else
        try_day(&in, &store, server);
    free(store.put_data);
    return 0;
}
