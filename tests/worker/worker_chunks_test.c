/*
 * worker_chunks_test.c: retrieval of whole chunks (selectors gca and hsa) against the formulas in
 * double, and over a store: whatever had to be fetched or was reused, the bits are those of a run
 * that keeps everything.
 */
#include <math.h>

#include "base/clock.h"
#include "chunk_rig.h"
#include "internal.h"
#include "servers.h"

enum { GROUPS = 2 };

/* ---- the formulas ---- */

static double score_of(const chunk_rig *c, const float *query, size_t i, size_t off, size_t dim)
{
    double x = 0;
    for (size_t t = off; t < off + dim; t++)
        x += (double)query[t] * (double)c->marks[i][t];
    return x / sqrt((double)dim);
}

/* Weights of chunks 0 .. n - 1, 0 for those that are not among the K best. */
static void weigh(const chunk_rig *c, const float *query, size_t n, size_t off, size_t dim,
                  bool stick, double *w)
{
    double sum = 0, left = 1;
    for (size_t i = n; i-- > 0;) {
        double x = score_of(c, query, i, off, dim);
        size_t rank = 0;
        for (size_t j = 0; j < n; j++) {
            double y = score_of(c, query, j, off, dim);
            rank += y > x || (y == x && j < i);
        }
        w[i] = rank >= K ? 0 : stick ? left / (1 + exp(-x)) : exp(x);
        sum += w[i];
        left *= rank >= K ? 1 : 1 / (1 + exp(x));
    }
    for (size_t i = 0; i < n && !stick; i++)
        w[i] /= sum;
}

/* One number of the output of the query at position pos: heads of the rig. */
static double output_of(const rig *r, const double *w, size_t n, size_t pos, size_t head, size_t d)
{
    size_t width = rig_kv_width(r), dh = r->opts.head_dim, kv = head / 2 * dh;
    double out = 0;
    for (size_t i = 0; i < n; i++) {
        double num = 0, den = 1;
        for (size_t t = i * S; t < i * S + S - 1; t++) {
            double x = 0;
            for (size_t u = 0; u < dh; u++)
                x += r->q[pos * rig_q_width(r) + head * dh + u] * r->k[t * width + kv + u];
            x = exp(x / sqrt((double)dh));
            num += x * r->v[t * width + kv + d];
            den += x;
        }
        out += w[i] * num / den;
    }
    return out;
}

/* Retrieval of chunk t, and attention of two queries of the chunk behind it, of kv_head or all. */
static void check_formula(chunk_rig *c, kvw_retriever *x, uint32_t t, uint32_t kv_head, bool stick)
{
    rig *r = &c->r;
    bool all = kv_head == KVW_ALL_HEADS;
    size_t off = all ? 0 : kv_head * DIM / 2, dim = all ? DIM : DIM / 2, n_heads = all ? 4 : 2;
    size_t first_head = all ? 0 : kv_head * 2, dh = r->opts.head_dim, pos = (CHUNKS - 1) * S;
    double w[CHUNKS];
    const uint32_t *ids = NULL;
    const float *scores = NULL, *weights = NULL;
    uint32_t n = 0;
    double tolerance = r->opts.dtype == KVK_F32 ? 2e-6 : 1e-2;
    void *q = rig_bytes(r, r->q, rig_q_width(r), 0, (uint32_t)pos, 2);
    size_t elem = kvk_dtype_bytes(r->opts.dtype), len = n_heads * dh * elem;
    uint8_t part[2 * 4 * 16 * 4];

    for (size_t i = 0; i < 2; i++)
        memcpy(part + i * len, (uint8_t *)q + (i * 4 + first_head) * dh * elem, len);
    weigh(c, c->queries[t], t, off, dim, stick, w);
    assert_ok(kvw_retrieve(x, c->queries[t], t));
    assert_ok(kvw_retrieved(x, &ids, &scores, &weights, &n));
    assert_int_equal(n, t < K ? t : K);
    for (uint32_t i = 0; i < n; i++) {
        assert_true(i == 0 || ids[i] > ids[i - 1]);
        assert_true(fabs((double)weights[i] - w[ids[i]]) < 1e-6 && w[ids[i]] > 0);
        assert_true(fabs((double)scores[i] / sqrt((double)dim) -
                         score_of(c, c->queries[t], ids[i], off, dim)) < 1e-5);
    }
    assert_ok(kvw_retriever_attend(x, part, 2, part));
    for (size_t i = 0; i < 2 * n_heads * dh; i++) {
        size_t head = first_head + i / dh % n_heads;
        double want = output_of(r, w, t, pos + i / dh / n_heads, head, i % dh);
        assert_true(fabs(rig_get(r->opts.dtype, part, i) - want) < tolerance);
    }
    free(q);
}

static void retrieval_is_the_formula(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        chunk_rig c;
        uint32_t reused = 0;
        bool stick = i % 2 != 0;
        open_rig(&c, stick ? "hsa" : "gca", i < 2 ? KVK_F32 : KVK_BF16, NULL);
        kvw_seq *seq = create(&c, 0, &reused);
        kvw_retriever *all = NULL, *one = NULL;
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &all));
        assert_ok(kvw_retriever_open(seq, 0, 1, &one));
        for (uint32_t t = 0; t < CHUNKS; t++) {
            check_formula(&c, all, t, KVW_ALL_HEADS, stick);
            check_formula(&c, one, t, 1, stick);
            assert_ok(append(&c, seq, t, 1));
        }
        kvw_retriever_close(one); /* the other one ends with its sequence */
        kvw_seq_destroy(seq);
        rig_close(&c.r);
    }
}

/* ---- with a store ---- */

/* Outputs of two groups at every chunk from `from` on, turn by turn; the second group's query is
 * made of the first one's output. */
static void converse(chunk_rig *c, kvw_seq *seq, uint32_t from, float *out)
{
    kvw_retriever *group[GROUPS];
    float *q = rig_bytes(&c->r, c->r.q, rig_q_width(&c->r), 0, 0, CHUNKS);
    for (size_t g = 0; g < GROUPS; g++)
        assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &group[g]));
    for (uint32_t t = from; t < CHUNKS; t++) {
        float query[DIM];
        memcpy(query, c->queries[t], sizeof(query));
        for (size_t g = 0; g < GROUPS; g++, out += 64) {
            assert_ok(kvw_retrieve(group[g], query, t));
            assert_ok(kvw_retriever_attend(group[g], q + (size_t)t * 64, 1, out));
            for (size_t i = 0; i < DIM; i++)
                query[i] = out[i] * 5;
        }
        assert_ok(append(c, seq, t, 1));
        if (t % 8 == 7) /* how much has left the worker does not depend on the put thread */
            assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    }
    free(q);
}

static void offloaded_equals_resident(void **state)
{
    bench *b = *state;
    static float out[3][CHUNKS * GROUPS * 64];
    kvw_stats s[3];
    kvw_worker *stored = NULL, *alone = NULL;
    chunk_rig c;
    uint32_t reused = 0;

    open_rig(&c, "gca", KVK_F32, b->client);
    stored = c.r.worker;
    c.r.opts.client = NULL;
    assert_ok(kvw_open(&c.r.opts, &alone));
    for (size_t i = 0; i < 3; i++) { /* alone; cold; over what the cold run has put */
        c.r.worker = i == 0 ? alone : stored;
        kvw_seq *seq = create(&c, i == 2 ? CHUNKS : 0, &reused);
        assert_int_equal(reused, i == 2 ? (CHUNKS - 1) * S : 0);
        converse(&c, seq, reused / S, out[i] + (size_t)(reused / S) * GROUPS * 64);
        assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
        s[i] = stats_of(seq);
        kvw_seq_destroy(seq);
    }
    assert_memory_equal(out[0], out[1], sizeof(out[0]));
    assert_memory_equal(out[0] + (CHUNKS - 1) * GROUPS * 64, out[2] + (CHUNKS - 1) * GROUPS * 64,
                        GROUPS * 64 * sizeof(float));
    assert_int_equal(s[0].misses, 0);
    assert_true(s[1].misses > 10 * S && s[1].misses % S == 0);
    assert_int_equal(s[1].bytes_fetched, s[1].misses * 256);
    assert_int_equal(s[1].hits + s[1].misses, s[1].picks);
    assert_int_equal(s[0].bytes_index, CHUNKS * DIM * sizeof(float));
    assert_int_equal(s[2].bytes_index, s[0].bytes_index);
    assert_int_equal(s[2].index_rows_rebuilt, 0);
    assert_int_equal(s[1].bytes_residency, GROUPS * K * S * 256);
    kvw_close(alone);
    c.r.worker = stored;
    rig_close(&c.r);
}

/* The same conversation over any number of real servers; and over what it has put there. */
static void sharded_equals_unsharded(void **state)
{
    static const uint32_t counts[] = {0, 1, 2, 3, SERVERS};
    static float out[5][CHUNKS * GROUPS * 64], warm[CHUNKS * GROUPS * 64];
    const size_t last = (CHUNKS - 1) * GROUPS * 64;
    servers s;
    chunk_rig c;
    (void)state;
    servers_start(&s, SERVERS);
    open_rig(&c, "gca", KVK_F32, NULL);
    for (size_t i = 0; i < 5; i++) {
        uint32_t reused = 0, asked = 0;
        char revision[16];
        kvw_close(c.r.worker);
        (void)snprintf(revision, sizeof(revision), "%u", counts[i]);
        c.r.opts.revision = revision; /* no blocks of other runs */
        servers_use(&s, &c.r, counts[i]);
        c.r.opts.server_names = NULL;
        if (counts[i] != 0)
            rig_name_servers(&c.r);
        assert_ok(kvw_open(&c.r.opts, &c.r.worker));
        kvw_seq *seq = create(&c, CHUNKS, &reused);
        assert_int_equal(reused, 0);
        converse(&c, seq, 0, out[i]);
        assert_memory_equal(out[0], out[i], sizeof(out[0]));
        for (uint32_t j = 0; j < counts[i]; j++) {
            kvw_server_stats own = server_stats_of(seq, j);
            assert_int_equal(own.rows % S, 0);
            asked += own.requests != 0;
        }
        assert_true(asked >= (counts[i] < 2 ? counts[i] : 2));
        assert_int_equal(stats_of(seq).misses, counts[i] == 0 ? 0 : stats_of(seq).rows_dram);
        kvw_seq_destroy(seq);
        if (counts[i] == 0)
            continue;
        seq = create(&c, CHUNKS, &reused);
        assert_int_equal(reused, (CHUNKS - 1) * S);
        converse(&c, seq, CHUNKS - 1, warm + last);
        assert_memory_equal(out[0] + last, warm + last, sizeof(warm) - last * sizeof(float));
        kvw_seq_destroy(seq);
    }
    rig_close(&c.r);
    servers_stop(&s);
}

/* Landmarks are not made of keys: without them nothing is reused. */
static void lost_landmarks_mean_a_cold_start(void **state)
{
    bench *b = *state;
    chunk_rig c;
    uint32_t reused = 0;
    open_rig(&c, "gca", KVK_F32, b->client);
    kvw_seq *seq = create(&c, 0, &reused);
    for (uint32_t t = 0; t < CHUNKS; t++)
        assert_ok(append(&c, seq, t, 1));
    assert_ok(kvw_flush(seq, kvc_deadline_ns(60000000000ull)));
    kvw_seq_destroy(seq);
    store_forget(&b->store, true);
    kvw_seq_destroy(create(&c, CHUNKS, &reused));
    assert_int_equal(reused, 0);
    rig_close(&c.r);
}

static void chunks_that_are_chosen_again_stay(void **state)
{
    bench *b = *state;
    chunk_rig c;
    kvw_retriever *x = NULL;
    float q[64] = {1}, out[2][64];
    open_rig(&c, "gca", KVK_F32, b->client);
    kvw_seq *seq = offloaded(&c);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    for (size_t i = 0; i < 2; i++) {
        assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
        assert_ok(kvw_retriever_attend(x, q, 1, out[i]));
        assert_int_equal(stats_of(seq).misses, K * S);
    }
    assert_memory_equal(out[0], out[1], sizeof(out[0]));
    /* one that nobody waited for has to be asked for again */
    assert_ok(kvw_retrieve(x, c.queries[2], CHUNKS - 2));
    uint64_t asked = stats_of(seq).misses;
    assert_true(asked > K * S);
    assert_ok(kvw_retrieve(x, c.queries[2], CHUNKS - 2));
    assert_int_equal(stats_of(seq).misses, 2 * asked - K * S);
    kvw_retriever_close(x);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

static void rows_that_do_not_arrive_are_an_error(void **state)
{
    bench *b = *state;
    chunk_rig c;
    kvw_retriever *x = NULL;
    float q[64] = {1}, out[2][64];
    open_rig(&c, "gca", KVK_F32, b->client);
    kvw_seq *seq = offloaded(&c);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    store_set(&b->store, &(store_faults){.lose_every = S}); /* the first row of each chunk */
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    assert_status(kvw_retriever_attend(x, q, 1, out[0]), KVC_NOT_FOUND);
    assert_status(kvw_retriever_attend(x, q, 1, out[0]), KVC_INVALID);
    store_set(&b->store, &(store_faults){0});
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    assert_ok(kvw_retriever_attend(x, q, 1, out[0]));
    assert_ok(kvw_retrieve(x, c.queries[9], CHUNKS - 2));
    assert_ok(kvw_retriever_attend(x, q, 1, out[1]));
    assert_memory_equal(out[0], out[1], sizeof(out[0]));
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

/* ---- edges ---- */

/* A chunk that was taken back is not the one that comes in its place. */
static void a_truncated_chunk_is_forgotten(void **state)
{
    chunk_rig c;
    kvw_retriever *kept = NULL, *fresh = NULL;
    uint32_t reused = 0;
    float q[64] = {1}, out[3][64];
    (void)state;
    open_rig(&c, "gca", KVK_F32, NULL);
    kvw_seq *seq = create(&c, 0, &reused);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &kept));
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &fresh));
    assert_ok(append(&c, seq, 0, 1));
    assert_ok(append(&c, seq, 1, 1));
    assert_ok(kvw_retrieve(kept, c.queries[2], 2));
    assert_ok(kvw_retriever_attend(kept, q, 1, out[0]));
    assert_status(kvw_truncate(seq, S + 1), KVC_INVALID);
    assert_ok(kvw_truncate(seq, S));
    assert_status(kvw_retriever_attend(kept, q, 1, out[0]), KVC_INVALID);
    assert_status(kvw_retrieve(kept, c.queries[2], 2), KVC_INVALID);
    for (size_t i = 0; i < (size_t)S * rig_kv_width(&c.r); i++)
        c.r.v[(size_t)S * rig_kv_width(&c.r) + i] *= -2;
    assert_ok(append(&c, seq, 1, 1));
    assert_ok(kvw_retrieve(kept, c.queries[2], 2));
    assert_ok(kvw_retriever_attend(kept, q, 1, out[1]));
    assert_ok(kvw_retrieve(fresh, c.queries[2], 2));
    assert_ok(kvw_retriever_attend(fresh, q, 1, out[2]));
    assert_memory_equal(out[1], out[2], sizeof(out[1]));
    assert_memory_not_equal(out[0], out[1], sizeof(out[0]));
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

static void what_has_no_meaning_is_refused(void **state)
{
    chunk_rig c;
    kvw_retriever *x = NULL;
    kvw_step *step = NULL;
    uint32_t reused = 0;
    float data[S * 64] = {0}, bad[DIM] = {0};
    (void)state;
    open_rig(&c, "gca", KVK_F32, NULL);
    kvw_seq *seq = create(&c, 0, &reused);
    bad[3] = NAN;
    assert_status(kvw_tokens(seq, c.r.tokens, S - 1), KVC_INVALID);
    assert_ok(kvw_tokens(seq, c.r.tokens, S));
    assert_status(kvw_append(seq, 0, data, data, S), KVC_INVALID);
    assert_status(kvw_append_chunks(seq, 0, data, data, bad, S), KVC_INVALID);
    assert_status(kvw_append_chunks(seq, 0, data, data, c.marks[0], S - 1), KVC_INVALID);
    assert_status(kvw_append_chunks(seq, 0, data, data, NULL, S), KVC_INVALID);
    assert_ok(kvw_append_chunks(seq, 0, data, data, c.marks[0], S));
    assert_status(kvw_step_begin(seq, 0, data, 1, &step), KVC_INVALID);
    assert_status(kvw_retriever_open(seq, 1, KVW_ALL_HEADS, &x), KVC_INVALID);
    assert_status(kvw_retriever_open(seq, 0, 2, &x), KVC_INVALID);
    assert_null(x);
    assert_ok(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x));
    assert_status(kvw_retriever_attend(x, data, 1, data), KVC_INVALID);
    assert_status(kvw_retrieve(x, c.queries[0], 2), KVC_INVALID);
    assert_status(kvw_retrieve(x, bad, 1), KVC_INVALID);
    assert_ok(kvw_retrieve(x, c.queries[0], 0));
    data[0] = 7;
    assert_ok(kvw_retriever_attend(x, data, 1, data));
    assert_true(data[0] == 0);
    assert_status(kvw_retriever_attend(x, data, 0, data), KVC_INVALID);
    kvw_seq_destroy(seq);
    rig_close(&c.r);
}

static void options_are_checked(void **state)
{
    chunk_rig c;
    kvw_worker *worker = NULL;
    kvw_retriever *x = NULL;
    float mark[16] = {0};
    (void)state;
    open_rig(&c, "hsa", KVK_F32, NULL);
    kvw_opts bad[] = {c.r.opts, c.r.opts, c.r.opts, c.r.opts,
                      c.r.opts, c.r.opts, c.r.opts, c.r.opts};
    bad[0].landmark_dim = 0;
    bad[1].landmark_dim = 24;
    bad[2].rope.theta = 10000;
    bad[3].block_tokens = 96;
    bad[4].k = KVK_CHUNKS_MAX + 1;
    bad[5].policy = KVW_DROP;
    bad[6].selector = "esa";
    bad[7].retrieval_queries = UINT64_MAX;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_status(kvw_open(&bad[i], &worker), KVC_INVALID);
    rig_close(&c.r);
    rig r;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    rig_init(&r, "tokenselect", S);
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    assert_status(kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &x), KVC_INVALID);
    assert_status(kvw_append_chunks(seq, 0, mark, mark, mark, S), KVC_INVALID);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(retrieval_is_the_formula),
        cmocka_unit_test(sharded_equals_unsharded),
        cmocka_unit_test_setup_teardown(offloaded_equals_resident, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(lost_landmarks_mean_a_cold_start, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(chunks_that_are_chosen_again_stay, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(rows_that_do_not_arrive_are_an_error, bench_open,
                                        bench_close),
        cmocka_unit_test(a_truncated_chunk_is_forgotten),
        cmocka_unit_test(what_has_no_meaning_is_refused),
        cmocka_unit_test(options_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
