/*
 * ways_core.c: one core attends over 2,048 random rows of 4 KiB (Llama-3-8B's heads), beside the
 * same core reading such rows, in memory that is asked for as the dram tier asks for its own (huge
 * pages, where the system gives them) and on pages of 4 KiB. See ways_rig.h.
 *
 * CPU time of the thread: what else the machine does is not this core's.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "bench.h"
#include "kvk/compute.h"
#include "ways_rig.h"

enum { Q_HEADS = 32, KV_HEADS = 8, DIM = 128, ROW = 2 * KV_HEADS * DIM * 2, ROWS = 2048 };

typedef struct ways_core {
    const uint8_t *values;
    uint32_t n_tokens;
    kvk_backend *be;
    const void *rows[ROWS];
    int32_t positions[ROWS];
    double freq[DIM / 2];
    float q[Q_HEADS * DIM], o[Q_HEADS * DIM], lse[Q_HEADS];
    uint64_t random, sink;
} core;

/* Not inlined, so that the sum is not left out. */
__attribute__((noinline)) static uint64_t read_rows(const void *const *rows)
{
    uint64_t sum[8] = {0};
    for (uint32_t i = 0; i < ROWS; i++) {
        const uint64_t *at = rows[i];
        for (uint32_t j = 0; j < ROW / 8; j += 8)
            for (uint32_t k = 0; k < 8; k++)
                sum[k] += at[j + k];
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

static uint64_t core_ns(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Rows of their own each time: nobody finds them in a cache. */
static void choose(core *c)
{
    for (uint32_t i = 0; i < ROWS; i++) {
        uint64_t row = ((uint64_t)i * c->n_tokens + bench_random(&c->random) % c->n_tokens) / ROWS;
        c->rows[i] = c->values + row * ROW;
        c->positions[i] = (int32_t)i;
    }
}

static void attend(core *c, uint32_t n, bool rotated)
{
    const kvk_attend_args args = {.q = c->q,
                                  .n_q = 1,
                                  .n_q_heads = Q_HEADS,
                                  .n_kv_heads = KV_HEADS,
                                  .head_dim = DIM,
                                  .rows = c->rows,
                                  .n_kv = n,
                                  .v_off_bytes = ROW / 2,
                                  .dtype = KVK_BF16,
                                  .k_positions = rotated ? c->positions : NULL,
                                  .inv_freq = rotated ? c->freq : NULL,
                                  .scale = 1 / sqrtf(DIM),
                                  .o = c->o,
                                  .lse = c->lse};
    if (kvk_backend_ops(c->be)->attend(c->be, &args, NULL) != KVC_OK)
        bench_die("attend");
}

static uint64_t turn(core *c, bool attends, bool rotated)
{
    choose(c);
    uint64_t start = core_ns();
    if (attends)
        attend(c, ROWS, rotated);
    else
        c->sink += read_rows(c->rows);
    return core_ns() - start;
}

void ways_core_attend(ways_core *c, const uint8_t *rows, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        c->rows[i] = rows + (size_t)i * ROW;
    attend(c, n, false);
}

static void compare(core *c, const char *pages, bool rotated, uint32_t n_runs)
{
    bench_series read = {0}, attend = {0}, share = {0};
    for (uint32_t run = 0; run <= n_runs; run++) {
        double read_ns = (double)turn(c, false, rotated);
        double attend_ns = (double)turn(c, true, rotated);
        if (run == 0)
            continue;
        bench_add(&read, (double)ROWS * ROW / read_ns);
        bench_add(&attend, (double)ROWS * ROW / attend_ns);
        bench_add(&share, read_ns / attend_ns);
    }
    (void)printf("one core (%s), %s pages%s: reads rows of 4 KiB at %.1f GB/s, attends to %.1f "
                 "GB/s (2,048 rows in %.0f us); share %.2f\n",
                 kvk_backend_isa(c->be), pages, rotated ? ", keys rotated" : "",
                 bench_median(&read), bench_median(&attend),
                 (double)ROWS * ROW / bench_median(&attend) / 1e3, bench_median(&share));
}

static void on_pages(core *c, size_t bytes, bool huge, uint32_t n_runs)
{
    uint16_t *values = aligned_alloc((size_t)2 << 20, bytes);
    if (values == NULL)
        bench_die("memory");
    (void)madvise(values, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (size_t i = 0; i < (size_t)1 << 19; i++) {
        float x = (float)(bench_random(&c->random) % 2048) / 1024.0F - 1.0F;
        kvk_from_f32(&x, 1, KVK_BF16, values + i);
    }
    for (size_t i = 1; i < bytes >> 20; i++) /* the same numbers in memory of their own */
        memcpy(values + (i << 19), values, (size_t)1 << 20);
    c->values = (const uint8_t *)values;
    compare(c, huge ? "huge" : "small", false, n_runs);
    compare(c, huge ? "huge" : "small", true, n_runs);
    free(values);
}

ways_core *ways_core_open(void)
{
    const kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};
    core *c = calloc(1, sizeof(*c));
    if (c == NULL || kvk_backend_open("cpu", &opts, &c->be) != KVC_OK ||
        kvk_rope_inv_freq(&(kvk_rope_params){.theta = 500000}, DIM, c->freq) != KVC_OK)
        bench_die("the backend");
    c->random = 1;
    for (uint32_t i = 0; i < Q_HEADS * DIM; i++)
        c->q[i] = (float)(bench_random(&c->random) % 2048) / 1024.0F - 1.0F;
    return c;
}

void ways_core_close(ways_core *c)
{
    volatile uint64_t sink = c->sink; /* read, or the rows need not have been */
    (void)sink;
    kvk_backend_close(c->be);
    free(c);
}

void ways_core_compare(ways_core *c, uint32_t n_mib, uint32_t n_runs)
{
    c->n_tokens = n_mib * 256;
    on_pages(c, (size_t)n_mib << 20, true, n_runs);
    on_pages(c, (size_t)n_mib << 20, false, n_runs);
}
