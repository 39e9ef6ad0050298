/*
 * opaque_support.c: see opaque_support.h.
 */
#include "opaque_support.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/sum.h"

void o_schema_init(h_schema *schema, const char *model)
{
    memset(schema, 0, sizeof(*schema));
    schema->schema = (kvc_schema){
        .model = model, .revision = "r1", .recipe = "engine", .tp_size = 1, .opaque = 1};
    assert_int_equal(kvc_schema_check(&schema->schema, KVC_MAX_VALUE_BYTES, NULL), KVC_OK);
    assert_int_equal(kvc_schema_digest(&schema->schema, &schema->digest), KVC_OK);
}

kvc_digest o_key(const h_schema *schema, uint64_t key)
{
    kvc_digest digest;
    assert_int_equal(kvc_key_digest(&schema->digest, &key, sizeof(key), &digest), KVC_OK);
    return digest;
}

uint8_t *o_content(uint64_t seed, size_t len_bytes)
{
    uint8_t *content = malloc(len_bytes + 8);
    uint64_t state = (seed + 1) * 0x9e3779b97f4a7c15ull ^ len_bytes;
    assert_non_null(content);
    for (size_t i = 0; i < len_bytes; i += 8) {
        uint64_t word = h_random(&state);
        memcpy(content + i, &word, 8);
    }
    return content;
}

kvc_whole o_whole(const uint8_t *content, size_t len_bytes)
{
    uint64_t sum = kvc_value_sum(content, len_bytes);
    return (kvc_whole){len_bytes, sum ? sum : 1};
}

uint32_t o_pieces(size_t len_bytes)
{
    return len_bytes ? (uint32_t)((len_bytes + O_PIECE - 1) / O_PIECE) : 1;
}

static kvc_status put_bytes(h_peer *peer, const h_schema *schema, uint64_t key,
                            const uint8_t *content, kvc_whole whole, uint32_t piece,
                            kvc_promise promise)
{
    size_t at = (size_t)piece * O_PIECE, left = whole.total_bytes - at;
    kvc_put_value value = {
        .digest = o_key(schema, key),
        .part = piece,
        .len_bytes = left < O_PIECE ? (uint32_t)left : O_PIECE,
        .whole = whole,
    };
    struct iovec iov = {(void *)(uintptr_t)(content + at), value.len_bytes};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = &iov, .n_data = 1};
    req.data_bytes = value.len_bytes;
    req.u.put_blocks.schema = schema->digest;
    req.u.put_blocks.promise = promise;
    req.u.put_blocks.n_values = 1;
    req.u.put_blocks.values = &value;
    kvc_status status = h_call(peer, &req);
    return status == KVC_OK ? (kvc_status)peer->status[0] : status;
}

kvc_status o_put_piece(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                       size_t len_bytes, uint32_t piece, kvc_promise promise)
{
    uint8_t *content = o_content(seed, len_bytes);
    kvc_status status =
        put_bytes(peer, schema, key, content, o_whole(content, len_bytes), piece, promise);
    free(content);
    return status;
}

kvc_status o_put(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                 size_t len_bytes, kvc_promise promise, uint64_t until_ns)
{
    uint8_t *content = o_content(seed, len_bytes);
    kvc_whole whole = o_whole(content, len_bytes);
    kvc_status status = KVC_OK, result = KVC_EXISTS;
    for (uint32_t i = 0; i < o_pieces(len_bytes) && status == KVC_OK; i++) {
        status = put_bytes(peer, schema, key, content, whole, i, promise);
        while (status == KVC_AGAIN && kvc_now_ns() < until_ns) {
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
            status = put_bytes(peer, schema, key, content, whole, i, promise);
        }
        if (status == KVC_OK)
            result = KVC_OK;
        else if (status == KVC_EXISTS)
            status = KVC_OK;
    }
    free(content);
    return status == KVC_OK ? result : status;
}

/* Every rule that a reply about one key keeps, whatever it says. */
static kvc_status check_reply(const h_peer *peer)
{
    uint64_t sum_bytes = 0;
    assert_true(peer->n_values > 0);
    for (uint32_t i = 0; i < peer->n_values; i++) {
        const kvc_block_value *value = &peer->values[i];
        assert_int_equal(value->block, 0);
        assert_int_equal(value->part, i);
        sum_bytes += value->len_bytes;
        if (value->status != KVC_OK)
            return value->status;
        assert_true(value->tier == KVC_TIER_DRAM || value->tier == KVC_TIER_LMDB);
        assert_int_equal(value->whole.total_bytes, peer->values[0].whole.total_bytes);
        assert_int_equal(value->whole.sum, peer->values[0].whole.sum);
    }
    assert_int_equal(peer->n_values, o_pieces(peer->values[0].whole.total_bytes));
    assert_int_equal(peer->data_bytes, peer->values[0].whole.total_bytes);
    assert_int_equal(sum_bytes, peer->data_bytes);
    assert_int_equal(o_whole((uint8_t *)peer->data, peer->data_bytes).sum,
                     peer->values[0].whole.sum);
    return KVC_OK;
}

kvc_status o_get(h_peer *peer, const h_schema *schema, uint64_t key, uint8_t **value_p,
                 size_t *len_bytes_p)
{
    kvc_digest digest = o_key(schema, key);
    kvc_request req = {.method = KVC_FETCH_BLOCKS};
    req.u.fetch_blocks.schema = schema->digest;
    req.u.fetch_blocks.digests = &digest;
    req.u.fetch_blocks.n_digests = 1;
    *value_p = NULL;
    *len_bytes_p = 0;
    kvc_status status = h_call(peer, &req);
    if (status == KVC_OK)
        status = check_reply(peer);
    if (status != KVC_OK)
        return status;
    *len_bytes_p = peer->data_bytes;
    *value_p = malloc(peer->data_bytes + 1);
    assert_non_null(*value_p);
    memcpy(*value_p, peer->data, peer->data_bytes);
    return KVC_OK;
}

void o_get_equal(h_peer *peer, const h_schema *schema, uint64_t key, uint64_t seed,
                 size_t len_bytes)
{
    uint8_t *have, *want = o_content(seed, len_bytes);
    size_t have_bytes;
    kvc_status status = o_get(peer, schema, key, &have, &have_bytes);
    if (status != KVC_OK)
        fail_msg("a value of %zu bytes: %s %s", len_bytes, kvc_status_name(status),
                 peer->xfer.detail);
    assert_int_equal(have_bytes, len_bytes);
    assert_memory_equal(have, want, len_bytes);
    free(have);
    free(want);
}

bool o_there(h_peer *peer, const h_schema *schema, uint64_t key)
{
    kvc_digest digest = o_key(schema, key);
    uint8_t tier = 99;
    kvc_request req = {.method = KVC_MATCH_PREFIX};
    req.u.match_prefix.schema = schema->digest;
    req.u.match_prefix.digests = &digest;
    req.u.match_prefix.n_digests = 1;
    req.u.match_prefix.want_each = true;
    peer->tiers = &tier;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    peer->tiers = NULL;
    assert_int_equal(peer->xfer.reply.u.match_prefix.n_tiers, 1);
    assert_int_equal(peer->xfer.reply.u.match_prefix.hits, tier != 0);
    return tier != 0;
}

uint64_t o_erase(h_peer *peer, const h_schema *schema, uint64_t key)
{
    kvc_digest digest = o_key(schema, key);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = schema->digest;
    req.u.erase.digests = &digest;
    req.u.erase.n_digests = 1;
    assert_int_equal(h_call(peer, &req), KVC_OK);
    return peer->xfer.reply.u.erase.values;
}

void o_rig_start(o_rig *r)
{
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, "default");
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
}

void o_rig_stop(o_rig *r, bool flush)
{
    h_disconnect(r->peer);
    h_server_stop(&r->h, flush);
}

o_rig *o_rig_create(bool lmdb)
{
    o_rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    o_schema_init(&r->schema, "opaque/model");
    h_server_init(&r->h);
    r->h.settings.dram_bytes = 96 << 20;
    if (lmdb) {
        h_temp_dir(r->dir);
        r->h.settings.lmdb_path = r->dir;
        r->h.settings.lmdb_bytes = 256 << 20;
    }
    return r;
}

void o_rig_destroy(o_rig *r)
{
    h_server_fini(&r->h);
    if (r->dir[0])
        h_remove_dir(r->dir);
    free(r);
}

const size_t o_lengths[O_N_LENGTHS] = {0,
                                       1,
                                       63,
                                       3519,
                                       3520,
                                       3521,
                                       4031,
                                       4032,
                                       4033,
                                       4095,
                                       4096,
                                       4097,
                                       100000,
                                       O_PIECE - 65,
                                       O_PIECE - 64,
                                       O_PIECE - 63,
                                       O_PIECE - 1,
                                       O_PIECE,
                                       O_PIECE + 1,
                                       2 * O_PIECE,
                                       5557453};

void o_put_and_get_all(o_rig *r, kvc_promise promise)
{
    for (uint32_t i = 0; i < O_N_LENGTHS; i++) {
        assert_false(o_there(r->peer, &r->schema, i));
        assert_int_equal(o_put(r->peer, &r->schema, i, 7, o_lengths[i], promise, 0), KVC_OK);
        assert_true(o_there(r->peer, &r->schema, i));
        o_get_equal(r->peer, &r->schema, i, 7, o_lengths[i]);
        assert_int_equal(o_put(r->peer, &r->schema, i, 7, o_lengths[i], promise, 0), KVC_EXISTS);
        assert_int_equal(o_put(r->peer, &r->schema, i, 8, o_lengths[i] + 1, promise, 0),
                         KVC_EXISTS);
        o_get_equal(r->peer, &r->schema, i, 7, o_lengths[i]);
    }
    for (uint32_t i = 0; i < O_N_LENGTHS; i++)
        o_get_equal(r->peer, &r->schema, i, 7, o_lengths[i]);
}
