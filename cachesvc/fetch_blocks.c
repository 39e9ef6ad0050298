/*
 * fetch_blocks.c: FetchBlocks: whole values of blocks named by digest, a message's worth at a time.
 *
 * Value number v is part v % n_parts of block v / n_parts; of an opaque schema the values are the
 * pieces that the block has when its turn comes. A message references its values; those in
 * dram leave as slices of the tier, those only in lmdb are read into one buffer by disk threads.
 * Whole values are read once in a while, so they are not promoted. Invariant: a value stays
 * referenced until its bytes were copied or the transport has released the slice that points at it.
 */
#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "cascade.h"
#include "gpu.h"
#include "stream.h"

#define PIECE_VALUES 256u /* of one message, each a slice of its own */
#define WORKERS      4u
#define LENT_PART    4u /* of dram: the most that slices may point at */

_Static_assert(PIECE_VALUES <= KVT_MAX_SLICES && PIECE_VALUES <= KVC_MAX_BATCH_VALUES,
               "a piece fits into a message");

typedef struct blocks_stream {
    kvs_stream base; /* first */
    const kvs_schema *schema;
    const kvc_digest *digests; /* in the call's arena */
    uint32_t n_digests, block; /* how many there are; the one whose turn it is */
    uint32_t n_parts, part;    /* as parts has; the next one of block */
    kvs_opaque_id id;          /* of the opaque value that first pieces have begun */
    uint32_t id_set;           /* kvs_index_piece_set of the first of them */
    uint32_t id_block;         /* its place among the digests */
    bool id_failed;            /* one of its pieces was not had: the others are of no use */
    uint16_t parts[]; /* [n_parts] places in the schema; opaque: [KVC_MAX_PIECES] of block */
} blocks_stream;

struct blocks_piece;
typedef struct blocks_worker {
    kvs_job job; /* first */
    struct blocks_piece *piece;
} blocks_worker;

/* One message in the making, and then until its last slice is released. */
typedef struct blocks_piece {
    blocks_stream *stream; /* until the piece is answered */
    kvs_server *server;
    const kvs_schema *schema;
    kvt_call *call;
    uint32_t n, n_lmdb;
    uint64_t lent_bytes;
    bool lent;          /* values of dram leave as slices, else they are copied */
    kvs_buffer *buffer; /* copied values, dense in their order; NULL: none */
    atomic_uint next, n_working, n_out;
    kvs_read reads[PIECE_VALUES];
    uint32_t blocks[PIECE_VALUES]; /* places among the digests */
    uint16_t parts[PIECE_VALUES];  /* places in the schema */
    kvc_status status[PIECE_VALUES];
    uint32_t off[PIECE_VALUES]; /* in the buffer */
    blocks_worker workers[WORKERS];
} blocks_piece;

static const kvs_part *part_of(const blocks_piece *piece, uint32_t i)
{
    return kvs_part_at(piece->schema, piece->parts[i]);
}

static bool copied(const blocks_piece *piece, uint32_t i)
{
    return piece->reads[i].where == KVS_IN_LMDB ||
           (piece->reads[i].where == KVS_IN_DRAM && !piece->lent);
}

static void unref(blocks_piece *piece)
{
    uint32_t values[PIECE_VALUES], n = 0;
    for (uint32_t i = 0; i < piece->n; i++)
        if (piece->reads[i].where == KVS_IN_DRAM || piece->reads[i].where == KVS_IN_LMDB)
            values[n++] = piece->reads[i].value;
    kvs_index_unref(piece->server->index, values, n);
    atomic_fetch_sub(&piece->server->lent_bytes, piece->lent_bytes);
}

static void slice_released(void *arg)
{
    blocks_piece *piece = arg;
    if (atomic_fetch_sub(&piece->n_out, 1) != 1)
        return;
    unref(piece);
    if (piece->buffer)
        kvs_buffer_release(piece->buffer);
    free(piece);
}

static void give_up(blocks_piece *piece, kvc_status status, const char *why)
{
    kvt_call *call = piece->call;
    atomic_store(&piece->n_out, 1);
    slice_released(piece);
    kvs_fail(call, status, "%s", why);
}

/* ---- the answer ------------------------------------------------------------------------------ */

static void count(blocks_piece *piece, const kvc_block_value *values)
{
    kvs_server *server = piece->server;
    uint64_t bytes[KVC_TIER_LMDB + 1] = {0}, rows[KVC_TIER_LMDB + 1] = {0};
    for (uint32_t i = 0; i < piece->n; i++) {
        rows[values[i].tier] += piece->schema->piece_bytes ? 1 : piece->schema->block_tokens;
        bytes[values[i].tier] += values[i].len_bytes;
    }
    atomic_fetch_add(&server->dram.rows_read, rows[KVC_TIER_DRAM]);
    atomic_fetch_add(&server->dram.bytes_read, bytes[KVC_TIER_DRAM]);
    atomic_fetch_add(&server->lmdb.rows_read, rows[KVC_TIER_LMDB]);
    atomic_fetch_add(&server->lmdb.bytes_read, bytes[KVC_TIER_LMDB]);
    KVC_COUNT_N(rows_dram, rows[KVC_TIER_DRAM]);
    KVC_COUNT_N(rows_lmdb, rows[KVC_TIER_LMDB]);
    KVC_COUNT_N(rows_missing, rows[0]);
    KVC_COUNT_N(row_bytes_sent, bytes[KVC_TIER_GPU] + bytes[KVC_TIER_DRAM] + bytes[KVC_TIER_LMDB]);
}

/*
 * What a piece of an opaque value says of itself must fit to its name and to the pieces that went
 * before it. Else nothing of the value can be trusted, and it makes way for the next put. Not where
 * the block has got other pieces since the first one was read: no piece is held between two
 * messages, so the value may have been erased and another put, which is as good as any. The piece
 * is referenced, so it is erased with those that it stands beside.
 */
static kvc_status check_piece(blocks_piece *piece, uint32_t i, const void *room,
                              kvc_block_value *value)
{
    blocks_stream *blocks = piece->stream;
    kvs_opaque_id id;
    kvs_erased erased = {0};
    uint32_t set = kvs_index_piece_set(piece->server->index, piece->reads[i].value);
    kvc_status status =
        kvs_opaque_read(piece->schema, piece->parts[i], set >> (32 - KVS_OPAQUE_TAG_BITS), room,
                        &id, &value->len_bytes);
    if (kvs_opaque_piece(piece->parts[i]) == 0) {
        blocks->id = id;
        blocks->id_set = set;
    }
    if (status == KVC_OK && (id.total_bytes != blocks->id.total_bytes || id.sum != blocks->id.sum))
        status = set == blocks->id_set ? KVC_CORRUPT : KVC_NOT_FOUND;
    value->whole = (kvc_whole){id.total_bytes, id.sum};
    if (status == KVC_CORRUPT)
        kvs_index_erase(piece->server->index, piece->schema, &blocks->digests[piece->blocks[i]],
                        NULL, 0, &erased);
    return status;
}

/* The same of any piece, found or not. */
static void describe_piece(blocks_piece *piece, uint32_t i, const void *room,
                           kvc_block_value *value)
{
    blocks_stream *blocks = piece->stream;
    if (blocks->id_block != value->block) {
        blocks->id_block = value->block;
        blocks->id_failed = false;
    }
    value->part = piece->parts[i] == KVS_OPAQUE_NO_PLACE ? 0 : kvs_opaque_piece(piece->parts[i]);
    if (value->status == KVC_OK) /* without the first piece, there is nothing to compare with */
        value->status = blocks->id_failed ? KVC_NOT_FOUND : check_piece(piece, i, room, value);
    if (value->status == KVC_OK)
        return;
    blocks->id_failed = true;
    value->len_bytes = 0;
    value->whole = (kvc_whole){0};
}

static const void *bytes_of(const blocks_piece *piece, uint32_t i)
{
    const kvs_store *dram = &piece->server->dram;
    if (piece->status[i] != KVC_OK)
        return NULL;
    return copied(piece, i) ? (const void *)(piece->buffer->bytes + piece->off[i])
                            : dram->ops->map(dram->tier, piece->reads[i].slot);
}

/* What became of each value, and a slice for each that was found. */
static uint32_t describe(blocks_piece *piece, kvc_block_value *values, kvt_slice *slices)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < piece->n; i++) {
        const kvs_part *part = part_of(piece, i);
        const void *base = bytes_of(piece, i);
        values[i] = (kvc_block_value){
            .block = piece->blocks[i], .part = part->id, .status = piece->status[i]};
        values[i].len_bytes = values[i].status == KVC_OK ? part->value_bytes : 0;
        if (piece->schema->piece_bytes)
            describe_piece(piece, i, base, &values[i]);
        if (values[i].status != KVC_OK)
            continue;
        values[i].tier = piece->reads[i].where == KVS_IN_DRAM ? KVC_TIER_DRAM
                         : piece->reads[i].gpu                ? KVC_TIER_GPU
                                                              : KVC_TIER_LMDB;
        if (values[i].len_bytes)
            slices[n++] = (kvt_slice){base, values[i].len_bytes, slice_released, piece};
    }
    return n;
}

static void answer(blocks_piece *piece)
{
    kvt_slice slices[PIECE_VALUES];
    kvc_block_value *values = kvc_arena_calloc(&piece->call->arena, piece->n, sizeof(*values));
    if (!values) {
        give_up(piece, KVC_NO_MEMORY, "no memory for the list of values");
        return;
    }
    kvt_call *call = piece->call;
    kvc_reply reply = {.method = KVC_FETCH_BLOCKS};
    reply.u.fetch_blocks.values = values;
    reply.u.fetch_blocks.n_values = piece->n;
    uint32_t n = describe(piece, values, slices);
    count(piece, values);
    atomic_store(&piece->n_out, n ? n : 1);
    if (n == 0)
        slice_released(piece);
    kvs_answer(call, &reply, slices, n);
}

/* ---- values that are copied ------------------------------------------------------------------ */

static void read_value(blocks_piece *piece, uint32_t i)
{
    kvs_server *server = piece->server;
    kvs_value_key key;
    kvs_row_range range = {.n = part_of(piece, i)->n_rows,
                           .dst = piece->buffer->bytes + piece->off[i]};
    if (piece->reads[i].where == KVS_IN_DRAM) {
        memcpy(range.dst, server->dram.ops->map(server->dram.tier, piece->reads[i].slot),
               part_of(piece, i)->value_bytes);
        return;
    }
    const kvs_part *part = part_of(piece, i);
    piece->reads[i].gpu =
        piece->reads[i].gpu &&
        kvs_gpu_read(server, &piece->reads[i], part->row_bytes, part->n_rows, &range, 1) == KVC_OK;
    if (piece->reads[i].gpu) {
        piece->status[i] = KVC_OK;
        return;
    }
    kvs_index_key(server->index, piece->reads[i].value, &key);
    kvc_status status = server->lmdb.ops->read(server->lmdb.tier, &key, piece->reads[i].slot,
                                               part->row_bytes, part->n_rows, &range, 1);
    if (status == KVC_CORRUPT || status == KVC_NOT_FOUND)
        kvs_cascade_bad(server, piece->reads[i].value, status);
    else if (status != KVC_OK)
        status = KVC_IO;
    piece->status[i] = status;
}

static void read_done(blocks_piece *piece)
{
    if (kvt_call_cancelled(piece->call))
        give_up(piece, KVC_CANCELLED, "nobody waited any more while values were read");
    else if (kvc_expired(piece->call->deadline_ns))
        give_up(piece, KVC_TIMED_OUT, "the deadline passed while values were read");
    else
        answer(piece);
}

static void worker_run(kvs_job *job)
{
    blocks_piece *piece = ((blocks_worker *)job)->piece;
    uint32_t i;
    while ((i = atomic_fetch_add(&piece->next, 1)) < piece->n) {
        if (copied(piece, i) && !kvt_call_cancelled(piece->call))
            read_value(piece, i);
    }
    if (atomic_fetch_sub(&piece->n_working, 1) == 1)
        read_done(piece);
}

/* Disk threads for what is in lmdb; the first of them is needed, the others help. */
static void start_workers(blocks_piece *piece)
{
    uint32_t want = piece->n_lmdb < WORKERS ? piece->n_lmdb : WORKERS, left = 0;
    atomic_store(&piece->n_working, want);
    for (uint32_t i = 0; i < want; i++) {
        piece->workers[i] = (blocks_worker){.job.run = worker_run, .piece = piece};
        if (kvs_disk_submit(piece->server->disk, &piece->workers[i].job) == KVC_OK)
            continue;
        if (i == 0) {
            give_up(piece, KVC_AGAIN, "the disk threads have too much to do");
            return;
        }
        left = want - i;
        break;
    }
    if (left && atomic_fetch_sub(&piece->n_working, left) == left)
        read_done(piece);
}

/* ---- a piece --------------------------------------------------------------------------------- */

/* The parts of the block whose turn it is: of an opaque schema the pieces that it has now, or one
   that cannot be found where the value is not there. */
static void begin_block(blocks_stream *blocks)
{
    if (!blocks->schema->piece_bytes)
        return;
    blocks->n_parts = kvs_index_pieces(blocks->base.server->index, blocks->schema,
                                       &blocks->digests[blocks->block], blocks->parts);
    if (blocks->n_parts)
        return;
    blocks->parts[0] = KVS_OPAQUE_NO_PLACE;
    blocks->n_parts = 1;
}

/* The most bytes that the value of a place sends. */
static uint32_t most_bytes(const kvs_schema *schema, uint16_t place)
{
    return schema->piece_bytes ? kvs_opaque_most_bytes(schema, place)
                               : schema->parts[place].value_bytes;
}

/* Whether there is a value to go on with: not with one that cannot be whole any more. */
static bool next_value(blocks_stream *blocks)
{
    if (blocks->part > 0 && (blocks->part == blocks->n_parts ||
                             (blocks->id_failed && blocks->id_block == blocks->block))) {
        blocks->part = 0;
        blocks->block++;
    }
    if (blocks->block == blocks->n_digests)
        return false;
    if (blocks->part == 0)
        begin_block(blocks);
    return true;
}

/* As many of the next values as a message, and a buffer, hold; at least one. */
static void choose(blocks_stream *blocks, blocks_piece *piece)
{
    kvs_server *server = blocks->base.server;
    uint64_t room_bytes = server->limits.max_message_bytes, copy_bytes = server->buffers.big_bytes;
    while (piece->n < PIECE_VALUES && next_value(blocks)) {
        uint16_t place = blocks->parts[blocks->part];
        uint32_t len_bytes = most_bytes(blocks->schema, place);
        uint32_t value_bytes = kvs_part_at(blocks->schema, place)->value_bytes;
        if (len_bytes > room_bytes || value_bytes > copy_bytes)
            break;
        room_bytes -= len_bytes;
        copy_bytes -= value_bytes;
        piece->blocks[piece->n] = blocks->block;
        piece->parts[piece->n++] = place;
        blocks->part++;
    }
    KVC_ASSERT(piece->n > 0);
}

/* References what is there, and says which of it slices may point at. */
static void find(blocks_piece *piece)
{
    const blocks_stream *blocks = piece->stream;
    kvs_server *server = piece->server;
    uint64_t most = server->settings.dram_bytes / LENT_PART, bytes = 0;
    const kvc_digest *names[PIECE_VALUES];
    for (uint32_t i = 0; i < piece->n; i++)
        names[i] = &blocks->digests[piece->blocks[i]];
    kvs_index_ref_named(server->index, piece->schema, names, piece->parts, piece->reads, piece->n);
    for (uint32_t i = 0; i < piece->n; i++) {
        uint8_t where = piece->reads[i].where;
        piece->status[i] = where == KVS_NOWHERE ? KVC_NOT_FOUND
                           : where == KVS_BUSY  ? KVC_AGAIN
                                                : KVC_OK;
        piece->n_lmdb += where == KVS_IN_LMDB;
        bytes += where == KVS_IN_DRAM ? part_of(piece, i)->value_bytes : 0;
    }
    piece->lent = atomic_fetch_add(&server->lent_bytes, bytes) + bytes <= most;
    if (piece->lent)
        piece->lent_bytes = bytes;
    else
        atomic_fetch_sub(&server->lent_bytes, bytes);
}

/* Room for what is copied. False: the piece has been given up. */
static bool get_buffer(blocks_piece *piece)
{
    uint32_t bytes = 0;
    for (uint32_t i = 0; i < piece->n; i++) {
        piece->off[i] = bytes;
        bytes += copied(piece, i) ? part_of(piece, i)->value_bytes : 0;
    }
    if (!bytes)
        return true;
    if (kvs_buffer_get_for_stream(&piece->server->buffers, bytes, &piece->buffer) == KVC_OK)
        return true;
    give_up(piece, KVC_AGAIN, "every reply buffer is in use");
    return false;
}

static bool blocks_make(kvs_stream *stream, kvt_call *call, uint32_t slot)
{
    blocks_stream *blocks = (blocks_stream *)stream;
    (void)slot;
    if (!next_value(blocks))
        return false;
    call->req = (kvc_request){.method = KVC_FETCH_BLOCKS};
    blocks_piece *piece = calloc(1, sizeof(*piece));
    if (!piece) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for a message");
        return true;
    }
    piece->stream = blocks;
    piece->server = stream->server;
    piece->schema = blocks->schema;
    piece->call = call;
    choose(blocks, piece);
    find(piece);
    if (!get_buffer(piece))
        return true;
    if (piece->n_lmdb) {
        start_workers(piece);
        return true;
    }
    for (uint32_t i = 0; i < piece->n; i++)
        if (copied(piece, i))
            read_value(piece, i);
    answer(piece);
    return true;
}

static void blocks_adjust(kvs_stream *stream, uint32_t slot, kvc_reply *reply)
{
    (void)stream;
    (void)slot;
    (void)reply; /* it is a message of the stream already */
}

static void blocks_close(kvs_stream *stream)
{
    free(stream);
}

static const kvs_stream_kind blocks_kind = {blocks_make, blocks_adjust, blocks_close};

/* Room for the places of any value's pieces; NULL after kvs_fail. */
static blocks_stream *with_pieces(kvt_call *call)
{
    if (!kvs_no_parts(call, call->req.u.fetch_blocks.n_parts))
        return NULL;
    blocks_stream *blocks = calloc(1, sizeof(*blocks) + KVC_MAX_PIECES * sizeof(blocks->parts[0]));
    if (!blocks)
        kvs_fail(call, KVC_NO_MEMORY, "no memory for a list of pieces");
    else
        blocks->id_block = UINT32_MAX;
    return blocks;
}

/* The places of the parts asked for; NULL after kvs_fail. */
static blocks_stream *with_parts(kvt_call *call, const kvs_schema *schema)
{
    uint32_t n_named = call->req.u.fetch_blocks.n_parts;
    uint32_t n_parts = n_named ? n_named : schema->n_parts;
    if (n_parts > schema->n_parts) {
        kvs_fail(call, KVC_INVALID, "%u parts; the schema has %u", n_parts, schema->n_parts);
        return NULL;
    }
    blocks_stream *blocks = calloc(1, sizeof(*blocks) + n_parts * sizeof(blocks->parts[0]));
    if (!blocks) {
        kvs_fail(call, KVC_NO_MEMORY, "no memory for %u parts", n_parts);
        return NULL;
    }
    blocks->n_parts = n_parts;
    for (uint32_t i = 0; i < n_parts; i++) {
        uint32_t id = n_named ? call->req.u.fetch_blocks.parts[i] : schema->parts[i].id;
        int place = kvs_schema_part(schema, id);
        if (place < 0) {
            kvs_fail(call, KVC_INVALID, "part %u is not in the schema", id);
            free(blocks);
            return NULL;
        }
        blocks->parts[i] = (uint16_t)place;
    }
    return blocks;
}

void kvs_on_fetch_blocks(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint32_t n_digests = call->req.u.fetch_blocks.n_digests;
    if (n_digests > server->limits.max_digests) {
        kvs_fail(call, KVC_INVALID, "%u digests; max_digests is %u", n_digests,
                 server->limits.max_digests);
        return;
    }
    const kvs_schema *schema =
        kvs_want_schema(server, call, tenant, &call->req.u.fetch_blocks.schema);
    blocks_stream *blocks = NULL;
    if (schema)
        blocks = schema->piece_bytes ? with_pieces(call) : with_parts(call, schema);
    if (!blocks)
        return;
    blocks->schema = schema;
    blocks->digests = call->req.u.fetch_blocks.digests;
    blocks->n_digests = n_digests;
    kvs_stream_begin(&blocks->base, &blocks_kind, server, call, tenant);
}
