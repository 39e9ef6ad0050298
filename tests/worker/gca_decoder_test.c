/*
 * gca_decoder_test.c: the example's GCA decoder on a device against the same on the CPU: logits of
 * a context that was read in passes and answered by rows; and a device that fails at any point.
 *
 * Links with CUDA (SKIPPED where there is no GPU), or with a fake of it (tests/support).
 */
#include "support.h"

#include <math.h>

#include "gca_model.h"
#include "gca_task.h"
#include "kvk/cuda.h"
#ifdef FAKE_CUDA
#include "fake_cuda.h"
#endif

enum { BODY = 6, TAIL = 2, VOCAB = 256, ROWS = TAIL * GCA_CHUNK };

typedef struct run {
    gca_model *model;
    kvw_worker *worker;
    kvw_seq *seq;
    gca_context *context;
} run;

/* Elsewhere than where this was built, the environment says where. */
static const char *weights(void)
{
    const char *path = getenv("KVASIR_GCA_WEIGHTS");
    return path ? path : GCA_WEIGHTS;
}

static void close_run(run *r)
{
    gca_context_close(r->context);
    kvw_seq_destroy(r->seq);
    kvw_close(r->worker);
    gca_model_close(r->model);
}

static kvc_status open_run(run *r, const char *backend)
{
    uint32_t reused = 0;
    kvw_opts opts = {.size_bytes = sizeof(opts), .model = "gca_decoder_test"};
    *r = (run){0};
    kvc_status st = gca_model_open(weights(), backend, &r->model);
    if (st != KVC_OK)
        return st;
    gca_model_opts(r->model, &opts);
    opts.n_threads = 1;
    st = kvw_open(&opts, &r->worker);
    if (st == KVC_OK)
        st = kvw_seq_create(r->worker, NULL, 0, &r->seq, &reused);
    return st == KVC_OK ? gca_context_open(r->model, r->seq, &r->context) : st;
}

/* The body in passes of 4 and 2 chunks, the tail in pieces of rows; logits [ROWS, VOCAB]. */
static kvc_status read_all(run *r, const gca_task *task, float *logits)
{
    static const uint32_t pieces[] = {1, 40, 22, 1};
    uint32_t tokens[4 * GCA_CHUNK];
    kvc_status st = KVC_OK;
    for (uint32_t at = 0; st == KVC_OK && at < BODY; at += 4) {
        uint32_t n = BODY - at < 4 ? BODY - at : 4;
        for (uint32_t i = 0; i < n; i++)
            gca_task_chunk(task, at + i, tokens + i * GCA_CHUNK);
        st = gca_context_body(r->context, tokens, n);
    }
    for (uint32_t t = 0; st == KVC_OK && t < TAIL; t++) {
        gca_task_tail(task, t, tokens);
        gca_task_ask(task, t, (const uint32_t[]){5}, 1, tokens);
        for (uint32_t i = 0, at = 0; st == KVC_OK && i < 4; at += pieces[i++])
            st = gca_context_rows(r->context, tokens + at, pieces[i],
                                  logits + (size_t)(t * GCA_CHUNK + at) * VOCAB);
    }
    return st;
}

static uint32_t largest(const float *logits)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < VOCAB; i++)
        best = logits[i] > logits[best] ? i : best;
    return best;
}

static void the_device_decodes_like_the_cpu(void **state)
{
    static float logits[2][ROWS * VOCAB];
    gca_task task;
    (void)state;
    assert_ok(gca_task_init(&task, 3, BODY, 3, 1));
    for (size_t i = 0; i < 2; i++) {
        run r;
        assert_ok(open_run(&r, i == 0 ? "cpu" : "cuda:0"));
        assert_true(gca_model_pass_chunks(r.model) >= 4);
        assert_ok(read_all(&r, &task, logits[i]));
        close_run(&r);
    }
    double apart = 0;
    for (size_t i = 0; i < (size_t)ROWS * VOCAB; i++)
        apart = fmax(apart, fabs((double)logits[0][i] - (double)logits[1][i]));
    print_message("logits apart by at most %.2g\n", apart);
    assert_true(apart < 1e-3); /* logits are about 10 in size */
    for (size_t i = 0; i < ROWS; i++)
        assert_int_equal(largest(logits[0] + i * VOCAB), largest(logits[1] + i * VOCAB));
}

static void what_is_no_backend_is_refused(void **state)
{
    static const char *const names[] = {"", "cud", "cuda:", "cuda:x", "gpu", "cpux"};
    gca_model *model = NULL;
    (void)state;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        assert_status(gca_model_open(weights(), names[i], &model), KVC_INVALID);
        assert_null(model);
    }
    assert_status(gca_model_open(weights(), "cuda:999", &model), KVC_UNSUPPORTED);
    assert_status(gca_model_open(weights(), "cpu:1", &model), KVC_UNSUPPORTED);
    assert_null(model);
}

#ifdef FAKE_CUDA
static void memory_may_end_anywhere(void **state)
{
    uint32_t n_failed = 0, held = fake_cuda_held();
    kvc_status st = KVC_NO_MEMORY;
    (void)state;
    for (uint32_t n = 0; st != KVC_OK; n += n < 12 ? 1 : 7) {
        run r;
        fake_cuda_allocations(n);
        st = open_run(&r, "cuda");
        fake_cuda_allocations(UINT32_MAX);
        assert_true(st == KVC_OK || st == KVC_NO_MEMORY);
        n_failed += st != KVC_OK;
        close_run(&r);
        assert_int_equal(fake_cuda_held(), held);
    }
    assert_true(n_failed > 8);
}

/* An op or a copy that is refused ends the call that made it. */
static void ops_and_copies_may_fail(void **state)
{
    static float logits[ROWS * VOCAB];
    static const uint32_t counts[] = {0, 1, 7, 20, 60, 90};
    gca_task task;
    (void)state;
    assert_ok(gca_task_init(&task, 3, BODY, 3, 1));
    for (size_t i = 0; i < 2 * sizeof(counts) / sizeof(counts[0]); i++) {
        void (*limit)(uint32_t n) = i % 2 ? fake_cuda_ops : fake_cuda_copies;
        run r;
        assert_ok(open_run(&r, "cuda"));
        limit(counts[i / 2]);
        kvc_status st = read_all(&r, &task, logits);
        limit(UINT32_MAX);
        assert_true(i / 2 >= 4 || st == KVC_DEVICE || st == KVC_UNSUPPORTED);
        close_run(&r);
    }
}
#endif

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_device_decodes_like_the_cpu),
        cmocka_unit_test(what_is_no_backend_is_refused),
#ifdef FAKE_CUDA
        cmocka_unit_test(memory_may_end_anywhere),
        cmocka_unit_test(ops_and_copies_may_fail),
#endif
    };
    kvk_cuda *cuda = NULL;
    if (kvk_cuda_open(0, &cuda) == KVC_UNSUPPORTED) {
        puts("SKIPPED: no GPU");
        return 77;
    }
    kvk_cuda_close(cuda);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
