/*
 * worker_fake_maps_test.c: several sequences' steps as one, and steps of other queries than
 * selected, while the server's memory goes away under them; and whose stream and memory they use.
 * Over a fake device.
 */
#include "bench.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "oracle.h"

#include "base/clock.h"
#include "device/state.h"
#include "internal.h"

#define PREFILL 576u

enum { PAIR = 2, HEADS = 4 };

/* Two sequences of one batch, alike in all. */
typedef struct pair {
    rig r;
    kvw_seq *seq[PAIR];
    kvw_batch *batch;
    uint32_t at, n_taken;
    bool takes, fails; /* at the next launch: the maps go; copies fail from then on */
} pair;

static void take_maps(void *arg)
{
    pair *p = arg;
    if (!p->takes)
        return;
    for (uint32_t i = 0; i < PAIR; i++)
        kvc_context_unmap(p->seq[i]->servers[0].context);
    p->takes = false;
    p->n_taken++;
    if (p->fails)
        fake_cuda_copies(0);
}

static void open_pair(pair *p, kvc_client *client, uint32_t device_memory)
{
    memset(p, 0, sizeof(*p));
    fake_rig(&p->r, client);
    p->r.opts.device_memory = device_memory;
    rig_open(&p->r);
    assert_int_equal(p->r.opts.n_q_heads, HEADS);
    for (uint32_t i = 0; i < PAIR; i++) {
        uint32_t reused = 0;
        assert_ok(kvw_seq_create(p->r.worker, NULL, 0, &p->seq[i], &reused));
        rig_prefill(&p->r, p->seq[i], 0, PREFILL, NULL, NULL);
        assert_ok(kvw_flush(p->seq[i], kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    }
    assert_ok(kvw_batch_open(p->r.worker, PAIR, NULL, &p->batch));
    p->at = PREFILL;
}

static void close_pair(pair *p)
{
    for (uint32_t i = 0; i < PAIR; i++)
        kvw_seq_destroy(p->seq[i]);
    kvw_batch_close(p->batch);
    rig_close(&p->r);
}

/* The position's data, once for each sequence. */
static uint8_t *twice(const pair *p, const double *array, uint32_t width, uint32_t layer)
{
    uint8_t *both = malloc((size_t)PAIR * width * 2u);
    void *one = rig_bytes(&p->r, array, width, layer, p->at, 1);
    assert_non_null(both);
    for (uint32_t i = 0; i < PAIR; i++)
        memcpy(both + (size_t)i * width * 2u, one, width * 2u);
    free(one);
    return both;
}

/* A layer's step; the result takes the place of the queries, which are q. */
static kvc_status forward(const pair *p, uint32_t layer, uint8_t *q, float *lse)
{
    uint8_t *k = twice(p, p->r.k, rig_kv_width(&p->r), layer);
    uint8_t *v = twice(p, p->r.v, rig_kv_width(&p->r), layer);
    kvc_status st = kvw_batch_forward(p->batch, p->seq, PAIR, layer, q, k, v, q, lse);
    free(k);
    free(v);
    return st;
}

static void check(const pair *p, uint32_t i, uint32_t layer, const void *out, const float *lse)
{
    uint32_t dims = FAKE_DIMS;
    const rig_step done = {
        .seq = p->seq[i], .layer = layer, .first = p->at, .n = 1, .out = out, .lse = lse};
    oracle_check_step(&dims, &p->r, &done);
}

static void begin_pass(const pair *p)
{
    for (uint32_t i = 0; i < PAIR; i++)
        assert_ok(kvw_tokens(p->seq[i], p->r.tokens + p->at, 1));
}

/* All members are stepped again, with the queries they came with. */
static void a_map_may_go_under_a_batch(void **state)
{
    served *s = *state;
    for (uint32_t device_memory = 0; device_memory < 2; device_memory++) {
        pair p;
        float lse[PAIR * HEADS];
        open_pair(&p, s->client, device_memory);
        size_t row = rig_q_width(&p.r) * 2u;
        fake_cuda_before_launch(take_maps, &p);
        for (; p.at < PREFILL + 6u; p.at++) {
            begin_pass(&p);
            for (uint32_t layer = 0; layer < 2; layer++) {
                uint64_t read = fake_cuda_rows_read(), misses = stats_of(p.seq[0]).misses;
                uint8_t *q = twice(&p, p.r.q, rig_q_width(&p.r), layer);
                p.takes = p.at == PREFILL;
                assert_ok(forward(&p, layer, q, lse));
                for (uint32_t i = 0; i < PAIR; i++)
                    check(&p, i, layer, q + i * row, lse + (size_t)i * HEADS);
                /* what was read under the map, by both, and then again */
                misses = stats_of(p.seq[0]).misses - misses;
                if (layer == 0 && p.at == PREFILL)
                    assert_true(misses > 0 && fake_cuda_rows_read() - read == 4u * misses);
                free(q);
            }
        }
        fake_cuda_before_launch(NULL, NULL);
        assert_int_equal(p.n_taken, 2);
        close_pair(&p);
    }
}

/* The first member cannot be stepped again: what the other one read does not count either. */
static void a_member_that_fails_hides_no_other(void **state)
{
    served *s = *state;
    pair p;
    float lse[PAIR * HEADS];
    open_pair(&p, s->client, 1);
    uint8_t *q = twice(&p, p.r.q, rig_q_width(&p.r), 0);
    uint64_t read = fake_cuda_rows_read();
    begin_pass(&p);
    p.takes = p.fails = true;
    fake_cuda_before_launch(take_maps, &p);
    assert_int_equal(forward(&p, 0, q, lse), KVC_DEVICE);
    fake_cuda_before_launch(NULL, NULL);
    fake_cuda_copies(UINT32_MAX);
    assert_int_equal(p.n_taken, 1);
    read = fake_cuda_rows_read() - read;
    assert_true(read > 0);
    free(q);
    for (uint32_t i = 0; i < PAIR; i++) { /* alone, with its token */
        kvw_step *step = NULL;
        uint64_t misses = stats_of(p.seq[i]).misses;
        void *one = rig_bytes(&p.r, p.r.q, rig_q_width(&p.r), 0, p.at, 1);
        assert_ok(kvw_step_begin(p.seq[i], 0, one, 1, &step));
        assert_ok(kvw_step_finish(step, one, one, lse));
        check(&p, i, 0, one, lse);
        assert_int_equal(PAIR * (stats_of(p.seq[i]).misses - misses), read);
        free(one);
    }
    close_pair(&p);
}

/* ---- a chunk ---- */

typedef struct chunk_run {
    kvw_seq *seq;
    bool takes;
    uint32_t n_taken, n;
    uint32_t picks[64];
} chunk_run;

static void take_chunks_map(void *arg)
{
    chunk_run *c = arg;
    if (c->takes && c->n_taken == 0) {
        kvc_context_unmap(c->seq->servers[0].context);
        c->n_taken++;
    }
}

/* What a pass of 4 tokens picks whose step begins with the queries of position `from` on. */
static void run_chunk(chunk_run *c, kvc_client *client, uint32_t from)
{
    rig r;
    uint32_t reused = 0, n = 0;
    const uint32_t *picks = NULL;
    kvw_step *step = NULL;
    fake_rig(&r, client);
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &c->seq, &reused));
    rig_prefill(&r, c->seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(c->seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, PREFILL, 4);
    void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, PREFILL, 4);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, PREFILL, 4);
    void *other = rig_bytes(&r, r.q, rig_q_width(&r), 0, from, 4);
    assert_ok(kvw_tokens(c->seq, r.tokens + PREFILL, 4));
    assert_ok(kvw_append(c->seq, 0, k, v, 4));
    assert_ok(kvw_step_begin(c->seq, 0, other, 4, &step));
    fake_cuda_before_launch(take_chunks_map, c);
    assert_ok(kvw_step_finish(step, q, q, NULL));
    fake_cuda_before_launch(NULL, NULL);
    assert_ok(kvw_last_picks(c->seq, 0, &picks, &n));
    assert_true(n > 0 && n <= 64);
    memcpy(c->picks, picks, n * sizeof(*picks));
    c->n = n;
    free(k);
    free(v);
    free(q);
    free(other);
    kvw_seq_destroy(c->seq);
    rig_close(&r);
}

/* A chunk that is done again attends what its first queries picked. */
static void a_foretold_chunk_keeps_its_picks(void **state)
{
    served *s = *state;
    chunk_run still = {0}, gone = {.takes = true}, real = {0};
    run_chunk(&still, s->client, PREFILL - 64u);
    run_chunk(&gone, s->client, PREFILL - 64u);
    run_chunk(&real, s->client, PREFILL);
    assert_int_equal(gone.n_taken, 1);
    assert_int_equal(still.n, gone.n);
    assert_memory_equal(still.picks, gone.picks, still.n * sizeof(still.picks[0]));
    assert_true(memcmp(still.picks, real.picks, still.n * sizeof(still.picks[0])) != 0);
}

/* ---- the engine's memory is the device's ---- */

/* k and v are made on the batch's stream: nothing of a batch's call is on a sequence's own. */
static void a_batch_has_one_stream(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    kvw_batch *batch = NULL;
    kvk_stream *own = fake_cuda_stream(), *engine = fake_cuda_stream();
    const kvw_seq_opts opts = {.size_bytes = sizeof(opts), .stream = own};
    fake_rig(&r, NULL);
    r.opts.device_memory = 1;
    rig_open(&r);
    assert_ok(kvw_seq_open(r.worker, &opts, &seq, &reused));
    assert_ok(kvw_batch_open(r.worker, 1, engine, &batch));
    rig_prefill(&r, seq, 0, 20, NULL, NULL);
    assert_ok(kvw_tokens(seq, r.tokens + 20, 1));
    uint64_t before = fake_cuda_enqueued(own), there = fake_cuda_enqueued(engine);
    void *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, 20, 1);
    void *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, 20, 1);
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, 20, 1);
    assert_ok(kvw_batch_forward(batch, &seq, 1, 0, q, k, v, q, NULL)); /* it attends everything */
    assert_int_equal(fake_cuda_enqueued(own), before);
    assert_true(fake_cuda_enqueued(engine) > there);
    free(k);
    free(v);
    free(q);
    kvw_seq_destroy(seq);
    kvw_batch_close(batch);
    rig_close(&r);
    fake_cuda_stream_free(own);
    fake_cuda_stream_free(engine);
}

/* ---- graphs ---- */

enum { MOST = 11, KEPT = 8, LENGTH = 160 };

typedef struct crowd {
    rig r;
    kvw_seq *seq[MOST];
    uint32_t at[MOST];
    kvw_batch *batch;
} crowd;

static void *of_first(const crowd *c, const double *array, uint32_t width, uint32_t layer,
                      uint32_t n)
{
    uint8_t *all = calloc(n + 1u, width * 2u);
    assert_non_null(all);
    for (uint32_t i = 0; i < n; i++) {
        void *one = rig_bytes(&c->r, array, width, layer, c->at[i], 1);
        memcpy(all + (size_t)i * width * 2u, one, width * 2u);
        free(one);
    }
    return all;
}

/* A token of the first n. */
static void step_first(crowd *c, uint32_t n)
{
    float lse[MOST * HEADS];
    uint32_t dims = FAKE_DIMS;
    for (uint32_t i = 0; i < n; i++)
        assert_ok(kvw_tokens(c->seq[i], c->r.tokens + c->at[i], 1));
    for (uint32_t layer = 0; layer < 2; layer++) {
        uint8_t *q = of_first(c, c->r.q, rig_q_width(&c->r), layer, n);
        void *k = of_first(c, c->r.k, rig_kv_width(&c->r), layer, n);
        void *v = of_first(c, c->r.v, rig_kv_width(&c->r), layer, n);
        assert_ok(kvw_batch_forward(c->batch, c->seq, n, layer, q, k, v, q, lse));
        const rig_step done = {.seq = c->seq[n - 1u],
                               .layer = layer,
                               .first = c->at[n - 1u],
                               .n = 1,
                               .out = q + (size_t)(n - 1u) * rig_q_width(&c->r) * 2u,
                               .lse = lse + (size_t)(n - 1u) * HEADS};
        oracle_check_step(&dims, &c->r, &done);
        free(q);
        free(k);
        free(v);
    }
    for (uint32_t i = 0; i < n; i++)
        c->at[i]++;
}

/* A batch keeps the graphs of the sizes that came last, and makes the others again. */
static void a_batch_keeps_few_graphs(void **state)
{
    (void)state;
    crowd c = {0};
    uint32_t reused = 0, before = fake_cuda_graphs();
    fake_rig(&c.r, NULL);
    rig_open(&c.r);
    assert_int_equal(c.r.opts.n_q_heads, HEADS);
    for (uint32_t i = 0; i < MOST; i++) {
        assert_ok(kvw_seq_create(c.r.worker, NULL, 0, &c.seq[i], &reused));
        rig_prefill(&c.r, c.seq[i], 0, LENGTH, NULL, NULL);
        rig_decode(&c.r, c.seq[i], LENGTH, LENGTH + 1u, NULL, NULL); /* it has its own now */
        c.at[i] = LENGTH + 1u;
    }
    assert_ok(kvw_batch_open(c.r.worker, MOST, NULL, &c.batch));
    uint32_t own = fake_cuda_graphs();
    for (uint32_t n = 1; n <= MOST; n++) {
        step_first(&c, n);
        assert_int_equal(fake_cuda_graphs() - own, 2u * (n < KEPT ? n : KEPT));
    }
    step_first(&c, 5); /* there still */
    step_first(&c, 1); /* made again, in place of 4 */
    step_first(&c, 4);
    assert_int_equal(fake_cuda_graphs() - own, 2u * KEPT);
    for (uint32_t i = 0; i < MOST; i++)
        kvw_seq_destroy(c.seq[i]);
    kvw_batch_close(c.batch);
    rig_close(&c.r);
    assert_int_equal(fake_cuda_graphs(), before);
}

/* A step's end does not say that what was appended behind it has come to the host. */
static void a_step_settles_what_was_before_it(void **state)
{
    (void)state;
    rig r;
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    kvw_step *step = NULL;
    void *k[2], *v[2];
    fake_rig(&r, NULL);
    r.opts.device_memory = 1;
    rig_open(&r);
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
    const kvwi_device_seq *d = seq->device;
    assert_ok(kvw_tokens(seq, r.tokens + PREFILL, 1));
    for (uint32_t layer = 0; layer < 2; layer++) {
        k[layer] = rig_bytes(&r, r.k, rig_kv_width(&r), layer, PREFILL, 1);
        v[layer] = rig_bytes(&r, r.v, rig_kv_width(&r), layer, PREFILL, 1);
    }
    void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, PREFILL, 1);
    assert_ok(kvw_append(seq, 0, k[0], v[0], 1));
    assert_ok(kvw_step_begin(seq, 0, q, 1, &step));
    assert_ok(kvw_step_attend(step, q));
    uint64_t before = d->n_writes;
    assert_ok(kvw_append(seq, 1, k[1], v[1], 1));
    assert_true(d->n_writes > before);
    assert_ok(kvw_step_finish(step, q, q, NULL));
    assert_int_equal(d->n_settled, before);
    for (uint32_t layer = 0; layer < 2; layer++) {
        free(k[layer]);
        free(v[layer]);
    }
    free(q);
    kvw_seq_destroy(seq);
    rig_close(&r);
}

/* A pass that the device would fault on is refused, and may come again. */
static void memory_is_aligned(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= 4; n += 3) {
        rig r;
        uint32_t reused = 0;
        kvw_seq *seq = NULL;
        fake_rig(&r, NULL);
        r.opts.device_memory = 1;
        rig_open(&r);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        rig_prefill(&r, seq, 0, PREFILL, NULL, NULL);
        assert_ok(kvw_tokens(seq, r.tokens + PREFILL, n));
        uint8_t *k = rig_bytes(&r, r.k, rig_kv_width(&r), 0, PREFILL, n + 1u);
        uint8_t *v = rig_bytes(&r, r.v, rig_kv_width(&r), 0, PREFILL, n + 1u);
        void *q = rig_bytes(&r, r.q, rig_q_width(&r), 0, PREFILL, n);
        assert_int_equal(kvw_forward(seq, 0, q, k + 2, v, n, q, NULL), KVC_INVALID);
        assert_int_equal(kvw_forward(seq, 0, q, k, v + 8, n, q, NULL), KVC_INVALID);
        assert_non_null(strstr(kvw_last_error(), "16-byte aligned"));
        assert_ok(kvw_forward(seq, 0, q, k, v, n, q, NULL));
        free(k);
        free(v);
        free(q);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_map_may_go_under_a_batch, open_served, close_served),
        cmocka_unit_test_setup_teardown(a_member_that_fails_hides_no_other, open_served,
                                        close_served),
        cmocka_unit_test_setup_teardown(a_foretold_chunk_keeps_its_picks, open_served,
                                        close_served),
        cmocka_unit_test(a_batch_has_one_stream),
        cmocka_unit_test(a_batch_keeps_few_graphs),
        cmocka_unit_test(a_step_settles_what_was_before_it),
        cmocka_unit_test(memory_is_aligned),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
