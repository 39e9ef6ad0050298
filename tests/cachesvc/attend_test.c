/*
 * attend_test.c: AttendRows against attention in double over the same rows: shapes, dtypes, ranks,
 * softcap, sinks, partials that merge, rows that are missing or only in lmdb, and everything that
 * is refused.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attend_rig.h"
#include "request.h"
#ifdef KVS_TEST_RDMA
#include "fake_verbs.h"
#endif

static uint32_t picks[MAX_PICKS], ranks[MAX_PICKS];
static bool here[MAX_PICKS];
static a_partial got, want, other;

static void test_shapes(void **state)
{
    static const a_shape shapes[] = {
        {1, 32, 8, 128, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_ROPE_PLAIN, 0, 0, false,
         700, true},
        {1, 8, 2, 64, KVC_DTYPE_F16, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0.3, 0, true,
         500, false},
        {4, 6, 2, 64, KVC_DTYPE_BF16, KVC_DTYPE_F16, KVC_DTYPE_F16, KVC_ROPE_LLAMA3, 0, 5, true,
         129, true},
        {3, 4, 4, 32, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_NONE, 0, 2.5, false,
         127, false},
        {1, 9, 3, 64, KVC_DTYPE_F16, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0, 0, true, 1,
         false},
        {2, 5, 5, 48, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0, 0, true, 66,
         true},
        {1, 32, 8, 128, KVC_DTYPE_E4M3, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_ROPE_PLAIN, 0, 0, false,
         600, false},
        {3, 9, 3, 64, KVC_DTYPE_I8, KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_LLAMA3, 0, 0, true, 200,
         true},
    };
    a_server *f = *state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        const a_shape *s = &shapes[i];
        char what[32];
        snprintf(what, sizeof(what), "shape %zu", i);
        a_start(f, s, N_BLOCKS);
        a_choose(s, picks, ranks);
        a_attend(f, s, picks, s->ranks ? ranks : NULL, s->n_picks, &got);
        assert_int_equal(f->peer->n_missing, 0);
        assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_dram, s->n_picks);
        a_oracle(s, picks, s->ranks ? ranks : NULL, s->n_picks, NULL, &want);
        a_check_equal(s, &got, &want, what);
        a_stop(f);
    }
}

/* Any cut over groups, as over servers, merges to the whole; same_q sends the queries once. */
static void test_partials_merge(void **state)
{
    a_server *f = *state;
    const a_shape *s = &a_plain;
    a_ask a;
    a_start(f, s, N_BLOCKS);
    a_choose(s, picks, ranks);
    a_ask_init(&a, f, s, picks, NULL, 100);
    for (uint32_t g = 1; g < 4; g++) {
        static const uint32_t first[] = {0, 100, 101, 101}, n[] = {100, 1, 0, 199};
        a.groups[g] = (kvc_row_group){f->context, 7, n[g], picks + first[g]};
        a.queries[g] = a.queries[0];
        a.queries[g].same_q = true;
    }
    a.req.u.fetch_rows.n_groups = 4;
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    a_result(f, s, 0, &got);
    for (uint32_t g = 1; g < 4; g++) {
        a_result(f, s, g, &other);
        if (g == 2) /* no rows at all */
            for (uint32_t i = 0; i < s->n_q_heads; i++)
                assert_true(other.lse[i] == -INFINITY && other.o[i] == 0);
        a_merge(s, &got, &other);
    }
    a_oracle(s, picks, NULL, 300, NULL, &want);
    a_check_equal(s, &got, &want, "four groups");
    /* Learned sink logits: one more partial without values. */
    memset(&other, 0, sizeof(other));
    for (uint32_t i = 0; i < s->n_q_heads; i++)
        other.lse[i] = 0.25 * i;
    a_merge(s, &got, &other);
    for (uint32_t i = 0; i < s->n_q_heads; i++) {
        double keep = 1 / (1 + exp(0.25 * i - want.lse[i]));
        assert_true(fabs(got.o[i * s->dim + 3] - keep * want.o[i * s->dim + 3]) < 1e-4);
    }
    free(a.q);
    a_stop(f);
}

static void expect_missing(const a_server *f, uint32_t n)
{
    uint32_t m = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (here[i])
            continue;
        assert_true(m < f->peer->n_missing);
        assert_int_equal(f->peer->missing[m].index, i);
        assert_int_equal(f->peer->missing[m++].status, KVC_NOT_FOUND);
    }
    assert_int_equal(m, f->peer->n_missing);
}

static void test_missing(void **state)
{
    a_server *f = *state;
    const a_shape *s = &a_plain;
    a_start(f, s, 3);
    a_choose(s, picks, ranks);
    picks[17] = N_BLOCKS * H_TOKENS;
    picks[18] = UINT32_MAX;
    for (uint32_t i = 0; i < 300; i++)
        here[i] = picks[i] / H_TOKENS != 3 && picks[i] < N_BLOCKS * H_TOKENS;
    a_attend(f, s, picks, ranks, 300, &got);
    expect_missing(f, 300);
    a_oracle(&(a_shape){1, 8, 2, 64, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_ROPE_PLAIN,
                        0, 0, true, 300, false},
             picks, ranks, 300, here, &want);
    a_check_equal(s, &got, &want, "some missing");
    /* Another value goes while the context stays open. */
    kvc_digest gone = h_digest(5);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = f->digest;
    req.u.erase.digests = &gone;
    req.u.erase.n_digests = 1;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    for (uint32_t i = 0; i < 300; i++)
        here[i] = here[i] && picks[i] / H_TOKENS != 5;
    a_attend(f, s, picks, NULL, 300, &got);
    expect_missing(f, 300);
    a_oracle(s, picks, NULL, 300, here, &want);
    a_check_equal(s, &got, &want, "one more gone");
    /* None at all. */
    for (uint32_t i = 0; i < 4; i++) {
        picks[i] = 3 * H_TOKENS + i;
        here[i] = false;
    }
    a_attend(f, s, picks, NULL, 4, &got);
    expect_missing(f, 4);
    assert_true(got.lse[0] == -INFINITY && got.o[0] == 0);
    a_stop(f);
}

/* Rows of block 5 that no encoder writes: a NaN code, a scale that is Inf, NaN or negative, of the
 * first head's K or V. */
static void spoil_five(const a_shape *s, char *value, uint32_t block)
{
    static const uint16_t scales[3] = {0x7f80, 0x7fc0, 0xbc00};
    size_t side = s->kv_heads * (s->dim + 2);
    for (uint32_t row = 0; block == 5 && row < H_TOKENS; row++) {
        char *slice = value + (2 * row + row / 4 % 2) * side;
        if (row % 4 == 3)
            memset(slice, 0x7f, s->dim);
        else
            memcpy(slice + s->kv_heads * s->dim, &scales[row % 4], sizeof(scales[0]));
    }
}

/* Such rows are attended over as they are: the server answers, other heads have what they have
 * without them, and so has whoever picks other rows, then and later. */
static void test_spoilt_rows(void **state)
{
    static const kvc_dtype dtypes[] = {KVC_DTYPE_E4M3, KVC_DTYPE_I8};
    a_server *f = *state;
    f->spoil = spoil_five;
    for (uint32_t d = 0; d < 2; d++) {
        a_shape s = {3, 4, 2,    64,  dtypes[d], KVC_DTYPE_F32, KVC_DTYPE_F32, KVC_ROPE_PLAIN,
                     0, 0, true, 200, true};
        a_start(f, &s, N_BLOCKS);
        a_choose(&s, picks, ranks);
        uint32_t n_odd = 0, n_finite = 0;
        for (uint32_t i = 0; i < s.n_picks; i++)
            n_odd += picks[i] / H_TOKENS == 5;
        assert_true(n_odd > 4);
        a_attend(f, &s, picks, ranks, s.n_picks, &got);
        assert_int_equal(f->peer->n_missing, 0);
        a_oracle(&s, picks, ranks, s.n_picks, NULL, &want);
        for (uint32_t i = 0; i < s.n_q * s.n_q_heads; i++) {
            bool odd_head = i % s.n_q_heads < s.n_q_heads / s.kv_heads;
            for (uint32_t t = 0; t < s.dim; t++) {
                double a = got.o[i * s.dim + t], b = want.o[i * s.dim + t];
                n_finite += odd_head && isfinite(a);
                assert_true(odd_head || fabs(a - b) <= 1e-4);
            }
        }
        assert_int_equal(n_finite, 0);
        for (uint32_t i = 0; i < s.n_picks; i++)
            picks[i] = picks[i] / H_TOKENS == 5 ? picks[i] - 5 * H_TOKENS : picks[i];
        a_attend(f, &s, picks, ranks, s.n_picks, &got);
        a_oracle(&s, picks, ranks, s.n_picks, NULL, &want);
        a_check_equal(&s, &got, &want, "the other blocks");
        a_stop(f);
    }
}

static void refused(a_server *f, const kvc_request *req, kvc_status want_status, const char *word)
{
    kvc_status status = h_call(f->peer, req);
    if (status != want_status || !strstr(f->peer->xfer.detail, word))
        fail_msg("%s: \"%s\" instead of %s: \"%s\"", kvc_status_name(status), f->peer->xfer.detail,
                 kvc_status_name(want_status), word);
}

static void test_bad_requests(void **state)
{
    a_server *f = *state;
    const a_shape *s = &a_plain;
    a_ask a;
    a_start(f, s, N_BLOCKS);
    a_choose(s, picks, ranks);
    a_ask_init(&a, f, s, picks, ranks, 10);
    a.req.data_bytes = a.iov[2].iov_len = a.req.data_bytes - 4;
    a.req.data_bytes = a.iov[2].iov_len + 3;
    refused(f, &a.req, KVC_INVALID, "the queries have");
    free(a.q);
    a_ask_init(&a, f, s, picks, ranks, 10);
    a.groups[0].part = 8;
    refused(f, &a.req, KVC_INVALID, "part 8");
    a.groups[0].part = 7;
    a.groups[0].context ^= 1;
    refused(f, &a.req, KVC_STALE_HANDLE, "context");
    a.groups[0].context ^= 1;
    a.queries[0].n_q_heads = 7;
    refused(f, &a.req, KVC_INVALID, "n_q_heads");
    a.queries[0].n_q_heads = 8;
    a.groups[1] = a.groups[0];
    a.queries[1] = a.queries[0];
    a.queries[1].same_q = true;
    a.queries[1].n_q_heads = 4;
    a.req.u.fetch_rows.n_groups = 2;
    refused(f, &a.req, KVC_INVALID, "same_q");
    a.req.u.fetch_rows.n_groups = 0;
    refused(f, &a.req, KVC_INVALID, "no group");
    a.req.u.fetch_rows.n_groups = 1;
    assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
    f->h.server->limits.max_picks = 9;
    refused(f, &a.req, KVC_INVALID, "max_picks");
    f->h.server->limits.max_picks = KVC_MAX_PICKS;
    f->h.server->limits.max_message_bytes = 2000;
    refused(f, &a.req, KVC_INVALID, "the results would have");
    f->h.server->limits.max_message_bytes = KVC_MAX_VALUE_BYTES;
    free(a.q);
    a_stop(f);
}

/* Parts of every other kind, by name, and those whose shape or dtype is not done. */
static void test_kinds(void **state)
{
    static const struct {
        kvc_part_kind kind;
        kvc_dtype dtype;
        uint32_t v_dim, rotated;
        kvc_status status;
        const char *word;
    } cases[] = {
        {KVC_PART_LATENT, KVC_DTYPE_BF16, 64, 0, KVC_UNSUPPORTED, "latent"},
        {KVC_PART_INDEX, KVC_DTYPE_BF16, 64, 0, KVC_INVALID, "index"},
        {KVC_PART_STATE, KVC_DTYPE_BF16, 64, 0, KVC_INVALID, "state"},
        {KVC_PART_CHUNK_KV, KVC_DTYPE_BF16, 64, 0, KVC_OK, ""},
        {KVC_PART_CHUNK_KV, KVC_DTYPE_BF16, 32, 0, KVC_UNSUPPORTED, "v_dim"},
        {KVC_PART_KV, KVC_DTYPE_RAW, 64, 0, KVC_UNSUPPORTED, "F32, F16 or BF16"},
        {KVC_PART_KV, KVC_DTYPE_E4M3, 64, 0, KVC_UNSUPPORTED, "head-scales"}, /* no codec */
        {KVC_PART_KV, KVC_DTYPE_BF16, 64, 1, KVC_INVALID, "not to be rotated"},
    };
    a_server *f = *state;
    a_ask a;
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    a_choose(&a_plain, picks, ranks);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        a_make_schema(f, &a_plain);
        f->part.kind = cases[i].kind;
        f->part.dtype = cases[i].dtype;
        f->part.v_dim = cases[i].v_dim;
        f->part.rope.stored_rotated = cases[i].rotated;
        a_register_schema(f);
        a_open_context(f);
        a_ask_init(&a, f, &a_plain, picks, ranks, 10);
        if (cases[i].status == KVC_OK)
            assert_int_equal(h_call(f->peer, &a.req), KVC_OK);
        else
            refused(f, &a.req, cases[i].status, cases[i].word);
        free(a.q);
    }
    a_stop(f);
}

static void test_switched_off(void **state)
{
    a_server *f = *state;
    a_ask a;
    f->h.settings.attend_queue = 0;
    a_start(f, &a_plain, N_BLOCKS);
    kvc_request req = {.method = KVC_DESCRIBE};
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.describe.limits.max_attend_queries, 0);
    a_ask_init(&a, f, &a_plain, picks, NULL, 10);
    assert_int_equal(h_call(f->peer, &a.req), KVC_UNSUPPORTED);
    free(a.q);
    a_stop(f);
}

#ifdef KVASIR_LMDB
/* After a restart every row is only in lmdb; what does not fit one call's buffer is listed. */
static void test_cold(void **state)
{
    a_server *f = *state;
    const a_shape *s =
        &(a_shape){1, 32, 8,     128, KVC_DTYPE_BF16, KVC_DTYPE_BF16, KVC_DTYPE_F32, KVC_ROPE_PLAIN,
                   0, 0,  false, 200, false};
    h_temp_dir(f->dir);
    f->h.settings.lmdb_path = f->dir;
    f->h.settings.lmdb_bytes = 256u << 20;
    f->h.settings.promote_percent = 0;
    a_start(f, s, 2);
    a_stop(f); /* writes behind */
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    a_open_context(f);
    a_choose(s, picks, ranks);
    for (uint32_t i = 0; i < 200; i++)
        here[i] = picks[i] / H_TOKENS != 2;
    a_attend(f, s, picks, NULL, 200, &got);
    expect_missing(f, 200);
    assert_int_equal(f->peer->xfer.reply.u.fetch_rows.rows_lmdb, 200 - f->peer->n_missing);
    a_oracle(s, picks, NULL, 200, here, &want);
    a_check_equal(s, &got, &want, "cold");
    a_stop(f);
    f->h.settings.max_inflight_bytes = 2u << 20; /* a quarter of it: 128 rows of 4 KiB */
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    a_open_context(f);
    a_attend(f, s, picks, NULL, 200, &got);
    for (uint32_t m = 0; m < f->peer->n_missing; m++) {
        uint32_t i = f->peer->missing[m].index;
        assert_int_equal(f->peer->missing[m].status, here[i] ? KVC_AGAIN : KVC_NOT_FOUND);
        here[i] = false;
    }
    uint32_t n_left = f->peer->xfer.reply.u.fetch_rows.rows_lmdb;
    assert_true(n_left > 0 && n_left <= 128);
    assert_int_equal(n_left + f->peer->n_missing, 200);
    a_oracle(s, picks, NULL, 200, here, &want);
    a_check_equal(s, &got, &want, "more than fits");
    a_stop(f);
}
#endif

int main(void)
{
#ifdef KVS_TEST_RDMA
    fake_verbs_use(NULL);
    h_listen = "rdma://127.0.0.1:0";
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_shapes, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_partials_merge, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_missing, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_spoilt_rows, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_bad_requests, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_kinds, a_setup, a_teardown),
        cmocka_unit_test_setup_teardown(test_switched_off, a_setup, a_teardown),
#ifdef KVASIR_LMDB
        cmocka_unit_test_setup_teardown(test_cold, a_setup, a_teardown),
#endif
    };
    return cmocka_run_group_tests_name("attend", tests, NULL, NULL);
}
