/*
 * worker_unit_test.c: the pieces that stand alone: residency, sorting, conversion, the artefact's
 * parser, and every refusal of kvw_open.
 */
#include "rig.h"

#include <math.h>

#include "convert.h"
#include "residency.h"
#include "selector/selector.h"

/* Residency against a model: a list of positions by last use. */
static void residency_evicts_the_oldest(void **state)
{
    enum { SLOTS = 7, POSITIONS = 40 };
    (void)state;
    support_random random = support_seed(42);
    kvwi_residency r;
    uint8_t rows[SLOTS * 4];
    uint32_t young[SLOTS + 1], n = 0; /* oldest first */
    assert_ok(kvwi_residency_init(&r, SLOTS, rows, 4));
    assert_null(kvwi_residency_use(&r, 3)); /* before it was extended */
    assert_ok(kvwi_residency_extend(&r, POSITIONS));
    for (int i = 0; i < 20000; i++) {
        uint32_t pos = (uint32_t)support_below(&random, POSITIONS), at = n, slot = 99;
        for (uint32_t j = 0; j < n; j++)
            at = young[j] == pos ? j : at;
        const uint8_t *row = kvwi_residency_use(&r, pos);
        assert_int_equal(row != NULL, at < n);
        if (at < n && support_below(&random, 8) == 0) {
            kvwi_residency_drop(&r, pos);
            memmove(young + at, young + at + 1, (--n - at) * sizeof(*young));
            continue;
        }
        if (at == n) {
            assert_ok(kvwi_residency_take(&r, pos, &slot));
            assert_true(slot < SLOTS);
            if (n == SLOTS)
                memmove(young, young + 1, --n * sizeof(*young));
        } else {
            assert_true(row >= rows && row < rows + sizeof(rows) && (row - rows) % 4 == 0);
            memmove(young + at, young + at + 1, (--n - at) * sizeof(*young));
        }
        young[n++] = pos;
        assert_int_equal(r.n_used, n);
    }
    kvwi_residency_fini(&r);
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static void sorts_like_qsort(void **state)
{
    (void)state;
    support_random random = support_seed(7);
    uint32_t a[600], b[600], tmp[600];
    for (uint32_t n = 0; n < 600; n += 37) {
        for (uint32_t i = 0; i < n; i++)
            a[i] = b[i] = (uint32_t)support_next(&random) >> (support_next(&random) % 32);
        kvwi_sort_u32(a, n, tmp);
        qsort(b, n, sizeof(*b), by_value);
        assert_memory_equal(a, b, n * sizeof(*a));
    }
}

/* Every 16-bit value survives the way there and back; halves between two go to the even one. */
static void converts_with_ties_to_even(void **state)
{
    (void)state;
    for (int d = 0; d < 2; d++) {
        kvk_dtype dtype = d == 0 ? KVK_F16 : KVK_BF16;
        for (uint32_t u = 0; u < 65536; u++) {
            uint16_t in = (uint16_t)u, out = 0;
            double x = rig_get(dtype, &in, 0);
            float f = (float)x;
            kvk_from_f32(&f, 1, dtype, &out);
            if (isnan(x))
                assert_true(isnan(rig_get(dtype, &out, 0)));
            else
                assert_int_equal(in, out);
        }
        for (uint32_t u = 0; u < 1u << 16; u++) {
            uint16_t lo = (uint16_t)(u & 0x7fffu), hi = (uint16_t)(lo + 1), out = 0;
            double a = rig_get(dtype, &lo, 0), b = rig_get(dtype, &hi, 0);
            float mid = (float)((a + b) / 2);
            if (!isfinite(a) || !isfinite(b) || (double)mid != (a + b) / 2)
                continue;
            kvk_from_f32(&mid, 1, dtype, &out);
            assert_int_equal(out, lo % 2 == 0 ? lo : hi);
        }
    }
    const float big[] = {1e30f, -1e30f, 65519.0f, 65520.0f, INFINITY};
    uint16_t out[5];
    kvk_from_f32(big, 5, KVK_F16, out);
    assert_int_equal(out[0], 0x7c00);
    assert_int_equal(out[1], 0xfc00);
    assert_int_equal(out[2], 0x7bff);
    assert_int_equal(out[3], 0x7c00);
    assert_int_equal(out[4], 0x7c00);
}

/* ---- the artefact ---- */

static const char header[] = "kvasir-projection-v1\nselector=tokenselect\nmodel=m\nn_layers=2\n"
                             "n_kv_heads=2\nhead_dim=4\ndims=2\nform=per_head\nrope=40\n\n";
enum { FLOATS = 2 * 2 * 2 * 4 * 2 };

static size_t artefact(uint8_t *out, const char *text)
{
    size_t n = strlen(text);
    memcpy(out, text, n);
    for (uint32_t i = 0; i < FLOATS; i++) {
        float x = (float)i;
        memcpy(out + n + i * 4, &x, 4);
    }
    return n + FLOATS * 4;
}

static kvc_status parse(const void *data, size_t len, kvwi_projection **p)
{
    const char *why = NULL;
    /* a copy of exactly that length, so that a sanitizer sees any step beyond it */
    void *copy = malloc(len + (len == 0));
    assert_non_null(copy);
    memcpy(copy, data, len);
    kvc_status st = kvwi_projection_parse(copy, len, p, &why);
    free(copy);
    assert_true((st == KVC_OK) == (*p != NULL));
    assert_true(st == KVC_OK || why != NULL);
    return st;
}

static void the_artefact_is_read_as_written(void **state)
{
    (void)state;
    uint8_t data[1024];
    kvwi_projection *p = NULL;
    size_t len = artefact(data, header);
    assert_ok(parse(data, len, &p));
    assert_string_equal(p->selector, "tokenselect");
    assert_string_equal(p->model, "m");
    assert_int_equal(p->heads, 2);
    assert_int_equal(p->d_in, 4);
    assert_int_equal(p->rope, 40);
    assert_true(p->nested);
    for (uint32_t i = 0; i < 16; i++) { /* layer 0 A, layer 0 B, layer 1 A, layer 1 B */
        assert_true(p->a[i] == (float)i && p->b[i] == (float)(16 + i));
        assert_true(p->a[16 + i] == (float)(32 + i) && p->b[16 + i] == (float)(48 + i));
    }
    char path[300];
    const char *base = getenv("TMPDIR"), *why = NULL;
    (void)snprintf(path, sizeof(path), "%s/kvasir-unit-%d.bin", base == NULL ? "." : base,
                   (int)getpid());
    assert_ok(kvwi_projection_write(path, p));
    kvwi_projection *again = NULL;
    assert_ok(kvwi_projection_load(path, &again, &why));
    assert_memory_equal(again->a, p->a, 32 * 4);
    assert_memory_equal(again->b, p->b, 32 * 4);
    assert_int_equal(again->rope, 40);
    kvwi_projection_free(again);
    (void)unlink(path);
    assert_status(kvwi_projection_load(path, &again, &why), KVC_NOT_FOUND);
    kvwi_projection_free(p);
}

/* Every cut of a good file, every bit of its header, and lines that break a rule. */
static void the_parser_refuses_what_is_wrong(void **state)
{
    (void)state;
    uint8_t data[1024], bent[1024];
    kvwi_projection *p = NULL;
    size_t len = artefact(data, header);
    for (size_t n = 0; n < len; n++)
        assert_status(parse(data, n, &p), KVC_INVALID);
    for (size_t bit = 0; bit < (sizeof(header) - 1) * 8; bit++) {
        memcpy(bent, data, len);
        bent[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        if (parse(bent, len, &p) == KVC_OK)
            kvwi_projection_free(p);
    }
    const char *const bad[][2] = {
        {"dims=2", "dims=0"},
        {"dims=2", "dims=02"},
        {"dims=2", "dims=-2"},
        {"dims=2", "dims=5"},
        {"dims=2", "dims=99999999999999999999"},
        {"n_layers=2", "n_layers=4294967298"},
        {"n_layers=2", "n_layers=0"},
        {"rope=40", "rope=fourty"},
        {"rope=40", "rope=40\nrope=40"},
        {"rope=40", "rope=40\nBAD=1"},
        {"rope=40", "rope=40\nnested=2"},
        {"rope=40", "rope=40\nnovalue"},
        {"rope=40\n", ""},
        {"form=per_head", "form=both"},
        {"model=m", "model="},
        {"v1", "v2"},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char text[512];
        const char *at = strstr(header, bad[i][0]);
        (void)snprintf(text, sizeof(text), "%.*s%s%s", (int)(at - header), header, bad[i][1],
                       at + strlen(bad[i][0]));
        len = artefact(bent, text);
        if (parse(bent, len, &p) != KVC_INVALID)
            fail_msg("\"%s\" was taken", bad[i][1]);
    }
    len = artefact(data, header);
    uint32_t nan = 0x7fc00000u;
    memcpy(data + len - 4, &nan, 4);
    assert_status(parse(data, len, &p), KVC_INVALID);
}

/* ---- options ---- */

static kvc_status no_sum(void *arg, const char *op, float *x, uint32_t n)
{
    (void)arg, (void)op, (void)x, (void)n;
    return KVC_OK;
}

typedef void bend(kvw_opts *o);
#define BEND(name, text)                                                                           \
    static void name(kvw_opts *o)                                                                  \
    {                                                                                              \
        text;                                                                                      \
    }
BEND(no_model, o->model = "")
BEND(no_layers, o->n_layers = 0)
BEND(odd_heads, o->n_q_heads = 5)
BEND(odd_dim, o->head_dim = 15)
BEND(int8_dtype, o->dtype = KVK_I8)
BEND(bad_rope, o->rope.theta = -1)
BEND(no_reduce, o->tp_size = 2)
BEND(bad_rank, o->tp_rank = 1)
BEND(small_block, o->block_tokens = 32)
BEND(chunk_misfit, o->chunk_tokens = 96)
BEND(unknown_selector, o->selector = "oracle")
BEND(no_projection, o->index = KVW_INDEX_COMPRESSED)
BEND(needless_dims, o->index_dims = 8)
BEND(needless_factor, o->rerank_factor = 2)
BEND(few_slots, o->residency_slots = 47)
BEND(bad_cos, o->reselect_cos = 1.5)
BEND(cos_of_ones, o->reselect_cos = 0.5; o->chunk_tokens = 1)
BEND(nan_cos, o->reselect_cos = NAN)
BEND(bad_policy, o->policy = (kvw_policy)9)
BEND(group_drop, o->tp_size = 2; o->all_reduce = no_sum; o->policy = KVW_DROP)
BEND(bad_promise, o->promise = (kvc_promise)9)
BEND(bad_exact, o->exact = 2)
BEND(bad_backend, o->backend = "abacus")
BEND(bad_size, o->size_bytes = sizeof(*o) + 8)
BEND(no_file, o->index = KVW_INDEX_COMPRESSED; o->projection_path = "/nonexistent/file")
BEND(directory, o->index = KVW_INDEX_COMPRESSED; o->projection_path = "/")
BEND(esa_cache, o->selector = "esa"; o->reselect_cos = 0.9)

static void open_names_the_bad_option(void **state)
{
    static const struct {
        bend *bend;
        const char *word;
    } cases[] = {
        {no_model, "model"},
        {no_layers, "n_layers"},
        {odd_heads, "n_q_heads"},
        {odd_dim, "head_dim"},
        {int8_dtype, "dtype"},
        {bad_rope, "rope"},
        {no_reduce, "all_reduce"},
        {bad_rank, "tp_rank"},
        {small_block, "block_token"},
        {chunk_misfit, "chunk_tokens"},
        {unknown_selector, "oracle"},
        {no_projection, "projection_path"},
        {needless_dims, "index_dims"},
        {needless_factor, "rerank_factor"},
        {few_slots, "residency_slots"},
        {bad_cos, "reselect_cos"},
        {nan_cos, "reselect_cos"},
        {cos_of_ones, "chunk_tokens"},
        {bad_policy, "policy"},
        {group_drop, "policy"},
        {bad_promise, "promise"},
        {bad_exact, "exact"},
        {bad_backend, "abacus"},
        {bad_size, "size_bytes"},
        {no_file, "/nonexistent"},
        {directory, "regular file"},
        {esa_cache, "reselect_cos"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        rig r;
        kvw_worker *worker = NULL;
        rig_init(&r, "tokenselect", 10);
        cases[i].bend(&r.opts);
        kvc_status st = kvw_open(&r.opts, &worker);
        assert_true(st == KVC_INVALID || (cases[i].bend == no_file && st == KVC_NOT_FOUND));
        assert_null(worker);
        if (strstr(kvw_last_error(), cases[i].word) == NULL)
            fail_msg("\"%s\" does not say %s", kvw_last_error(), cases[i].word);
    }
}

/* A projection must be of this model, selector, shape and position. */
static void open_refuses_a_foreign_projection(void **state)
{
    (void)state;
    for (int i = 0; i < 7; i++) {
        rig r;
        kvw_worker *worker = NULL;
        rig_init(&r, "tokenselect", 10);
        r.opts.index = KVW_INDEX_COMPRESSED;
        rig_project(&r, 8);
        r.opts.model = i == 0 ? "another" : r.opts.model;
        r.opts.n_layers = i == 1 ? 3 : r.opts.n_layers;
        r.opts.selector = i == 2 ? "esa" : r.opts.selector;
        r.opts.n_recent = i == 3 ? 41 : r.opts.n_recent;
        r.opts.index_dims = i == 4 ? 9 : 0;
        r.opts.index = i == 5 ? KVW_INDEX_RERANKED : r.opts.index;
        r.opts.index_dims = i == 5 ? 8 : r.opts.index_dims;
        kvc_status st = kvw_open(&r.opts, &worker);
        assert_status(st, i == 6 ? KVC_OK : KVC_INVALID);
        kvw_close(worker);
        (void)unlink(r.projection);
    }
}

static void calls_out_of_order_are_refused(void **state)
{
    (void)state;
    rig r;
    kvw_seq *seq = NULL;
    kvw_step *step = NULL;
    uint32_t reused = 0;
    rig_init(&r, "tokenselect", 200);
    rig_open(&r);
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 0, 8);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 0, 8);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    kvw_seq *other = NULL;
    assert_status(kvw_seq_create(r.worker, r.tokens, (1u << 30) + 1u, &other, &reused),
                  KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "n_tokens"));
    assert_status(kvw_append(seq, 0, k, k, 8), KVC_INVALID);   /* no pass */
    assert_status(kvw_tokens(seq, r.tokens, 65), KVC_INVALID); /* more than a chunk */
    assert_status(kvw_tokens(seq, r.tokens, 0), KVC_INVALID);
    assert_ok(kvw_truncate(seq, 0));
    assert_ok(kvw_tokens(seq, r.tokens, 8));
    assert_status(kvw_append(seq, 0, k, k, 7), KVC_INVALID);
    assert_status(kvw_append(seq, 2, k, k, 8), KVC_INVALID);         /* no such layer */
    assert_status(kvw_step_begin(seq, 0, q, 8, &step), KVC_INVALID); /* not appended */
    assert_ok(kvw_append(seq, 0, k, k, 8));
    assert_status(kvw_append(seq, 0, k, k, 8), KVC_INVALID);  /* twice */
    assert_status(kvw_tokens(seq, r.tokens, 8), KVC_INVALID); /* layer 1 is missing */
    assert_status(kvw_truncate(seq, 4), KVC_INVALID);
    assert_status(kvw_step_begin(seq, 0, q, 9, &step), KVC_INVALID);
    assert_ok(kvw_step_begin(seq, 0, q, 8, &step));
    assert_status(kvw_append(seq, 0, k, k, 8), KVC_INVALID);
    kvw_seq_destroy(seq); /* the open step is abandoned */
    free(k);
    free(q);
    rig_close(&r);
}

/* Keys and queries that are not finite are refused, whatever the index and dtype, and the layer
 * lives on. */
static void refuse_non_finite(const char *selector, kvw_index_kind index, kvk_dtype dtype, double x)
{
    rig r;
    kvw_seq *seq = NULL;
    kvw_step *step = NULL;
    uint32_t reused = 0;
    rig_init(&r, selector, 200);
    r.opts.index = index;
    r.opts.dtype = dtype;
    if (index != KVW_INDEX_EXACT)
        rig_project(&r, 8);
    rig_open(&r);
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 0, 8);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 0, 8);
    size_t k_last = 8 * rig_kv_width(&r) - 1, q_last = 8 * rig_q_width(&r) - 1;
    double k_was = rig_get(dtype, k, k_last), q_was = rig_get(dtype, q, q_last);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    assert_ok(kvw_tokens(seq, r.tokens, 8));
    rig_set(dtype, k, k_last, x);
    assert_status(kvw_append(seq, 0, k, k, 8), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "finite"));
    rig_set(dtype, k, k_last, k_was);
    assert_ok(kvw_append(seq, 0, k, k, 8));
    rig_set(dtype, q, q_last, x);
    assert_status(kvw_step_begin(seq, 0, q, 8, &step), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "finite"));
    rig_set(dtype, q, q_last, q_was);
    assert_ok(kvw_step_begin(seq, 0, q, 8, &step));
    kvw_seq_destroy(seq);
    free(k);
    free(q);
    rig_close(&r);
}

static void keys_and_queries_must_be_finite(void **state)
{
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_F16, KVK_BF16};
    (void)state;
    refuse_non_finite("esa", KVW_INDEX_COMPRESSED, KVK_F32, NAN);
    for (size_t i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]); i++) {
        refuse_non_finite("esa", KVW_INDEX_EXACT, dtypes[i], INFINITY);
        refuse_non_finite("tokenselect", KVW_INDEX_EXACT, dtypes[i], -INFINITY);
        refuse_non_finite("tokenselect", KVW_INDEX_EXACT, dtypes[i], NAN);
    }
}

/* Opts of a caller that was built before the last fields were added. */
static void an_older_struct_is_understood(void **state)
{
    (void)state;
    rig r;
    kvw_worker *worker = NULL;
    rig_init(&r, "tokenselect", 10);
    r.opts.size_bytes = offsetof(kvw_opts, index_dims);
    r.opts.put_window = 99999999; /* beyond the size that was given: not read */
    assert_ok(kvw_open(&r.opts, &worker));
    kvw_close(worker);
}

/* The default scale is the number that it stands for; another backend computes other bits. */
static void the_schema_names_what_computes(void **state)
{
    (void)state;
    kvc_digest digest[3];
    for (int i = 0; i < 3; i++) {
        rig r;
        rig_init(&r, "tokenselect", 10);
        r.opts.attention_scale = i == 1 ? 0.25f : 0; /* of head_dim 16 */
        r.opts.backend = i == 2 ? "reference" : "cpu";
        rig_open(&r);
        digest[i] = *kvw_schema_digest(r.worker);
        rig_close(&r);
    }
    assert_memory_equal(&digest[0], &digest[1], sizeof(digest[0]));
    assert_memory_not_equal(&digest[0], &digest[2], sizeof(digest[0]));
}

/* Wherever it stands, however many there are: runs are looked at together, what is left apart. */
static void one_bad_number_is_found(void **state)
{
    enum { MOST = 200 };
    (void)state;
    static const struct {
        kvk_dtype dtype;
        uint16_t good, bad;
    } kinds[] = {{KVK_BF16, 0xff7f, 0x7f80}, {KVK_F16, 0xfbff, 0xfc00}};
    for (size_t kind = 0; kind < sizeof(kinds) / sizeof(kinds[0]); kind++) {
        uint16_t x[MOST];
        for (size_t i = 0; i < MOST; i++)
            x[i] = kinds[kind].good;
        for (size_t n = 0; n < MOST; n++) {
            x[n] = kinds[kind].bad; /* behind the end */
            assert_true(kvwi_all_finite(x, n, kinds[kind].dtype));
            x[n] = kinds[kind].good;
            for (size_t i = 0; i < n; i++) {
                x[i] = kinds[kind].bad;
                assert_false(kvwi_all_finite(x, n, kinds[kind].dtype));
                x[i] = kinds[kind].good;
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(residency_evicts_the_oldest),
        cmocka_unit_test(sorts_like_qsort),
        cmocka_unit_test(converts_with_ties_to_even),
        cmocka_unit_test(the_artefact_is_read_as_written),
        cmocka_unit_test(the_parser_refuses_what_is_wrong),
        cmocka_unit_test(open_names_the_bad_option),
        cmocka_unit_test(open_refuses_a_foreign_projection),
        cmocka_unit_test(calls_out_of_order_are_refused),
        cmocka_unit_test(keys_and_queries_must_be_finite),
        cmocka_unit_test(one_bad_number_is_found),
        cmocka_unit_test(the_schema_names_what_computes),
        cmocka_unit_test(an_older_struct_is_understood),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
