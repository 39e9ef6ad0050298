/*
 * opaque.c: see opaque.h.
 *
 * Pure functions. Rooms grow by a quarter to a seventh from one to the next, so at most a fifth of
 * one is unused beyond its first pages.
 */
#include "opaque.h"

#include <string.h>

#include "base/assert.h"
#include "base/sum.h"

#define PAGE_BYTES 4096u
#define END_MAGIC  0x4b564f45u /* "EOVK" in memory */

typedef struct end_record {
    uint32_t magic;
    uint32_t piece, len_bytes, piece_bytes;
    uint64_t total_bytes, sum;
    uint8_t zeros[KVS_OPAQUE_END_BYTES - 32];
} end_record;

_Static_assert(sizeof(end_record) == KVS_OPAQUE_END_BYTES, "it is stored as it is");
_Static_assert((KVC_MAX_PIECES - 1) * KVS_OPAQUE_CODES + KVS_OPAQUE_MORE <= UINT16_MAX,
               "a place fits into a value record");
_Static_assert(KVC_MAX_VALUE_BYTES / PAGE_BYTES <= 256, "the rooms up to it have codes");

_Static_assert(PAGE_BYTES > KVS_SMALL_PIECE_ROW_BYTES * KVS_PIECE_ROWS, "the first is smaller");

/* ---- rooms ----------------------------------------------------------------------------------- */

static uint32_t next_pages(uint32_t pages)
{
    uint32_t step = 1;
    while (pages >= 8 * step)
        step *= 2;
    return pages + step;
}

void kvs_opaque_rooms(uint32_t piece_bytes, kvs_part *rooms)
{
    uint32_t full = (piece_bytes + KVS_OPAQUE_END_BYTES + PAGE_BYTES - 1) / PAGE_BYTES, pages = 1;
    rooms[0] = (kvs_part){
        .row_bytes = KVS_SMALL_PIECE_ROW_BYTES,
        .n_rows = KVS_PIECE_ROWS,
        .value_bytes = KVS_SMALL_PIECE_ROW_BYTES * KVS_PIECE_ROWS,
    };
    for (uint32_t code = 1; code < KVS_OPAQUE_CODES; code++) {
        if (pages > full)
            pages = full;
        rooms[code] = (kvs_part){
            .row_bytes = pages * (PAGE_BYTES / KVS_PIECE_ROWS),
            .n_rows = KVS_PIECE_ROWS,
            .value_bytes = pages * PAGE_BYTES,
        };
        pages = next_pages(pages);
    }
    KVC_ASSERT(rooms[KVS_OPAQUE_MORE - 1].value_bytes == full * PAGE_BYTES);
}

/* The smallest room for a last piece. */
static uint32_t room_for(const kvs_schema *schema, uint32_t len_bytes)
{
    uint32_t code = 0;
    while (schema->parts[code].value_bytes < len_bytes + KVS_OPAQUE_END_BYTES)
        code++;
    KVC_ASSERT(code < KVS_OPAQUE_MORE);
    return code;
}

uint32_t kvs_opaque_pieces(const kvs_schema *schema, uint64_t total_bytes)
{
    uint64_t n = total_bytes / schema->piece_bytes + (total_bytes % schema->piece_bytes != 0);
    return n > KVC_MAX_PIECES ? 0 : n ? (uint32_t)n : 1;
}

uint32_t kvs_opaque_piece_bytes(const kvs_schema *schema, uint64_t total_bytes, uint32_t piece)
{
    uint64_t left = total_bytes - (uint64_t)piece * schema->piece_bytes;
    return left < schema->piece_bytes ? (uint32_t)left : schema->piece_bytes;
}

uint16_t kvs_opaque_place(const kvs_schema *schema, uint64_t total_bytes, uint32_t piece)
{
    uint32_t code = KVS_OPAQUE_MORE;
    if (piece + 1 == kvs_opaque_pieces(schema, total_bytes))
        code = room_for(schema, kvs_opaque_piece_bytes(schema, total_bytes, piece));
    return (uint16_t)(piece * KVS_OPAQUE_CODES + code);
}

uint32_t kvs_opaque_most_bytes(const kvs_schema *schema, uint32_t place)
{
    uint32_t room = kvs_part_at(schema, place)->value_bytes - KVS_OPAQUE_END_BYTES;
    return room < schema->piece_bytes ? room : schema->piece_bytes;
}

/* ---- names ----------------------------------------------------------------------------------- */

/* Of the length of the pieces too: those cut at another length are not mixed with these. */
uint32_t kvs_opaque_tag(const kvs_schema *schema, const kvs_opaque_id *id)
{
    uint64_t words[3] = {id->total_bytes, id->sum, schema->piece_bytes};
    uint32_t tag = (uint32_t)(kvc_value_sum(words, sizeof(words)) >> (64 - KVS_OPAQUE_TAG_BITS));
    return tag ? tag : 1;
}

uint32_t kvs_opaque_key_part(uint32_t tag, uint32_t place)
{
    return tag << (32 - KVS_OPAQUE_TAG_BITS) | kvs_opaque_piece(place) << 1 |
           kvs_opaque_is_last(place);
}

bool kvs_opaque_key_place(const kvs_schema *schema, uint32_t key_part, uint32_t row_bytes,
                          uint32_t n_rows, uint16_t *place_p, uint32_t *tag_p)
{
    uint32_t code = 0, piece = key_part >> 1 & (KVC_MAX_PIECES - 1);
    while (code < KVS_OPAQUE_CODES && schema->parts[code].row_bytes != row_bytes)
        code++;
    if (code == KVS_OPAQUE_CODES || n_rows != KVS_PIECE_ROWS)
        return false;
    if (!(key_part & 1)) {
        if (schema->parts[KVS_OPAQUE_MORE].row_bytes != row_bytes)
            return false;
        code = KVS_OPAQUE_MORE;
    }
    *place_p = (uint16_t)(piece * KVS_OPAQUE_CODES + code);
    *tag_p = key_part >> (32 - KVS_OPAQUE_TAG_BITS);
    return *tag_p != 0 && *place_p != KVS_OPAQUE_NO_PLACE;
}

/* ---- rooms with something in them ------------------------------------------------------------ */

void kvs_opaque_seal(const kvs_schema *schema, uint32_t place, const kvs_opaque_id *id, void *room)
{
    uint32_t room_bytes = kvs_part_at(schema, place)->value_bytes;
    uint32_t piece = kvs_opaque_piece(place);
    uint32_t len_bytes = kvs_opaque_piece_bytes(schema, id->total_bytes, piece);
    end_record end = {
        .magic = END_MAGIC,
        .piece = piece,
        .len_bytes = len_bytes,
        .piece_bytes = schema->piece_bytes,
        .total_bytes = id->total_bytes,
        .sum = id->sum,
    };
    KVC_ASSERT(len_bytes + KVS_OPAQUE_END_BYTES <= room_bytes);
    memset((char *)room + len_bytes, 0, room_bytes - len_bytes - KVS_OPAQUE_END_BYTES);
    memcpy((char *)room + room_bytes - KVS_OPAQUE_END_BYTES, &end, sizeof(end));
}

kvc_status kvs_opaque_read(const kvs_schema *schema, uint32_t place, uint32_t tag, const void *room,
                           kvs_opaque_id *id_p, uint32_t *len_bytes_p)
{
    uint32_t room_bytes = kvs_part_at(schema, place)->value_bytes;
    end_record end;
    memcpy(&end, (const char *)room + room_bytes - KVS_OPAQUE_END_BYTES, sizeof(end));
    *id_p = (kvs_opaque_id){end.total_bytes, end.sum};
    *len_bytes_p = end.len_bytes;
    uint32_t n = kvs_opaque_pieces(schema, end.total_bytes);
    bool good = end.magic == END_MAGIC && end.piece_bytes == schema->piece_bytes &&
                end.piece == kvs_opaque_piece(place) && end.piece < n && end.sum != 0 &&
                kvs_opaque_is_last(place) == (end.piece + 1 == n) &&
                end.len_bytes == kvs_opaque_piece_bytes(schema, end.total_bytes, end.piece) &&
                end.len_bytes + KVS_OPAQUE_END_BYTES <= room_bytes &&
                kvs_opaque_tag(schema, id_p) == tag;
    return good ? KVC_OK : KVC_CORRUPT;
}
