/*
 * kernels_bench.c: times of the compute ops beside what this machine could do at best.
 *
 * kernels_bench [--quick] [--isa NAME] [--threads N] [--only WORD]
 * Floors, measured in the same run with as many threads: a loop of dependent-free fused
 * multiply-adds and a read of a large buffer. A time is the median of several calls after one that
 * warms up.
 */
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kvk/compute.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define REPEATS     9
#define THREADS_MAX 64

typedef struct options {
    bool quick;
    const char *isa, *only;
    uint32_t threads;
} options;

static options opt;
static kvk_backend *be;
static const kvk_ops *ops;
static double peak_gflops, peak_gbs;
static int failures;

static double clock_s(clockid_t clock)
{
    struct timespec t;
    (void)clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double now_s(void)
{
    return clock_s(CLOCK_MONOTONIC);
}

/* Seconds that the cores worked for this process: not disturbed by other processes. */
static double cpu_s(void)
{
    return clock_s(CLOCK_PROCESS_CPUTIME_ID);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* ---- floors ---- */

#if defined(__x86_64__)
#define SPIN_SUMS 12 /* independent: more than latency times ports */

__attribute__((target("avx512f"))) static float spin_avx512(size_t rounds)
{
    __m512 acc[SPIN_SUMS], a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.999f);
    for (int i = 0; i < SPIN_SUMS; i++)
        acc[i] = _mm512_set1_ps((float)i);
    for (size_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < SPIN_SUMS; i++)
            acc[i] = _mm512_fmadd_ps(acc[i], b, a);
    }
    for (int i = 1; i < SPIN_SUMS; i++)
        acc[0] = _mm512_add_ps(acc[0], acc[i]);
    return _mm512_reduce_add_ps(acc[0]);
}

__attribute__((target("avx2,fma"))) static float spin_avx2(size_t rounds)
{
    __m256 acc[SPIN_SUMS], a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.999f);
    for (int i = 0; i < SPIN_SUMS; i++)
        acc[i] = _mm256_set1_ps((float)i);
    for (size_t r = 0; r < rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < SPIN_SUMS; i++)
            acc[i] = _mm256_fmadd_ps(acc[i], b, a);
    }
    for (int i = 1; i < SPIN_SUMS; i++)
        acc[0] = _mm256_add_ps(acc[0], acc[i]);
    return _mm256_cvtss_f32(acc[0]);
}
#endif

typedef struct floor_job {
    size_t rounds, n;
    const uint64_t *data;
    double flops;
    uint64_t sink;
} floor_job;

static void *spin(void *arg)
{
    floor_job *job = arg;
    float x = 0;
#if defined(__x86_64__)
    bool wide =
        strcmp(kvk_backend_isa(be), "avx512") == 0 || strcmp(kvk_backend_isa(be), "amx") == 0;
    bool half = strcmp(kvk_backend_isa(be), "avx2") == 0;
    if (wide)
        x = spin_avx512(job->rounds);
    else if (half)
        x = spin_avx2(job->rounds);
    job->flops = (double)job->rounds * SPIN_SUMS * (wide ? 32 : half ? 16 : 0);
#endif
    job->sink = x > 0;
    return NULL;
}

static void *read_all(void *arg)
{
    floor_job *job = arg;
    uint64_t s[8] = {0};
    for (size_t i = 0; i + 8 <= job->n; i += 8) {
        for (size_t l = 0; l < 8; l++)
            s[l] += job->data[i + l];
    }
    job->sink = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    return NULL;
}

static double on_threads(void *(*fn)(void *), floor_job *jobs, uint32_t n)
{
    pthread_t threads[THREADS_MAX];
    double start = cpu_s();
    for (uint32_t i = 0; i < n; i++)
        (void)pthread_create(&threads[i], NULL, fn, &jobs[i]);
    for (uint32_t i = 0; i < n; i++)
        (void)pthread_join(threads[i], NULL);
    return (cpu_s() - start) / n;
}

static void measure_floors(void)
{
    size_t bytes = opt.quick ? (size_t)16 << 20 : (size_t)512 << 20;
    uint32_t n = opt.threads;
    floor_job jobs[THREADS_MAX];
    uint64_t *data = malloc(bytes);
    if (!data)
        return;
    memset(data, 1, bytes);
    for (int r = 0; r < 3; r++) {
        double flops = 0, s;
        for (uint32_t i = 0; i < n; i++)
            jobs[i] = (floor_job){.rounds = opt.quick ? 1000000 : 20000000,
                                  .n = bytes / 8 / n,
                                  .data = data + bytes / 8 / n * i};
        s = on_threads(spin, jobs, n);
        for (uint32_t i = 0; i < n; i++)
            flops += jobs[i].flops;
        peak_gflops = fmax(peak_gflops, flops / s * 1e-9);
        peak_gbs = fmax(peak_gbs, (double)bytes / on_threads(read_all, jobs, n) * 1e-9);
    }
    free(data);
    printf("isa %s, %u threads; floors: %.0f GFLOP/s f32 fma, %.1f GB/s read\n\n",
           kvk_backend_isa(be), n, peak_gflops, peak_gbs);
}

/* ---- data ---- */

static uint64_t seed = 1;

static uint32_t random32(void)
{
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(seed >> 33);
}

static void *get(size_t bytes)
{
    void *p = aligned_alloc(4096, (bytes + 8191) / 4096 * 4096);
    if (!p) {
        fprintf(stderr, "kernels_bench: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return p;
}

static float *floats(size_t n)
{
    float *x = get(n * sizeof(float));
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((double)random32() * 0x1p-30 - 1.0);
    return x;
}

/* bf16 in (-2, 2) */
static uint16_t *halves(size_t n)
{
    uint16_t *x = get(n * sizeof(uint16_t));
    for (size_t i = 0; i < n; i++)
        x[i] = (uint16_t)((0x3f00u + (random32() & 0xffu)) | (random32() & 1u) << 15);
    return x;
}

/* ---- measuring ---- */

typedef kvc_status (*call_fn)(void *args);

static void report(const char *op, const char *shape, call_fn fn, void *args, double gflop,
                   double gbytes)
{
    double times[REPEATS], cpu[REPEATS];
    int repeats = opt.quick ? 2 : REPEATS;

    if (opt.only && !strstr(op, opt.only))
        return;
    for (int i = -1; i < repeats; i++) {
        double start = now_s(), start_cpu = cpu_s();
        failures += fn(args) != KVC_OK;
        if (i >= 0) {
            times[i] = now_s() - start;
            cpu[i] = cpu_s() - start_cpu;
        }
    }
    qsort(times, (size_t)repeats, sizeof(double), by_value);
    qsort(cpu, (size_t)repeats, sizeof(double), by_value);
    double t = times[repeats / 2], c = cpu[repeats / 2] / opt.threads;
    printf("%-13s %-42s %8.3f ms %8.3f cpu", op, shape, t * 1e3, c * 1e3);
    if (gflop > 0 && peak_gflops > 0)
        printf(" %7.1f GFLOP/s %5.1f%%", gflop / t, 100 * gflop / c / peak_gflops);
    if (gbytes > 0)
        printf(" %7.2f GB/s %5.1f%%", gbytes / t, 100 * gbytes / c / peak_gbs);
    printf("\n");
}

#define CALL_OP(op)                                                                                \
    __attribute__((unused)) static kvc_status call_##op(void *args)                                \
    {                                                                                              \
        return ops->op(be, args, NULL);                                                            \
    }
KVK_OPS(CALL_OP)
#undef CALL_OP

static void bench_attend_shape(uint32_t n_q, uint32_t n_kv, uint32_t hq, uint32_t hkv, uint32_t d,
                               bool rope)
{
    size_t width = (size_t)hkv * d, row = 2 * width, store = (size_t)n_kv * 4;
    uint16_t *data = halves(store * row);
    const void **rows = get(n_kv * sizeof(*rows));
    int32_t *positions = get(n_kv * sizeof(*positions));
    uint32_t *visible = get(n_q * sizeof(*visible));
    double *freq = get(d * sizeof(double));
    double pairs = 0;
    char shape[80];

    for (size_t j = 0; j < n_kv; j++) {
        rows[j] = data + random32() % store * row;
        positions[j] = (int32_t)j;
    }
    for (size_t i = 0; i < n_q; i++) {
        visible[i] = n_kv - (n_q - 1 - (uint32_t)i);
        pairs += visible[i];
    }
    if (kvk_rope_inv_freq(&(kvk_rope_params){.theta = 10000}, d, freq) != KVC_OK)
        failures++;
    kvk_attend_args a = {.q = floats((size_t)n_q * hq * d),
                         .n_q = n_q,
                         .n_q_heads = hq,
                         .n_kv_heads = hkv,
                         .head_dim = d,
                         .rows = rows,
                         .n_kv = n_kv,
                         .v_off_bytes = width * 2,
                         .dtype = KVK_BF16,
                         .k_positions = rope ? positions : NULL,
                         .inv_freq = rope ? freq : NULL,
                         .visible = visible,
                         .scale = 1 / sqrtf((float)d),
                         .o = floats((size_t)n_q * hq * d),
                         .lse = floats((size_t)n_q * hq)};
    (void)snprintf(shape, sizeof(shape), "n_q %u n_kv %u heads %u/%u d %u bf16%s", n_q, n_kv, hq,
                   hkv, d, rope ? " rope" : "");
    report("attend", shape, call_attend, &a, pairs * hq * d * 4e-9,
           (double)n_kv * (double)row * 2e-9);
    if (n_q == 1 && !rope) { /* the same bytes as coded rows, half as long */
        a.dtype = KVK_E4M3_SCALED;
        a.v_off_bytes = kvk_slice_bytes(a.dtype, hkv, d);
        (void)snprintf(shape, sizeof(shape), "n_q 1 n_kv %u heads %u/%u d %u e4m3", n_kv, hq, hkv,
                       d);
        report("attend", shape, call_attend, &a, pairs * hq * d * 4e-9,
               (double)n_kv * (double)a.v_off_bytes * 2e-9);
    }
    free(data);
    free(rows);
    free(positions);
    free(visible);
    free(freq);
    free((void *)(uintptr_t)a.q);
    free(a.o);
    free(a.lse);
}

static void bench_attend(void)
{
    uint32_t n_kv = opt.quick ? 600 : 2700;

    bench_attend_shape(512, n_kv, 9, 3, 64, true);
    bench_attend_shape(512, n_kv, 9, 3, 64, false);
    bench_attend_shape(512, n_kv, 32, 8, 128, true);
    for (uint32_t n_q = 1; n_q <= 8; n_q *= 2)
        bench_attend_shape(n_q, n_kv, 9, 3, 64, true);
    bench_attend_shape(1, n_kv, 32, 8, 128, true);
    bench_attend_shape(1, n_kv, 32, 8, 128, false);
}

static void bench_score_keys_shape(uint32_t m, uint32_t hq, uint32_t hkv, uint32_t d, uint32_t n)
{
    size_t width = (size_t)hkv * d;
    char shape[80];
    uint16_t *keys = halves(n * width);
    kvk_score_keys_args a = {
        floats((size_t)m * hq * d), m, hq, hkv, d, {keys, width * 2, KVK_BF16}, n,
        floats((size_t)m * hq * n), n};

    (void)snprintf(shape, sizeof(shape), "m %u heads %u/%u d %u n %u bf16", m, hq, hkv, d, n);
    report("score_keys", shape, call_score_keys, &a, (double)m * hq * d * n * 2e-9,
           (double)n * (double)width * 2e-9 + (double)m * hq * n * 4e-9);
    free(keys);
    free((void *)(uintptr_t)a.q);
    free(a.out);
}

static void bench_score_index_shape(uint32_t m, uint32_t hq, uint32_t hkv, uint32_t dims,
                                    uint32_t n)
{
    size_t row = kvk_index_row_bytes(hkv, dims);
    char shape[80], *index = get(n * row);
    kvk_score_index_args a = {floats((size_t)m * hq * dims), m, hq, hkv, dims, index, row, n,
                              floats((size_t)m * hq * n),    n};

    for (size_t i = 0; i < n * row; i++)
        index[i] = (char)(random32() % 120);
    (void)snprintf(shape, sizeof(shape), "m %u heads %u/%u dims %u n %u int8", m, hq, hkv, dims, n);
    report("score_index", shape, call_score_index, &a, (double)m * hq * dims * n * 2e-9,
           (double)n * (double)row * 1e-9 + (double)m * hq * n * 4e-9);
    free(index);
    free((void *)(uintptr_t)a.q);
    free(a.out);
}

static void bench_scores(void)
{
    uint32_t n = opt.quick ? 20000 : 1000000, small = opt.quick ? 4000 : 32768;

    bench_score_keys_shape(1, 9, 3, 64, n);
    bench_score_keys_shape(1, 32, 8, 128, n / 4);
    bench_score_keys_shape(1, 9, 3, 64, small);
    bench_score_index_shape(1, 1, 1, 126, n);
    bench_score_index_shape(1, 1, 1, 22, n);
    bench_score_index_shape(1, 9, 3, 22, n);
    bench_score_index_shape(1, 32, 8, 34, n / 4);
    bench_score_index_shape(512, 1, 1, 126, small / 16);
    bench_score_index_shape(512, 1, 1, 22, small / 16);
    bench_score_index_shape(512, 1, 1, 126, small);
    bench_score_index_shape(512, 1, 1, 22, small);
}

static void bench_topk_shape(const char *kind, uint32_t n, uint32_t k)
{
    size_t bytes = kvk_topk_workspace_bytes(n, k);
    float *scores = floats(n);
    char shape[80];
    uint32_t n_out = 0;
    kvk_topk_args a = {scores, n, k, 0, get(k * sizeof(uint32_t)), NULL, &n_out, get(bytes), bytes};

    for (uint32_t j = 0; j < n && kind[0] == 'r'; j++)
        scores[j] = (float)j;
    for (uint32_t j = 0; j < n && kind[0] == 't'; j++)
        scores[j] = (float)(random32() % 4);
    (void)snprintf(shape, sizeof(shape), "n %u k %u %s", n, k, kind);
    report("topk", shape, call_topk, &a, 0, n * 4e-9);
    free(scores);
    free(a.ids);
    free(a.workspace);
}

static void bench_select(void)
{
    uint32_t n = opt.quick ? 100000 : 4000000, m = n / 4;
    float *x = floats((size_t)9 * m), *out = floats(m), max[9], sum[9];

    bench_topk_shape("spread", n, 2048);
    bench_topk_shape("spread", m, 2048);
    bench_topk_shape("rising", n, 2048);
    bench_topk_shape("ties", n, 2048);
    for (int h = 0; h < 9; h++) {
        max[h] = -INFINITY;
        sum[h] = 0;
    }
    report("softmax_stats", "9 heads, n = a quarter of top-k's", call_softmax_stats,
           &(kvk_softmax_stats_args){x, m, 9, m, max, sum}, 0, 9.0 * m * 4e-9);
    report("vote", "9 heads", call_vote, &(kvk_vote_args){x, m, 9, m, max, sum, out}, 0,
           10.0 * m * 4e-9);
    report("row_max", "9 rows", call_row_max, &(kvk_row_max_args){x, m, 9, m, max}, 0,
           9.0 * m * 4e-9);
    report("chunk_fold", "9 rows", call_chunk_fold, &(kvk_chunk_fold_args){x, m, 9, m, max, out}, 0,
           9.0 * m * 4e-9);
    report("window_max", "eps 3", call_window_max, &(kvk_window_max_args){x, m, 3, out}, 0,
           m * 8e-9);
    free(x);
    free(out);
}

static void bench_gather(const uint16_t *data, uint32_t n, void *out)
{
    uint32_t picks = n / 2 < 2048 ? n / 2 : 2048; /* out has room for them, and no more */
    const void **rows = get(picks * sizeof(*rows));

    for (size_t i = 0; i < picks; i++)
        rows[i] = data + random32() % (n / 2) * (size_t)2048;
    report("gather", "2048 rows of 4 KiB", call_gather, &(kvk_gather_args){rows, picks, 4096, out},
           0, picks * 8192e-9);
    free(rows);
}

/* What a group does in 64 tokens after its chunks have been attended: 64 queries, 32 heads. */
static void bench_chunks(void)
{
    uint32_t chunks = 8, rows = 64 * 32, dim = 128;
    size_t n = (size_t)chunks * rows;
    float *o = floats(n * dim), *lse = floats(n), *out = floats((size_t)rows * dim), weights[8];

    report("chunk_weights", "8 scores", call_chunk_weights,
           &(kvk_chunk_weights_args){lse, NULL, 1, chunks, KVK_FUSE_SOFTMAX, 1, weights}, 0, 0);
    report("chunk_fuse", "8 chunks, 64 queries of 32 heads of 128", call_chunk_fuse,
           &(kvk_chunk_fuse_args){o, lse, weights, chunks, rows, dim, 1, out}, 0,
           (double)(n + rows) * dim * 4e-9);
    free(o);
    free(lse);
    free(out);
}

static void bench_rows(void)
{
    uint32_t n = opt.quick ? 64 : 4096;
    uint16_t *rows = halves((size_t)n * 1024);
    float *proj = floats((size_t)1024 * 126), *out = floats((size_t)n * 1024);
    double *freq = get(64 * sizeof(double));
    char *index = get((size_t)n * 1040);
    kvk_rows in = {rows, 2048, KVK_BF16};

    if (kvk_rope_inv_freq(&(kvk_rope_params){.theta = 10000}, 128, freq) != KVC_OK)
        failures++;
    report("convert", "[n, 1024] bf16", call_convert, &(kvk_convert_args){in, n, 1024, out}, 0,
           n * 1024 * 6e-9);
    report("rope", "[n, 8, 128] bf16", call_rope,
           &(kvk_rope_args){in, n, 8, 128, freq, NULL, 777, out}, 0, n * 1024 * 6e-9);
    report("project", "[n, 1024] x [1024, 126]", call_project,
           &(kvk_project_args){in, n, 1, 1024, 126, proj, out}, n * 1024.0 * 126 * 2e-9, 0);
    report("project", "[1, 1024] x [1024, 126]", call_project,
           &(kvk_project_args){in, 1, 1, 1024, 126, proj, out}, 1024.0 * 126 * 2e-9,
           1024 * 126 * 4e-9);
    report("quantize", "[n, 1, 126]", call_quantize,
           &(kvk_quantize_args){proj, n < 1024 ? n : 1024, 1, 126, index, 128}, 0,
           (n < 1024 ? n : 1024) * 126 * 5e-9);
    report("encode", "[n, 8, 128] bf16 to e4m3", call_encode,
           &(kvk_encode_args){in, n, 8, 128, KVK_E4M3_SCALED, index, 1040}, 0, n * 1024 * 3e-9);
    report("decode", "[n, 8, 128] e4m3", call_decode,
           &(kvk_decode_args){{index, 1040, KVK_E4M3_SCALED}, n, 8, 128, out}, 0, n * 1024 * 5e-9);
    bench_gather(rows, n, out);
    report("mean", "[512, 1024] bf16", call_mean,
           &(kvk_mean_args){in, n < 512 ? n : 512, 1024, out}, 0, (n < 512 ? n : 512) * 2048e-9);
    free(rows);
    free(proj);
    free(out);
    free(freq);
    free(index);
}

static bool parse(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        bool more = i + 1 < argc;
        if (strcmp(argv[i], "--quick") == 0)
            opt.quick = true;
        else if (more && strcmp(argv[i], "--isa") == 0)
            opt.isa = argv[++i];
        else if (more && strcmp(argv[i], "--only") == 0)
            opt.only = argv[++i];
        else if (more && strcmp(argv[i], "--threads") == 0)
            opt.threads = (uint32_t)strtoul(argv[++i], NULL, 10);
        else
            return false;
    }
    return true;
}

int main(int argc, char **argv)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts)};
    long cores = sysconf(_SC_NPROCESSORS_ONLN);

    if (!parse(argc, argv)) {
        fprintf(stderr, "usage: kernels_bench [--quick] [--isa NAME] [--threads N] [--only OP]\n");
        return 2;
    }
    if (opt.threads == 0)
        opt.threads = cores > 0 ? (uint32_t)cores : 1;
    if (opt.threads > THREADS_MAX)
        opt.threads = THREADS_MAX;
    opts.n_threads = opt.threads;
    opts.isa = opt.isa;
    if (kvk_backend_open("cpu", &opts, &be) != KVC_OK) {
        fprintf(stderr, "kernels_bench: cannot open the cpu backend with this isa\n");
        return 1;
    }
    ops = kvk_backend_ops(be);
    measure_floors();
    bench_attend();
    bench_scores();
    bench_select();
    bench_chunks();
    bench_rows();
    kvk_backend_close(be);
    return failures ? 1 : 0;
}
