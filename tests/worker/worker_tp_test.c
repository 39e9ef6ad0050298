/*
 * worker_tp_test.c: tensor parallelism: one to four workers with a share of the heads each, on
 * threads of their own with a real all-reduce between them, against one worker with all heads.
 */
#include "oracle.h"

#include "bench.h"

#include <math.h>
#include <pthread.h>
#include <sys/resource.h>
#include <time.h>

enum { RANKS = 2, MAX_RANKS = 4, Q_HEADS = 24, KV_HEADS = 12, HEAD_DIM = 16 };

/* An all-reduce through shared memory: everybody adds, everybody copies. */
typedef struct meeting {
    pthread_mutex_t lock;
    pthread_barrier_t all;
    float *sum;
    uint32_t cap, n_calls;
    char op[8];
} meeting;

static kvc_status all_reduce(void *arg, const char *op, float *x, uint32_t n)
{
    meeting *m = arg;
    bool first = pthread_barrier_wait(&m->all) == PTHREAD_BARRIER_SERIAL_THREAD;
    if (first) {
        m->n_calls++;
        m->sum = realloc(m->sum, n * sizeof(float));
        for (uint32_t i = 0; i < n; i++)
            m->sum[i] = strcmp(op, "max") == 0 ? -INFINITY : 0;
    }
    (void)pthread_barrier_wait(&m->all);
    pthread_mutex_lock(&m->lock);
    for (uint32_t i = 0; i < n; i++)
        m->sum[i] = strcmp(op, "max") == 0 ? fmaxf(m->sum[i], x[i]) : m->sum[i] + x[i];
    pthread_mutex_unlock(&m->lock);
    (void)pthread_barrier_wait(&m->all);
    memcpy(x, m->sum, n * sizeof(float));
    return KVC_OK;
}

static void meeting_open(meeting *m, uint32_t ranks)
{
    *m = (meeting){.sum = NULL};
    assert_int_equal(pthread_mutex_init(&m->lock, NULL), 0);
    assert_int_equal(pthread_barrier_init(&m->all, NULL, ranks), 0);
}

static void meeting_close(meeting *m)
{
    pthread_mutex_destroy(&m->lock);
    pthread_barrier_destroy(&m->all);
    free(m->sum);
}

/* exact: data of which every sum is exact in f32, in any order; nothing is rotated. */
static void rank_rig(rig *r, const char *selector, kvw_index_kind index, uint32_t rank,
                     uint32_t ranks, bool exact, meeting *m)
{
    rig_init(r, selector, 420);
    r->opts.n_q_heads = Q_HEADS / ranks;
    r->opts.n_kv_heads = KV_HEADS / ranks;
    r->opts.tp_size = ranks;
    r->opts.tp_rank = rank;
    r->opts.all_reduce = m != NULL ? all_reduce : NULL;
    r->opts.all_reduce_arg = m;
    r->opts.index = index;
    r->opts.reselect_cos = strcmp(selector, "tokenselect") == 0 ? 0.05 : 0;
    if (exact) {
        r->grain = 1.0 / 16.0;
        r->opts.rope.theta = 0;
    }
    if (index == KVW_INDEX_RERANKED)
        r->opts.index_dims = 8;
    if (index != KVW_INDEX_EXACT)
        rig_project(r, 16);
}

/* What a run leaves behind to be compared. */
typedef struct trace {
    rig r;
    rig_record record;
    uint32_t picks[420][2][48];
    uint64_t reselects;
} trace;

static void keep_picks(void *arg, const rig *r, const rig_step *step)
{
    trace *t = arg;
    const uint32_t *picks = NULL;
    uint32_t n = 0;
    rig_record_step(&t->record, r, step);
    assert_ok(kvw_last_picks(step->seq, step->layer, &picks, &n));
    if (n != 0)
        memcpy(t->picks[step->first][step->layer], picks, n * sizeof(*picks));
}

static void *run_rank(void *arg)
{
    trace *t = arg;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    kvw_stats stats = {.size_bytes = sizeof(stats)};
    assert_ok(kvw_seq_create(t->r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&t->r, seq, 0, 400, keep_picks, t);
    rig_decode(&t->r, seq, 400, 420, keep_picks, t);
    assert_ok(kvw_seq_stats(seq, &stats));
    t->reselects = stats.reselects;
    kvw_seq_destroy(seq);
    return NULL;
}

static trace *new_trace(const char *selector, kvw_index_kind index, uint32_t rank, uint32_t ranks,
                        bool exact, meeting *m)
{
    trace *t = calloc(1, sizeof(*t));
    assert_non_null(t);
    rank_rig(&t->r, selector, index, rank, ranks, exact, m);
    rig_open(&t->r);
    rig_record_init(&t->record, &t->r);
    return t;
}

static void free_trace(trace *t)
{
    rig_record_fini(&t->record);
    rig_close(&t->r);
    free(t);
}

/* Outputs of one position are those of the rank's heads in the whole. */
static void compare_out(const trace *whole, trace *const *part, uint32_t ranks, uint32_t layer,
                        uint32_t pos)
{
    size_t row = Q_HEADS * HEAD_DIM, share = row / ranks, at = (size_t)layer * 420 + pos;
    const float *w = (const float *)(void *)whole->record.out + at * row;
    for (uint32_t rank = 0; rank < ranks; rank++) {
        const float *p = (const float *)(void *)part[rank]->record.out + at * share;
        for (uint32_t i = 0; i < share; i++)
            assert_true(fabsf(p[i] - w[rank * share + i]) < 1e-5f);
    }
}

static void compare(const trace *whole, trace *const *part, uint32_t ranks, bool exact)
{
    uint32_t steps = 0, same = 0;
    for (uint32_t pos = 0; pos < 420; pos++) {
        for (uint32_t layer = 0; layer < 2; layer++) {
            for (uint32_t rank = 1; rank < ranks; rank++) /* ranks always have the same picks */
                assert_memory_equal(part[0]->picks[pos][layer], part[rank]->picks[pos][layer],
                                    sizeof(part[0]->picks[pos][layer]));
            if (whole->picks[pos][layer][0] == 0)
                continue; /* not a step's first position, or nothing was selected */
            steps++;
            if (memcmp(whole->picks[pos][layer], part[0]->picks[pos][layer],
                       sizeof(whole->picks[pos][layer])) != 0)
                continue;
            same++;
            if (pos >= 400) /* else a chunk's first position stands for it */
                compare_out(whole, part, ranks, layer, pos);
        }
    }
    assert_true(steps > 40);
    if (exact)
        assert_int_equal(same, steps);
    else /* sums in another order may move an int8 step or swap two near ties */
        assert_true(same * 10 >= steps * 9);
}

static void split_heads(const char *selector, kvw_index_kind index, uint32_t ranks, bool exact)
{
    meeting m;
    trace *part[MAX_RANKS];
    pthread_t thread[MAX_RANKS];
    meeting_open(&m, ranks);
    trace *whole = new_trace(selector, index, 0, 1, exact, NULL);
    (void)run_rank(whole);
    for (uint32_t i = 0; i < ranks; i++)
        part[i] = new_trace(selector, index, i, ranks, exact, &m);
    for (uint32_t i = 1; i < ranks; i++)
        assert_memory_equal(kvw_schema_digest(part[0]->r.worker),
                            kvw_schema_digest(part[i]->r.worker), 32);
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, run_rank, part[i]), 0);
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    assert_true(m.n_calls > 10);
    compare(whole, part, ranks, exact);
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(part[i]->reselects, part[0]->reselects);
    if (strcmp(selector, "tokenselect") == 0) {
        assert_int_equal(part[0]->reselects, whole->reselects);
        assert_true(whole->reselects < 2 * 26); /* the Selection Cache has hit */
    }
    free_trace(whole);
    for (uint32_t i = 0; i < ranks; i++)
        free_trace(part[i]);
    meeting_close(&m);
}

static void over_ranks(const char *selector, kvw_index_kind index, bool exact)
{
    for (uint32_t ranks = 1; ranks <= MAX_RANKS; ranks++)
        split_heads(selector, index, ranks, exact);
}

/* Where no sum rounds, splitting changes nothing at all: index, scores and picks are the same. */
static void esa_split_picks_exactly_the_same(void **state)
{
    (void)state;
    over_ranks("esa", KVW_INDEX_COMPRESSED, true);
    over_ranks("esa", KVW_INDEX_RERANKED, true);
    over_ranks("esa", KVW_INDEX_EXACT, true);
}

static void esa_sums_projections(void **state)
{
    (void)state;
    over_ranks("esa", KVW_INDEX_COMPRESSED, false);
    split_heads("esa", KVW_INDEX_RERANKED, 2, false);
}

static void esa_sums_scores_of_exact_keys(void **state)
{
    (void)state;
    split_heads("esa", KVW_INDEX_EXACT, 2, false);
    split_heads("esa", KVW_INDEX_EXACT, 3, false);
}

static void tokenselect_sums_votes(void **state)
{
    (void)state;
    over_ranks("tokenselect", KVW_INDEX_EXACT, false);
    over_ranks("tokenselect", KVW_INDEX_COMPRESSED, false);
    split_heads("tokenselect", KVW_INDEX_RERANKED, 2, false);
}

/* ---- groups that do not fit together ---- */

typedef struct misfit {
    rig r;
    kvc_status st;
    char why[256];
} misfit;

static void *open_misfit(void *arg)
{
    misfit *m = arg;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    m->st = kvw_seq_create(m->r.worker, NULL, 0, &seq, &reused);
    (void)snprintf(m->why, sizeof(m->why), "%s", kvw_last_error());
    kvw_seq_destroy(seq);
    return NULL;
}

static void refuse_group(misfit *rank, uint32_t ranks, const char *why)
{
    pthread_t thread[MAX_RANKS];
    for (uint32_t i = 0; i < ranks; i++)
        rig_open(&rank[i].r);
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, open_misfit, &rank[i]), 0);
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    for (uint32_t i = 0; i < ranks; i++) {
        assert_int_equal(rank[i].st, KVC_INVALID);
        assert_non_null(strstr(rank[i].why, why));
        rig_close(&rank[i].r);
    }
}

/* One rank of three with twice the others' heads; and one that was opened with another k. */
static void ranks_must_be_alike(void **state)
{
    (void)state;
    for (int heads = 0; heads < 2; heads++) {
        meeting m;
        misfit rank[3];
        meeting_open(&m, 3);
        for (uint32_t i = 0; i < 3; i++) {
            rank_rig(&rank[i].r, "tokenselect", KVW_INDEX_EXACT, i, 3, false, &m);
            if (heads && i == 0) {
                rank[i].r.opts.n_kv_heads *= 2;
                rank[i].r.opts.n_q_heads *= 2;
            }
            rank[i].r.opts.k += !heads && i == 2;
        }
        refuse_group(rank, 3, heads ? "heads" : "options");
        meeting_close(&m);
    }
}

/* The same names in another order are the same servers; others are not. */
static void ranks_must_have_the_same_servers(void **state)
{
    static const char *const names[][2] = {{"a", "b"}, {"a", "c"}};
    bench *b = *state;
    kvc_client *clients[] = {b->client, b->client};
    meeting m;
    misfit rank[2];
    meeting_open(&m, 2);
    for (uint32_t i = 0; i < 2; i++) {
        rank_rig(&rank[i].r, "tokenselect", KVW_INDEX_EXACT, i, 2, false, &m);
        rank[i].r.opts.clients = clients;
        rank[i].r.opts.n_clients = 2;
        rank[i].r.opts.server_names = names[i];
    }
    refuse_group(rank, 2, "options");
    meeting_close(&m);
}

/* ---- one rank fails alone ---- */

typedef struct loner {
    rig r;
    bool last; /* the one that fails */
    const char *adapter;
    kvc_status open, append, append_again, begin, begin_again, finish;
    char why[256];
} loner;

/* A pass of one token of which the last rank spoils the key, and then the query. */
static void spoil_a_pass(loner *m, kvw_seq *seq)
{
    rig *r = &m->r;
    kvw_step *step = NULL;
    float *k = rig_bytes(r, r->k, rig_kv_width(r), 0, 320, 1);
    float *q = rig_bytes(r, r->q, rig_q_width(r), 0, 320, 1);
    float kept[2] = {k[3], q[3]};
    assert_ok(kvw_tokens(seq, r->tokens + 320, 1));
    k[3] = m->last ? NAN : kept[0];
    m->append = kvw_append(seq, 0, k, k, 1);
    k[3] = kept[0];
    m->append_again = kvw_append(seq, 0, k, k, 1);
    q[3] = m->last ? INFINITY : kept[1];
    m->begin = kvw_step_begin(seq, 0, q, 1, &step);
    q[3] = kept[1];
    m->begin_again = kvw_step_begin(seq, 0, q, 1, &step);
    m->finish = m->begin_again == KVC_OK ? kvw_step_finish(step, q, q, NULL) : KVC_INVALID;
    free(k);
    free(q);
}

static void *run_loner(void *arg)
{
    loner *m = arg;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    const kvw_seq_opts opts = {
        .size_bytes = sizeof(opts), .tokens = m->r.tokens, .n_tokens = 320, .adapter = m->adapter};
    m->open = kvw_seq_open(m->r.worker, &opts, &seq, &reused);
    (void)snprintf(m->why, sizeof(m->why), "%s", kvw_last_error());
    if (m->open == KVC_OK) {
        rig_prefill(&m->r, seq, 0, 320, NULL, NULL);
        spoil_a_pass(m, seq);
    }
    kvw_seq_destroy(seq);
    return NULL;
}

static void run_loners(loner *rank, uint32_t ranks)
{
    pthread_t thread[MAX_RANKS];
    struct timespec end;
    assert_int_equal(clock_gettime(CLOCK_REALTIME, &end), 0);
    end.tv_sec += 2 * SUPPORT_PATIENCE_S;
    for (uint32_t i = 0; i < ranks; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, run_loner, &rank[i]), 0);
    for (uint32_t i = 0; i < ranks; i++)
        if (pthread_timedjoin_np(thread[i], NULL, &end) != 0)
            fail_msg("rank %u waits for a rank that has failed", i);
}

static void open_loners(loner *rank, const char *selector, kvw_index_kind index, meeting *m)
{
    for (uint32_t i = 0; i < RANKS; i++) {
        rank[i] = (loner){.last = i == RANKS - 1};
        rank_rig(&rank[i].r, selector, index, i, RANKS, false, m);
        rig_fill(&rank[i].r);
    }
}

static void refused_together(loner *rank, kvc_status st, const char *why)
{
    for (uint32_t i = 0; i < RANKS; i++)
        if (rank[i].r.worker == NULL)
            rig_open(&rank[i].r);
    run_loners(rank, RANKS);
    assert_int_equal(rank[0].open, KVC_CANCELLED);
    assert_non_null(strstr(rank[0].why, "another rank"));
    assert_int_equal(rank[1].open, st);
    assert_non_null(strstr(rank[1].why, why));
    for (uint32_t i = 0; i < RANKS; i++)
        rig_close(&rank[i].r);
}

/* Opening: a bad label, no memory for the slab, a store that one rank cannot reach. */
static void a_rank_that_cannot_open_stops_all(void **state)
{
    bench *b = *state;
    loner rank[RANKS];
    meeting m;
    meeting_open(&m, RANKS);
    open_loners(rank, "esa", KVW_INDEX_COMPRESSED, &m);
    rank[1].adapter = "two\nlines";
    refused_together(rank, KVC_INVALID, "adapter");

    struct rlimit was;
    assert_int_equal(getrlimit(RLIMIT_AS, &was), 0);
    open_loners(rank, "tokenselect", KVW_INDEX_EXACT, &m);
    for (uint32_t i = 0; i < RANKS; i++)
        rank[i].r.opts.client = b->client;
    rank[1].r.opts.residency_slots = 1u << 25; /* of 768 bytes in 2 layers: 48 GiB */
    unsigned long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%lu", &pages), 1);
    (void)fclose(f);
    const struct rlimit tight = {.rlim_cur = pages * 4096ul + (8ul << 30),
                                 .rlim_max = was.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_AS, &tight), 0);
    refused_together(rank, KVC_NO_MEMORY, "residency_slots");
    assert_int_equal(setrlimit(RLIMIT_AS, &was), 0);

    store gone;
    store_start(&gone, "inproc://worker-test-gone");
    open_loners(rank, "tokenselect", KVW_INDEX_EXACT, &m);
    rank[0].r.opts.client = b->client;
    const kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                  .uris = "inproc://worker-test-gone",
                                  .default_timeout_ns = 1000000000ull};
    assert_ok(kvc_client_open(&opts, &rank[1].r.opts.client));
    for (uint32_t i = 0; i < RANKS; i++)
        rig_open(&rank[i].r);
    store_stop(&gone);
    kvc_client *client = rank[1].r.opts.client;
    refused_together(rank, KVC_UNAVAILABLE, "match");
    kvc_client_close(client);
    meeting_close(&m);
}

/* A key or a query that one rank refuses; the pass goes on once it is mended. */
static void a_rank_that_refuses_a_pass_stops_all(void **state)
{
    static const char *const selectors[] = {"esa", "tokenselect"};
    (void)state;
    for (int i = 0; i < 4; i++) {
        loner rank[RANKS];
        meeting m;
        meeting_open(&m, RANKS);
        open_loners(rank, selectors[i / 2], i % 2 ? KVW_INDEX_COMPRESSED : KVW_INDEX_EXACT, &m);
        for (uint32_t j = 0; j < RANKS; j++)
            rig_open(&rank[j].r);
        run_loners(rank, RANKS);
        for (uint32_t j = 0; j < RANKS; j++) {
            kvc_status refused = j == 1 ? KVC_INVALID : KVC_CANCELLED;
            assert_ok(rank[j].open);
            assert_int_equal(rank[j].append, refused);
            assert_ok(rank[j].append_again);
            assert_int_equal(rank[j].begin, refused);
            assert_ok(rank[j].begin_again);
            assert_ok(rank[j].finish);
            rig_close(&rank[j].r);
        }
        meeting_close(&m);
    }
}

/* A projection knows how many heads there are in all. */
static void heads_that_do_not_divide_are_refused(void **state)
{
    (void)state;
    rig r;
    rank_rig(&r, "esa", KVW_INDEX_COMPRESSED, 0, 4, false, NULL);
    r.opts.all_reduce = all_reduce;
    r.opts.tp_size = 3; /* 12 heads in the file, 3 here: 9 */
    assert_int_equal(kvw_open(&r.opts, &r.worker), KVC_INVALID);
    assert_non_null(strstr(kvw_last_error(), "n_kv_heads"));
    rig_close(&r);
}

/* ---- a group over a store ---- */

typedef struct member {
    rig r;
    uint32_t reused[3]; /* with all there; rank 1's rows lost; no index */
    bench *b;
    pthread_barrier_t *all;
} member;

static uint32_t reuse_once(member *m)
{
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    assert_ok(kvw_seq_create(m->r.worker, m->r.tokens, 420, &seq, &reused));
    rig_pass(&m->r, seq, reused, 64, NULL, NULL); /* goes wrong where ranks begin apart */
    kvw_seq_destroy(seq);
    return reused;
}

static void *reuse_as_a_member(void *arg)
{
    member *m = arg;
    kvw_seq *seq = NULL;
    uint32_t reused = 0;
    assert_ok(kvw_seq_create(m->r.worker, NULL, 0, &seq, &reused));
    rig_prefill(&m->r, seq, 0, 320, NULL, NULL);
    kvw_seq_destroy(seq);
    for (int i = 0; i < 3; i++) {
        bool first = pthread_barrier_wait(m->all) == PTHREAD_BARRIER_SERIAL_THREAD;
        if (first && i == 1)
            store_set(&m->b->store, &(store_faults){.lose_every = 64, .lose_from_part = 2000});
        if (first && i == 2) {
            store_set(&m->b->store, &(store_faults){0});
            store_forget(&m->b->store, true);
        }
        (void)pthread_barrier_wait(m->all);
        m->reused[i] = reuse_once(m);
    }
    return NULL;
}

/* All ranks go on at one position, also where only one of them lacks rows. */
static void ranks_reuse_the_same_prefix(void **state)
{
    bench *b = *state;
    for (int esa = 0; esa < 2; esa++) {
        meeting m;
        member rank[RANKS];
        pthread_t thread[RANKS];
        pthread_barrier_t all;
        meeting_open(&m, RANKS);
        assert_int_equal(pthread_barrier_init(&all, NULL, RANKS), 0);
        for (uint32_t i = 0; i < RANKS; i++) {
            rank[i] = (member){.b = b, .all = &all};
            rank_rig(&rank[i].r, esa ? "esa" : "tokenselect",
                     esa ? KVW_INDEX_COMPRESSED : KVW_INDEX_EXACT, i, RANKS, false, &m);
            rank[i].r.opts.client = b->client;
            rank[i].r.n_tokens = 448; /* 384 reused and a pass of 64 */
            rig_open(&rank[i].r);
        }
        for (uint32_t i = 0; i < RANKS; i++)
            assert_int_equal(pthread_create(&thread[i], NULL, reuse_as_a_member, &rank[i]), 0);
        for (uint32_t i = 0; i < RANKS; i++)
            assert_int_equal(pthread_join(thread[i], NULL), 0);
        for (uint32_t i = 0; i < RANKS; i++) {
            assert_int_equal(rank[i].reused[0], 320);
            assert_int_equal(rank[i].reused[1], 0);
            assert_int_equal(rank[i].reused[2], esa ? 0 : 384); /* a shared index: not rebuilt */
            rig_close(&rank[i].r);
        }
        meeting_close(&m);
        pthread_barrier_destroy(&all);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(esa_split_picks_exactly_the_same),
        cmocka_unit_test(ranks_must_be_alike),
        cmocka_unit_test_setup_teardown(ranks_must_have_the_same_servers, bench_open, bench_close),
        cmocka_unit_test_setup_teardown(a_rank_that_cannot_open_stops_all, bench_open, bench_close),
        cmocka_unit_test(a_rank_that_refuses_a_pass_stops_all),
        cmocka_unit_test(heads_that_do_not_divide_are_refused),
        cmocka_unit_test(esa_sums_projections),
        cmocka_unit_test(esa_sums_scores_of_exact_keys),
        cmocka_unit_test(tokenselect_sums_votes),
        cmocka_unit_test_setup_teardown(ranks_reuse_the_same_prefix, bench_open, bench_close),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
