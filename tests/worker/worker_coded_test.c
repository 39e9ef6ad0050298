/*
 * worker_coded_test.c: rows that are kept coded. K and V here are such that they code exactly, so
 * steps must be the oracle's; what coding costs is kvk_encode's bound, tested with the kernels.
 * BACKEND: on the CPU, on a device, or on a fake of one.
 */
#include "bench.h"
#include "oracle.h"

#include <math.h>

#ifndef BACKEND
#define BACKEND "cpu"
#endif

enum { N_TOKENS = 856, PREFILL = 832, CHECKED = 64, DIMS = 30 };

static const kvk_dtype codes[] = {KVK_I8_SCALED, KVK_E4M3_SCALED};

/* Whole numbers up to 127 times 2^-6, or of three bits behind the leading one, up to 448 times
 * 2^-8; each head has the largest. */
static double codable(double x, bool first, kvk_dtype code)
{
    double sign = x < 0 ? -1 : 1, y = fabs(x) < 1.7 ? fabs(x) : 1.7;
    if (code == KVK_I8_SCALED)
        return sign * (first ? 127 : rint(y * 64)) * 0x1p-6;
    if (first)
        return sign * 1.75;
    int exponent = 0;
    double part = frexp(y, &exponent);
    return y < 0x1p-6 ? 0 : sign * ldexp(rint(part * 16), exponent - 4);
}

static void make_codable(rig *r, kvk_dtype code)
{
    size_t n = (size_t)r->opts.n_layers * r->n_tokens * rig_kv_width(r);
    for (size_t i = 0; i < n; i++) {
        bool first = i % r->opts.head_dim == 0;
        r->k[i] = codable(r->k[i], first, code);
        r->v[i] = codable(r->v[i], first, code);
    }
}

static void coded_rig(rig *r, kvc_client *client, kvk_dtype code)
{
    rig_init(r, "esa", N_TOKENS);
    r->opts.client = client;
    r->opts.backend = BACKEND;
    r->opts.dtype = KVK_BF16;
    r->opts.head_dim = 64;
    r->opts.n_q_heads = 16;
    r->opts.n_kv_heads = 8;
    r->opts.index = KVW_INDEX_COMPRESSED;
    r->opts.residency_slots = 96;
    r->opts.row_dtype = (uint64_t)code;
    r->opts.max_tokens = 512;
    rig_project(r, DIMS);
}

static kvw_seq *open_seq(rig *r, uint32_t n_known, uint32_t *reused_p)
{
    kvw_seq *seq = NULL;
    assert_ok(kvw_seq_create(r->worker, r->tokens, n_known, &seq, reused_p));
    return seq;
}

static void decode_coded(kvc_client *client, kvk_dtype code)
{
    rig r;
    uint32_t reused = 0, dims = DIMS;
    coded_rig(&r, client, code);
    rig_open(&r);
    make_codable(&r, code);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, CHECKED, oracle_check_step, &dims); /* the oracle takes its time */
    rig_prefill(&r, seq, CHECKED, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, 0));
    rig_decode(&r, seq, PREFILL, N_TOKENS, oracle_check_step, &dims);
    kvw_stats stats = stats_of(seq);
    if (client != NULL)
        assert_true(stats.misses > 0);
    assert_int_equal(stats.steps_device, strcmp(BACKEND, "cpu") == 0 ? 0 : stats.steps);
    assert_int_equal(stats.bytes_fetched % (2u * 8u * 66u), 0);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static void steps_are_the_oracles(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++)
        decode_coded(NULL, codes[i]);
}

static void rows_come_from_a_store(void **state)
{
    bench *b = *state;
    for (size_t i = 0; i < 2; i++)
        decode_coded(b->client, codes[i]);
}

/* Passes of every kind, over few tokens that are all attended and over many: single ones, chunks,
 * some that are no chunk and lie across blocks and the ring's end. */
static void passes_of_every_kind(void **state)
{
    (void)state;
    for (size_t i = 0; i < 2; i++) {
        rig r;
        uint32_t reused = 0, dims = DIMS;
        coded_rig(&r, NULL, codes[i]);
        r.opts.chunk_tokens = 128;
        r.opts.n_recent = 24;
        r.opts.eps = (uint32_t)i;
        rig_project(&r, DIMS);
        rig_open(&r);
        make_codable(&r, codes[i]);
        kvw_seq *seq = open_seq(&r, 0, &reused);
        rig_decode(&r, seq, 0, 6, oracle_check_step, &dims);
        rig_pass(&r, seq, 6, 30, oracle_check_step, &dims);
        rig_prefill(&r, seq, 36, 500, NULL, NULL);
        rig_pass(&r, seq, 500, 100, oracle_check_step, &dims);
        assert_ok(kvw_truncate(seq, 590));
        rig_decode(&r, seq, 590, 594, oracle_check_step, &dims);
        rig_pass(&r, seq, 594, 3, oracle_check_step, &dims);
        kvw_stats stats = stats_of(seq);
        assert_true(stats.full_steps > 0);
        assert_int_equal(stats.steps_device, strcmp(BACKEND, "cpu") == 0 ? 0 : stats.steps);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

/* The index comes from the store; without it there is no prefix. */
static void a_prefix_is_reused_with_its_index(void **state)
{
    bench *b = *state;
    rig r;
    rig_record cold, warm;
    uint32_t reused = 0;
    coded_rig(&r, b->client, KVK_I8_SCALED);
    rig_open(&r);
    make_codable(&r, KVK_I8_SCALED);
    rig_record_init(&cold, &r);
    rig_record_init(&warm, &r);
    for (int i = 0; i < 2; i++) {
        kvw_seq *seq = open_seq(&r, N_TOKENS, &reused);
        assert_int_equal(reused, i == 0 ? 0 : PREFILL);
        rig_prefill(&r, seq, reused, PREFILL, NULL, NULL);
        assert_ok(kvw_flush(seq, 0));
        rig_decode(&r, seq, PREFILL, PREFILL + 20, rig_record_step, i == 0 ? &cold : &warm);
        assert_int_equal(stats_of(seq).index_rows_rebuilt, 0);
        kvw_seq_destroy(seq);
    }
    if (strcmp(BACKEND, "cpu") != 0)
        rig_record_equal(&r, &cold, &warm, PREFILL, PREFILL + 20);
    else /* resident rows are attended first */
        assert_true(rig_record_diff(&r, &cold, &warm, PREFILL, PREFILL + 20) <= 0x1p-7);
    rig_record_fini(&cold);
    rig_record_fini(&warm);
    rig_close(&r);
}

static void what_cannot_be_is_refused(void **state)
{
    (void)state;
    static const struct {
        uint64_t dtype;
        kvw_index_kind index;
    } bad[] = {{5, KVW_INDEX_COMPRESSED}, {KVK_BF16, KVW_INDEX_COMPRESSED}, {7, KVW_INDEX_EXACT}};
    for (size_t i = 0; i < 3; i++) {
        rig r;
        coded_rig(&r, NULL, KVK_I8_SCALED);
        r.opts.row_dtype = bad[i].dtype;
        r.opts.index = bad[i].index;
        r.opts.projection_path = i == 2 ? NULL : r.opts.projection_path;
        assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_INVALID);
        assert_true(strncmp(kvw_last_error(), "row_dtype", 9) == 0);
        rig_close(&r);
    }
}

/* A head has no scale then. */
static void a_value_must_be_finite(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0, dims = DIMS;
    coded_rig(&r, NULL, KVK_E4M3_SCALED);
    rig_open(&r);
    make_codable(&r, KVK_E4M3_SCALED);
    kvw_seq *seq = open_seq(&r, 0, &reused);
    rig_prefill(&r, seq, 0, 300, NULL, NULL);
    assert_ok(kvw_tokens(seq, r.tokens + 300, 1));
    for (uint32_t layer = 0; layer < 2; layer++) {
        void *k = rig_bytes(&r, r.k, rig_kv_width(&r), layer, 300, 1);
        uint16_t *v = rig_bytes(&r, r.v, rig_kv_width(&r), layer, 300, 1);
        uint16_t was = v[7];
        v[7] = 0x7f80;
        assert_int_equal(kvw_append(seq, layer, k, v, 1), KVC_INVALID);
        v[7] = was;
        assert_ok(kvw_append(seq, layer, k, v, 1));
        free(k);
        free(v);
    }
    rig_decode(&r, seq, 301, 310, oracle_check_step, &dims);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

static int find_device(void)
{
    rig r;
    coded_rig(&r, NULL, KVK_I8_SCALED);
    return rig_find_device(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps_are_the_oracles),
        cmocka_unit_test(passes_of_every_kind),
        cmocka_unit_test_setup_teardown(rows_come_from_a_store, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(a_prefix_is_reused_with_its_index, bench_open, bench_close),
        cmocka_unit_test(what_cannot_be_is_refused),
        cmocka_unit_test(a_value_must_be_finite),
    };
    int absent = find_device();
    return absent != 0 ? absent : cmocka_run_group_tests(tests, NULL, NULL);
}
