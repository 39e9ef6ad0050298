/*
 * lmdb_record.h: the bytes of one value in LMDB. Private to the lmdb tier.
 *
 * A record is a prefix, then the rows. LMDB puts a large value 16 bytes into its first page, so a
 * prefix of whole pages less 16 bytes puts the rows on page boundaries. The prefix is the header,
 * the row sums and zeros. Everything is little-endian.
 *
 *   header (128 bytes) | u32 sums[n_rows] | zeros to prefix_bytes | rows, dense
 *
 * A small piece of an opaque value (KVS_SMALL_PIECE_ROW_BYTES) has no zeros there: all of it lies
 * in one page. Which of the two it is follows from the shape, so both may lie in one folder.
 *
 * The LMDB key holds the value's key and its shape, so that recover reads no record at all.
 */
#ifndef KVSI_LMDB_RECORD_H
#define KVSI_LMDB_RECORD_H

#include "tier.h"

#define KVSI_PAGE_BYTES     4096u
#define KVSI_KEY_BYTES      108u
#define KVSI_RECORD_OFF     16u /* LMDB's header, in a large record's first page */
#define KVSI_MAX_ROWS       65536u
#define KVSI_RECORD_MAGIC   0x4c56564bu /* "KVVL" */
#define KVSI_RECORD_VERSION 1u

typedef struct kvsi_record_header {
    uint32_t magic, version;
    uint64_t sum; /* XXH3-64 of the header from row_bytes on and the row sums: the value's sum */
    uint32_t row_bytes, n_rows, prefix_bytes, part;
    kvc_digest tenant, schema, block;
} kvsi_record_header;

_Static_assert(sizeof(kvsi_record_header) == 128, "the record header is stored as it is");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "records are little-endian");

uint32_t kvsi_record_prefix_bytes(uint32_t row_bytes, uint32_t n_rows);
/* Those of a piece (KVS_PIECE_ROWS) are rounded up to one of few lengths; zeros fill it. */
uint64_t kvsi_record_bytes(uint32_t row_bytes, uint32_t n_rows);
/* Pages that LMDB takes for the record: the size class. */
uint32_t kvsi_record_pages(uint32_t row_bytes, uint32_t n_rows);

/* Pages of the size class that takes such a record where there is no place for one of its own, with
   zeros to its end; 0: none does. */
uint32_t kvsi_record_room(uint32_t row_bytes, uint32_t n_rows);
/* Whether a record of that shape may have so many bytes. */
bool kvsi_record_fits(uint64_t record_bytes, uint32_t row_bytes, uint32_t n_rows);

/* tenant, schema, block, then part, row_bytes, n_rows big-endian. */
void kvsi_key_pack(const kvs_value_key *key, uint32_t row_bytes, uint32_t n_rows,
                   uint8_t out[KVSI_KEY_BYTES]);
void kvsi_key_unpack(const uint8_t in[KVSI_KEY_BYTES], kvs_value_key *key_p, uint32_t *row_bytes_p,
                     uint32_t *n_rows_p);

/* The same of a name as it is found beside a record of so many bytes. False: they make no sense, or
   not together; then the outputs are not to be used. */
bool kvsi_key_parse(const uint8_t *name, size_t name_bytes, uint64_t record_bytes,
                    kvs_value_key *key_p, uint32_t *row_bytes_p, uint32_t *n_rows_p);

/* Writes the whole record, of a length that fits, at out (8-byte aligned). */
void kvsi_record_write(const kvs_tier_write *write, uint64_t record_bytes, void *out);
/*
 * Checks the prefix of a record of len bytes: magic, version, lengths, sum, and that it is this
 * value's. CORRUPT. Reads the prefix only.
 */
kvc_status kvsi_record_check(const void *record, size_t len_bytes, const kvs_value_key *key,
                             uint32_t row_bytes, uint32_t n_rows) KVC_MUST_CHECK;
const uint32_t *kvsi_record_sums(const void *record);

/*
 * Adds the pages of one entry of LMDB's own list of free pages (a count, then page numbers; 8 bytes
 * each, at any address) to pages [cap], *n_p of which are taken; what has no room is left out.
 * False: damaged, since the count does not fit, or a page is one of the two metas or lies beyond
 * the file's n_file_pages; nothing was added.
 */
bool kvsi_free_pages_add(const void *entry, size_t len_bytes, uint64_t n_file_pages,
                         uint64_t *pages, uint32_t cap, uint32_t *n_p);

#endif
