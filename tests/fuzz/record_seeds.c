/*
 * record_seeds.c: writes one seed for each kind of record, made by what writes them to LMDB.
 *
 * Usage: record_seeds FOLDER.
 */
#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>

#include "admission_record.h"
#include "base/clock.h"
#include "base/le.h"
#include "base/sum.h"
#include "lmdb_record.h"
#include "record_input.h"
#include "samples.h"
#include "saved_record.h"
#include "schema_record.h"

#define MAX_SEED 8000u

static const char *folder;

static int write_seed(const char *name, enum record_kind kind, bool mend, const void *record_name,
                      size_t name_bytes, const void *data, size_t len_bytes)
{
    char path[4096];
    uint8_t head[RECORD_HEAD_BYTES] = {(uint8_t)kind, mend};
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        return 1;
    kvc_le_put(head + 2, name_bytes, 2);
    int bad = fwrite(head, 1, sizeof(head), file) != sizeof(head) ||
              fwrite(record_name, 1, name_bytes, file) != name_bytes ||
              fwrite(data, 1, len_bytes, file) != len_bytes;
    return fclose(file) != 0 || bad;
}

static int write_put(const char *name, enum record_kind kind, bool mend, const record_store *r)
{
    return write_seed(name, kind, mend, r->put_name, strlen(r->put_name), r->put_data,
                      r->put_bytes);
}

static int write_value(const char *name, uint32_t row_bytes, uint32_t n_rows)
{
    static uint8_t rows[16384], record[32768];
    uint8_t key[KVSI_KEY_BYTES];
    uint32_t sums[128];
    for (size_t i = 0; i < sizeof(rows); i++)
        rows[i] = (uint8_t)(i * 7);
    kvc_row_sums(rows, row_bytes, n_rows, sums);
    kvs_tier_write write = {.key = {.tenant = sample_digest(1),
                                    .schema = sample_digest(2),
                                    .block = sample_digest(3),
                                    .part = 4},
                            .row_bytes = row_bytes,
                            .n_rows = n_rows,
                            .rows = rows,
                            .row_sums = sums};
    uint64_t len_bytes = kvsi_record_bytes(row_bytes, n_rows);
    kvsi_record_write(&write, len_bytes, record);
    kvsi_key_pack(&write.key, row_bytes, n_rows, key);
    /* Of a long one what a look at it needs. */
    bool cut = len_bytes > MAX_SEED;
    return write_seed(name, RECORD_VALUE, cut, key, sizeof(key), record,
                      cut ? kvsi_record_prefix_bytes(row_bytes, n_rows) : (size_t)len_bytes);
}

static int write_saved(kvs_store *store, const record_store *r)
{
    const kvc_digest tenant = sample_digest(1);
    const uint32_t parts[] = {0, 2};
    const uint8_t range[8] = {1, 0, 0, 0, 5};
    const kvc_saved_context saved = {.name = "morning",
                                     .schema = sample_digest(2),
                                     .promise = KVC_PROMISE_DURABLE,
                                     .n_blocks = 3,
                                     .n_tail = 2,
                                     .n_tail_parts = 2,
                                     .tail_parts = parts,
                                     .piece_bytes = 100,
                                     .generation = 7,
                                     .upload = 9,
                                     .body_bytes = 350,
                                     .saved_unix_ms = 1700000000000};
    kvs_body *body = NULL;
    int bad =
        kvs_head_write(store, &tenant, &saved) != KVC_OK ||
        write_put("head", RECORD_HEAD, false, r) || kvs_body_create(store, 7, 4, &body) != KVC_OK ||
        write_put("body", RECORD_BODY, false, r) ||
        kvs_body_write(store, body, 0, "the body's bytes", 16) != KVC_OK ||
        write_seed("piece", RECORD_PIECE, false, range, sizeof(range), r->put_data, r->put_bytes);
    kvs_body_free(body);
    return bad;
}

static int write_schema(kvs_store *store, const record_store *r, const char *name,
                        const kvc_schema *schema)
{
    const kvc_digest tenant = sample_digest(1);
    return kvs_schema_record_put(store, &tenant, schema) != KVC_OK ||
           write_put(name, RECORD_SCHEMA, false, r);
}

static int write_schemas(kvs_store *store, const record_store *r)
{
    const kvc_part parts[] = {{.part = 0,
                               .kind = KVC_PART_KV,
                               .dtype = KVC_DTYPE_F16,
                               .kv_head_count = 1,
                               .row_bytes = 64,
                               .k_len_bytes = 32,
                               .v_off_bytes = 32,
                               .v_len_bytes = 32,
                               .q_dim = 16,
                               .v_dim = 16,
                               .rope = {.type = KVC_ROPE_PLAIN, .theta = 1e4}}};
    const kvc_schema rows = {.model = "a model",
                             .revision = "",
                             .recipe = "full",
                             .tp_size = 1,
                             .block_tokens = 64,
                             .n_parts = 1,
                             .parts = parts};
    const kvc_schema opaque = {
        .model = "a model", .revision = "1", .recipe = "engine", .tp_size = 1, .opaque = 1};
    return write_schema(store, r, "schema", &rows) || write_schema(store, r, "opaque", &opaque);
}

static int write_day(kvs_server *server, const record_store *r)
{
    kvs_admission_init(&server->admission, KVS_ADMIT_ALL, 64u << 20, kvc_now_ns());
    kvs_admission_spend(&server->admission, 1000, kvc_now_ns());
    kvs_admission_save(server, true);
    int bad = write_put("day", RECORD_DAY, true, r);
    kvs_admission_fini(&server->admission);
    return bad;
}

int main(int argc, char **argv)
{
    static kvs_server server;
    static record_store r;
    if (argc != 2 || (mkdir(argv[1], 0777) != 0 && errno != EEXIST))
        return 1;
    folder = argv[1];
    record_open(&r, &server.lmdb);
    int bad = write_value("value", 40, 64) || write_value("small_piece", 100, KVS_PIECE_ROWS) ||
              write_value("long_piece", 300, KVS_PIECE_ROWS) || write_saved(&server.lmdb, &r) ||
              write_schemas(&server.lmdb, &r) || write_day(&server, &r);
    free(r.put_data);
    return bad;
}
