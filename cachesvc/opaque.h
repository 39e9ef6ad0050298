/*
 * opaque.h: values of opaque schemas: how they lie in pieces, and what each piece says of itself.
 *
 * A value of any length is cut into pieces of piece_bytes; the last one is what is left. Piece i is
 * one value of the store, in the block that has the key's digest as its name. It takes one of few
 * rooms (places in the schema's table): its bytes, zeros, and in the last KVS_OPAQUE_END_BYTES a
 * record that says whose piece it is. Its place in the block is its number * KVS_OPAQUE_CODES + the
 * code of its room; the code KVS_OPAQUE_MORE means a full room with others behind it, so the places
 * alone tell whether all pieces are there.
 *
 * Pieces of two values under one key never stand side by side: a tag made of the value's length
 * and sum is in the block record and in the name of each piece in lmdb, and the end record, which
 * has all of both, is compared whenever a piece is read.
 *
 * Pure functions, any thread.
 */
#ifndef KVS_OPAQUE_H
#define KVS_OPAQUE_H

#include "schemas.h"
#include "tier/tier.h"

#define KVS_OPAQUE_END_BYTES 64u
#define KVS_OPAQUE_MORE      (KVS_OPAQUE_CODES - 1)
#define KVS_OPAQUE_NO_PLACE  0xffffu /* of no piece */
#define KVS_OPAQUE_TAG_BITS  20u

/* What all pieces of one value have in common. */
typedef struct kvs_opaque_id {
    uint64_t total_bytes;
    uint64_t sum; /* of the whole value; not 0 */
} kvs_opaque_id;

/* The rooms of a schema whose values are cut at piece_bytes: KVS_OPAQUE_CODES of them, ascending,
   the last ones all alike. */
void kvs_opaque_rooms(uint32_t piece_bytes, kvs_part *rooms);

/* Pieces of a value, at least 1; 0: it has more than KVC_MAX_PIECES. */
uint32_t kvs_opaque_pieces(const kvs_schema *schema, uint64_t total_bytes);
/* Bytes of one of them, and its place. */
uint32_t kvs_opaque_piece_bytes(const kvs_schema *schema, uint64_t total_bytes, uint32_t piece);
uint16_t kvs_opaque_place(const kvs_schema *schema, uint64_t total_bytes, uint32_t piece);
static inline uint32_t kvs_opaque_piece(uint32_t place)
{
    return place / KVS_OPAQUE_CODES;
}
static inline bool kvs_opaque_is_last(uint32_t place)
{
    return place % KVS_OPAQUE_CODES != KVS_OPAQUE_MORE;
}
/* The most bytes that the piece of a place can have. */
uint32_t kvs_opaque_most_bytes(const kvs_schema *schema, uint32_t place);
/* 1 to 2^KVS_OPAQUE_TAG_BITS - 1. */
uint32_t kvs_opaque_tag(const kvs_schema *schema, const kvs_opaque_id *id);

/* The number that names a piece in a tier's key. */
uint32_t kvs_opaque_key_part(uint32_t tag, uint32_t place);
/* Back again, with the shape that the tier found it in. False: no piece of this schema. */
bool kvs_opaque_key_place(const kvs_schema *schema, uint32_t key_part, uint32_t row_bytes,
                          uint32_t n_rows, uint16_t *place_p, uint32_t *tag_p);

/* Zeros and the end record behind the len bytes that are in the room of this place already. */
void kvs_opaque_seal(const kvs_schema *schema, uint32_t place, const kvs_opaque_id *id, void *room);
/* Reads a room: OK, or CORRUPT where it is not that of this place and tag. */
kvc_status kvs_opaque_read(const kvs_schema *schema, uint32_t place, uint32_t tag, const void *room,
                           kvs_opaque_id *id_p, uint32_t *len_bytes_p) KVC_MUST_CHECK;

#endif
