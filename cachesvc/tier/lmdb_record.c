/*
 * lmdb_record.c: packs and checks records and their keys; see lmdb_record.h. Pure functions.
 */
#include <string.h>

#include "base/sum.h"
#include "lmdb_record.h"

#define META_PAGES  2u  /* the first pages of each file, never free */
#define SUMMED_FROM 16u /* the header's magic, version and sum are not under the sum */

_Static_assert(KVSI_RECORD_OFF + sizeof(kvsi_record_header) +
                       KVS_PIECE_ROWS * (sizeof(uint32_t) + KVS_SMALL_PIECE_ROW_BYTES) <=
                   KVSI_PAGE_BYTES,
               "a small piece lies in one page");

uint32_t kvsi_record_prefix_bytes(uint32_t row_bytes, uint32_t n_rows)
{
    uint32_t need = (uint32_t)sizeof(kvsi_record_header) + n_rows * (uint32_t)sizeof(uint32_t) +
                    KVSI_RECORD_OFF;

    if (n_rows == KVS_PIECE_ROWS && row_bytes <= KVS_SMALL_PIECE_ROW_BYTES)
        return need - KVSI_RECORD_OFF;
    return (need + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES * KVSI_PAGE_BYTES - KVSI_RECORD_OFF;
}

uint64_t kvsi_record_bytes(uint32_t row_bytes, uint32_t n_rows)
{
    uint64_t bytes = kvsi_record_prefix_bytes(row_bytes, n_rows) + (uint64_t)row_bytes * n_rows;

    if (n_rows != KVS_PIECE_ROWS)
        return bytes;
    uint64_t pages = (bytes + KVSI_RECORD_OFF + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES;
    return kvs_piece_pages(row_bytes, (uint32_t)pages) * (uint64_t)KVSI_PAGE_BYTES -
           KVSI_RECORD_OFF;
}

uint32_t kvsi_record_pages(uint32_t row_bytes, uint32_t n_rows)
{
    uint64_t bytes = kvsi_record_bytes(row_bytes, n_rows) + KVSI_RECORD_OFF;

    return (uint32_t)((bytes + KVSI_PAGE_BYTES - 1) / KVSI_PAGE_BYTES);
}

uint32_t kvsi_record_room(uint32_t row_bytes, uint32_t n_rows)
{
    bool is_small = n_rows == KVS_PIECE_ROWS && row_bytes <= KVS_SMALL_PIECE_ROW_BYTES;

    return is_small ? kvs_piece_pages(KVS_SMALL_PIECE_ROW_BYTES + 1, 1) : 0;
}

bool kvsi_record_fits(uint64_t record_bytes, uint32_t row_bytes, uint32_t n_rows)
{
    uint64_t room = kvsi_record_room(row_bytes, n_rows);

    return record_bytes == kvsi_record_bytes(row_bytes, n_rows) ||
           (room > 0 && record_bytes == room * KVSI_PAGE_BYTES - KVSI_RECORD_OFF);
}

static void put_be32(uint8_t *out, uint32_t x)
{
    x = __builtin_bswap32(x);
    memcpy(out, &x, sizeof(x));
}

static uint32_t get_be32(const uint8_t *in)
{
    uint32_t x;

    memcpy(&x, in, sizeof(x));
    return __builtin_bswap32(x);
}

void kvsi_key_pack(const kvs_value_key *key, uint32_t row_bytes, uint32_t n_rows,
                   uint8_t out[KVSI_KEY_BYTES])
{
    memcpy(out, key->tenant.bytes, 32);
    memcpy(out + 32, key->schema.bytes, 32);
    memcpy(out + 64, key->block.bytes, 32);
    put_be32(out + 96, key->part);
    put_be32(out + 100, row_bytes);
    put_be32(out + 104, n_rows);
}

void kvsi_key_unpack(const uint8_t in[KVSI_KEY_BYTES], kvs_value_key *key_p, uint32_t *row_bytes_p,
                     uint32_t *n_rows_p)
{
    memcpy(key_p->tenant.bytes, in, 32);
    memcpy(key_p->schema.bytes, in + 32, 32);
    memcpy(key_p->block.bytes, in + 64, 32);
    key_p->part = get_be32(in + 96);
    *row_bytes_p = get_be32(in + 100);
    *n_rows_p = get_be32(in + 104);
}

bool kvsi_key_parse(const uint8_t *name, size_t name_bytes, uint64_t record_bytes,
                    kvs_value_key *key_p, uint32_t *row_bytes_p, uint32_t *n_rows_p)
{
    if (name_bytes != KVSI_KEY_BYTES)
        return false;
    kvsi_key_unpack(name, key_p, row_bytes_p, n_rows_p);
    if (*row_bytes_p == 0 || *n_rows_p == 0 || *n_rows_p > KVSI_MAX_ROWS)
        return false;
    return kvsi_record_fits(record_bytes, *row_bytes_p, *n_rows_p);
}

static uint64_t record_sum(const void *record, uint32_t n_rows)
{
    return kvc_value_sum((const uint8_t *)record + SUMMED_FROM,
                         sizeof(kvsi_record_header) - SUMMED_FROM + n_rows * sizeof(uint32_t));
}

void kvsi_record_write(const kvs_tier_write *write, uint64_t record_bytes, void *out)
{
    uint32_t prefix_bytes = kvsi_record_prefix_bytes(write->row_bytes, write->n_rows);
    size_t sums_bytes = write->n_rows * sizeof(uint32_t);
    uint8_t *bytes = out;
    kvsi_record_header header = {
        .magic = KVSI_RECORD_MAGIC,
        .version = KVSI_RECORD_VERSION,
        .row_bytes = write->row_bytes,
        .n_rows = write->n_rows,
        .prefix_bytes = prefix_bytes,
        .part = write->key.part,
        .tenant = write->key.tenant,
        .schema = write->key.schema,
        .block = write->key.block,
    };

    memcpy(bytes, &header, sizeof(header));
    memcpy(bytes + sizeof(header), write->row_sums, sums_bytes);
    memset(bytes + sizeof(header) + sums_bytes, 0, prefix_bytes - sizeof(header) - sums_bytes);
    header.sum = record_sum(bytes, write->n_rows);
    memcpy(bytes, &header, sizeof(header));
    size_t rows_bytes = (size_t)write->row_bytes * write->n_rows;
    memcpy(bytes + prefix_bytes, write->rows, rows_bytes);
    memset(bytes + prefix_bytes + rows_bytes, 0, record_bytes - prefix_bytes - rows_bytes);
}

kvc_status kvsi_record_check(const void *record, size_t len_bytes, const kvs_value_key *key,
                             uint32_t row_bytes, uint32_t n_rows)
{
    kvsi_record_header header;

    if (!kvsi_record_fits(len_bytes, row_bytes, n_rows))
        return KVC_CORRUPT;
    memcpy(&header, record, sizeof(header));
    if (header.magic != KVSI_RECORD_MAGIC || header.version != KVSI_RECORD_VERSION ||
        header.row_bytes != row_bytes || header.n_rows != n_rows ||
        header.prefix_bytes != kvsi_record_prefix_bytes(row_bytes, n_rows))
        return KVC_CORRUPT;
    if (header.sum != record_sum(record, n_rows))
        return KVC_CORRUPT;
    if (header.part != key->part || memcmp(&header.tenant, &key->tenant, 32) != 0 ||
        memcmp(&header.schema, &key->schema, 32) != 0 ||
        memcmp(&header.block, &key->block, 32) != 0)
        return KVC_CORRUPT;
    return KVC_OK;
}

const uint32_t *kvsi_record_sums(const void *record)
{
    return (const uint32_t *)(const void *)((const uint8_t *)record + sizeof(kvsi_record_header));
}

bool kvsi_free_pages_add(const void *entry, size_t len_bytes, uint64_t n_file_pages,
                         uint64_t *pages, uint32_t cap, uint32_t *n_p)
{
    uint64_t n, room = cap - *n_p, *at = pages + *n_p;

    if (len_bytes < sizeof(n))
        return false;
    memcpy(&n, entry, sizeof(n));
    if (n > len_bytes / sizeof(n) - 1)
        return false;
    n = n < room ? n : room;
    memcpy(at, (const char *)entry + sizeof(n), n * sizeof(*at));
    for (uint64_t i = 0; i < n; i++)
        if (at[i] < META_PAGES || at[i] >= n_file_pages)
            return false;
    *n_p += (uint32_t)n;
    return true;
}
