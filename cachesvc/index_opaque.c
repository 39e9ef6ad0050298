/*
 * index_opaque.c: values of opaque schemas, of which each piece is a value record; see index.h.
 *
 * Any thread. Invariants: the pieces in a block are all of one tag, that of the first one claimed
 * since the block had none; a value is there exactly while its last piece and all before it are
 * visible, so one piece that gave way takes the value with it; none does while another of its block
 * is being put, or a value could push itself out.
 */
#include "base/assert.h"
#include "base/clock.h"
#include "index.h"

#define WHEN_MASK ((1u << (32 - KVS_OPAQUE_TAG_BITS)) - 1) /* seconds; wraps after an hour */

static void set_tag(kvs_block *block, uint32_t tag, uint64_t now_s)
{
    block->set = tag << (32 - KVS_OPAQUE_TAG_BITS) | ((uint32_t)now_s & WHEN_MASK);
}

/* The slowest tier of its pieces; 0: not all of them are there. */
static uint8_t whole_tier(const kvs_index *index, const kvs_block *block)
{
    uint8_t slowest = 0;
    uint32_t n = block->n_values;
    if (n == 0)
        return 0;
    const uint16_t *places = kvs_block_parts(block);
    if (kvs_opaque_piece(places[n - 1]) != n - 1 || !kvs_opaque_is_last(places[n - 1]))
        return 0;
    for (uint32_t i = 0; i < n; i++) {
        uint8_t tier = kvs_value_tier(index, kvs_value_at(index, block->values[i]));
        if (!tier)
            return 0;
        slowest = tier > slowest ? tier : slowest;
    }
    return slowest;
}

bool kvs_opaque_coming_locked(const kvs_index *index, const kvs_value *value)
{
    const kvs_block *block = kvs_block_at(index, value->block);
    return block->n_coming && index->schemas[block->schema]->piece_bytes;
}

/* Whether a put or an eviction has hold of a piece. */
static bool any_filling(const kvs_index *index, const kvs_block *block)
{
    for (uint32_t i = 0; i < block->n_values; i++)
        if (kvs_value_at(index, block->values[i])->flags & KVS_FILLING)
            return true;
    return false;
}

/* Whether somebody may still be putting what the block has. */
static bool is_young(const kvs_index *index, const kvs_block *block, uint64_t now_s)
{
    return any_filling(index, block) ||
           (((uint32_t)now_s - block->set) & WHEN_MASK) < KVS_OPAQUE_REST_S;
}

/* A put of another value than the one that the block has pieces of. */
static kvs_claim claim_other(kvs_index *index, const kvs_block *block, uint64_t now_s)
{
    kvs_erased erased = {0};
    if (whole_tier(index, block))
        return KVS_CLAIM_EXISTS;
    if (is_young(index, block, now_s))
        return KVS_CLAIM_BUSY;
    for (uint32_t i = 0; i < block->n_values; i++)
        kvs_erase_value_locked(index, block->values[i], &erased);
    return KVS_CLAIM_REST;
}

/* Whether the block has that piece in another room: of a value that was put before there was a room
   for the small ones, or by a tag that is shared by chance. */
static bool piece_differs(const kvs_block *block, uint32_t place)
{
    uint32_t at = kvs_block_place(block, place - place % KVS_OPAQUE_CODES);
    return at < block->n_values && kvs_block_parts(block)[at] != place &&
           kvs_opaque_piece(kvs_block_parts(block)[at]) == kvs_opaque_piece(place);
}

static kvs_claim claim_locked(kvs_index *index, const kvs_schema *schema, uint32_t place,
                              uint32_t tag, const kvc_digest *digest, bool durable, bool only_old,
                              uint64_t now_s, uint32_t *value_p, kvs_slot *slot_p)
{
    uint32_t id = kvs_block_find(index, schema->id, digest);
    kvs_block *block = id == KVS_NIL ? NULL : kvs_block_at(index, id);
    if (block && block->n_values && tag == 0)
        return whole_tier(index, block) ? KVS_CLAIM_EXISTS : KVS_CLAIM_ABSENT;
    if (block && block->n_values && (kvs_block_tag(block) != tag || piece_differs(block, place)))
        return claim_other(index, block, now_s);
    *value_p = block ? kvs_value_find(index, id, place) : KVS_NIL;
    if (*value_p != KVS_NIL)
        return kvs_claim_old_locked(index, *value_p, durable, slot_p);
    if (only_old)
        return KVS_CLAIM_ABSENT;
    *value_p = kvs_value_create_locked(index, schema, place, digest);
    if (*value_p == KVS_NIL)
        return KVS_CLAIM_NO_MEMORY;
    kvs_value_at(index, *value_p)->flags = KVS_FILLING;
    kvs_block_coming(index, *value_p, true);
    set_tag(kvs_block_at(index, kvs_value_at(index, *value_p)->block), tag, now_s);
    return KVS_CLAIM_MINE;
}

kvs_claim kvs_index_claim_piece(kvs_index *index, const kvs_schema *schema, uint32_t place,
                                uint32_t tag, const kvc_digest *digest, bool durable, bool only_old,
                                uint64_t now_s, uint32_t *value_p, kvs_slot *slot_p)
{
    KVC_ASSERT(tag || only_old);
    *value_p = KVS_NIL;
    kvc_mutex_lock(&index->lock);
    kvs_claim claim =
        claim_locked(index, schema, place, tag, digest, durable, only_old, now_s, value_p, slot_p);
    kvc_mutex_unlock(&index->lock);
    return claim;
}

uint32_t kvs_index_pieces(kvs_index *index, const kvs_schema *schema, const kvc_digest *digest,
                          uint16_t *places)
{
    uint32_t n = 0;
    kvc_mutex_lock(&index->lock);
    uint32_t id = kvs_block_find(index, schema->id, digest);
    const kvs_block *block = id == KVS_NIL ? NULL : kvs_block_at(index, id);
    if (block && whole_tier(index, block))
        for (; n < block->n_values; n++)
            places[n] = kvs_block_parts(block)[n];
    kvc_mutex_unlock(&index->lock);
    return n;
}

uint32_t kvs_index_piece_set(kvs_index *index, uint32_t id)
{
    kvc_mutex_lock(&index->lock);
    uint32_t set = kvs_block_at(index, kvs_value_at(index, id)->block)->set;
    kvc_mutex_unlock(&index->lock);
    return set;
}

kvc_status kvs_index_match_opaque(kvs_index *index, const kvs_schema *schema,
                                  const kvc_digest *digests, uint32_t n, bool each,
                                  uint64_t deadline_ns, uint8_t *tiers, uint32_t *hits_p)
{
    bool leading = true;
    *hits_p = 0;
    for (uint32_t i = 0; i < n && (each || leading);) {
        if (kvc_expired(deadline_ns))
            return KVC_TIMED_OUT;
        uint32_t looked_at = 0;
        kvc_mutex_lock(&index->lock);
        for (; i < n && (each || leading) && looked_at < KVS_INDEX_STEP; i++) {
            uint32_t id = kvs_block_find(index, schema->id, &digests[i]);
            const kvs_block *block = id == KVS_NIL ? NULL : kvs_block_at(index, id);
            uint8_t tier = block ? whole_tier(index, block) : 0;
            looked_at += 1 + (block ? block->n_values : 0u);
            leading = leading && tier;
            *hits_p += leading;
            if (tiers)
                tiers[i] = tier;
        }
        kvc_mutex_unlock(&index->lock);
    }
    return KVC_OK;
}

kvc_status kvs_index_recovered_piece(kvs_index *index, const kvs_schema *schema, uint32_t place,
                                     uint32_t tag, const kvc_digest *digest, kvs_slot lmdb)
{
    kvc_status status = KVC_INVALID;
    kvc_mutex_lock(&index->lock);
    uint32_t id = kvs_block_find(index, schema->id, digest);
    const kvs_block *block = id == KVS_NIL ? NULL : kvs_block_at(index, id);
    if (!block || !block->n_values ||
        (kvs_block_tag(block) == tag && !piece_differs(block, place))) {
        status = kvs_recovered_locked(index, schema, place, digest, lmdb);
        if (status == KVC_OK)
            set_tag(kvs_block_at(index, kvs_block_find(index, schema->id, digest)), tag,
                    kvc_now_ns() / 1000000000 - KVS_OPAQUE_REST_S);
    }
    kvc_mutex_unlock(&index->lock);
    return status;
}
