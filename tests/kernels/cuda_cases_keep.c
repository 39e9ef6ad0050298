/* cuda_cases_keep.c: the Selection Cache and the mean query against cosine and mean of the CPU. */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"

/* A query turned away from `from_q` by a share of noise. */
static void turn(numbers *from, const float *from_q, size_t n, float share, float *q)
{
    for (size_t i = 0; i < n; i++)
        q[i] = from_q[i] + share * normal(from);
}

/* Many steps of a batch against the same walk on the CPU: decisions and what is remembered. */
static void run_keep(numbers *from, uint32_t n_seqs, uint32_t width)
{
    static const float shares[] = {0.1f, 0.4f, 0.55f, 2.0f};
    size_t n = (size_t)n_seqs * width;
    float *q = normals(from, n), *last = host_bytes(n * 4);
    kvk_cuda_keep_args a = {.n_seqs = n_seqs,
                            .width = width,
                            .q = device_bytes(n * 4),
                            .last = device_copy(last, n * 4),
                            .threshold = 0.9,
                            .keep = device_bytes(n_seqs * 4)};
    uint32_t kept = 0;

    for (uint32_t step = 0; step < 12; step++) {
        const uint32_t *keep;
        if (step == 9)
            q[width / 2] = NAN;
        upload((void *)(uintptr_t)a.q, q, n * 4);
        OK(kvk_cuda_keep(gpu(), &a, gpu_stream()));
        keep = fetched(a.keep, n_seqs * 4);
        for (uint32_t s = 0; s < n_seqs; s++) {
            double cosine = 0;
            uint32_t want = 0;
            CPU(false, cosine, q + s * width, last + s * width, width, &cosine);
            want = cosine >= a.threshold;
            REQUIRE(keep[s] == want || fabs(cosine - a.threshold) < 1e-13,
                    "step %u, sequence %u, width %u: kept %u at a cosine of %.15g", step, s, width,
                    keep[s], cosine);
            kept += keep[s];
            if (!keep[s])
                memcpy(last + s * width, q + s * width, width * 4);
        }
        REQUIRE(memcmp(fetched(a.last, n * 4), last, n * 4) == 0, "step %u: another last", step);
        q[width / 2] = 1.0f;
        turn(from, q, n, shares[step % 4], q);
    }
    REQUIRE(width < 100 || (kept > 0 && kept < 12 * n_seqs), "%u kept", kept);
    release_all();
}

static void run_mean(numbers *from, uint32_t n_seqs, uint32_t n, uint32_t width, kvk_dtype dtype)
{
    size_t all = (size_t)n_seqs * n * width, bytes = kvk_dtype_bytes(dtype);
    float *x = normals(from, all), *want = host_bytes(width * 4);
    char *in = host_bytes(all * bytes + 1);
    kvk_cuda_mean_args a = {.dtype = dtype,
                            .n_seqs = n_seqs,
                            .n = n,
                            .width = width,
                            .out = device_bytes((size_t)n_seqs * width * 4)};
    const float *out;

    if (dtype == KVK_F32)
        memcpy(in, x, all * 4);
    else
        kvk_from_f32(x, all, dtype, in);
    a.in = device_copy(in, all * bytes + 1);
    OK(kvk_cuda_mean(gpu(), &a, gpu_stream()));
    out = fetched(a.out, (size_t)n_seqs * width * 4);
    for (uint32_t s = 0; s < n_seqs; s++) {
        CPU(false, mean, {in + (size_t)s * n * width * bytes, width * bytes, dtype}, n, width,
            want);
        for (uint32_t i = 0; i < width; i++)
            REQUIRE(out[(size_t)s * width + i] == want[i],
                    "mean of %u rows, column %u is %.9g, wanted %.9g", n, i,
                    (double)out[(size_t)s * width + i], (double)want[i]);
    }
    release_all();
}

void cuda_case_keep(numbers *from)
{
    kvk_cuda_keep_args none = {.width = 4, .threshold = 0.9};

    run_keep(from, 1, 4096);
    run_keep(from, 5, 576);
    run_keep(from, 3, 1);
    OK(kvk_cuda_keep(gpu(), &none, gpu_stream()));
    none.n_seqs = 1;
    REQUIRE(kvk_cuda_keep(gpu(), &none, gpu_stream()) == KVC_INVALID, "no query");
    none.threshold = 0;
    REQUIRE(kvk_cuda_keep(gpu(), &none, gpu_stream()) == KVC_INVALID, "threshold 0");
    none.threshold = NAN;
    REQUIRE(kvk_cuda_keep(gpu(), &none, gpu_stream()) == KVC_INVALID, "threshold NaN");
}

void cuda_case_mean(numbers *from)
{
    kvk_cuda_mean_args a = {.dtype = KVK_I8, .width = 4, .n_seqs = 1};

    run_mean(from, 1, 512, 4096, KVK_BF16);
    run_mean(from, 3, 100, 576, KVK_F16);
    run_mean(from, 2, 1, 129, KVK_F32);
    run_mean(from, 2, 0, 5, KVK_F32);
    REQUIRE(kvk_cuda_mean(gpu(), &a, gpu_stream()) == KVC_INVALID, "int8 queries");
}

/* Both selections pass over what is kept, whatever its index holds, and serve the others. */
void cuda_case_kept(numbers *from)
{
    enum { SEQS = 3, N = 20000, KEPT = 1, PICKS = 100 };
    const uint32_t keep[SEQS] = {0, 1, 0};
    kvk_cuda_candidates cands[SEQS];
    size_t work[2] = {kvk_cuda_select_workspace_bytes(SEQS, N),
                      kvk_cuda_select_vote_workspace_bytes(SEQS, N)};
    const uint8_t *rows = index_rows(from, N, 8, 32);
    void *index = device_copy(rows, (size_t)N * 272);

    for (uint32_t s = 0; s < SEQS; s++)
        cands[s] = (kvk_cuda_candidates){s == KEPT ? NULL : index, N, 0};
    for (int vote = 0; vote < 2; vote++) {
        kvk_cuda_select_args a = {.n_seqs = SEQS,
                                  .dims = 126,
                                  .k = PICKS,
                                  .rows_max = N,
                                  .q = device_copy(normals(from, SEQS * 1024), SEQS * 1024 * 4),
                                  .cands = device_copy(cands, sizeof(cands)),
                                  .picks = device_bytes(SEQS * PICKS * 4),
                                  .scores = device_bytes(SEQS * PICKS * 4),
                                  .n_picks = device_bytes(SEQS * 4),
                                  .workspace = device_bytes(work[vote]),
                                  .workspace_bytes = work[vote],
                                  .keep = device_copy(keep, sizeof(keep))};
        kvk_cuda_select_vote_args b = {SEQS,     32,        8,           32,      PICKS,
                                       0,        N,         a.q,         a.cands, a.picks,
                                       a.scores, a.n_picks, a.workspace, work[1], a.keep};
        OK(kvk_cuda_fill(gpu(), a.workspace, 0, work[vote], gpu_stream()));
        OK(vote ? kvk_cuda_select_vote(gpu(), &b, gpu_stream())
                : kvk_cuda_select(gpu(), &a, gpu_stream()));
        const uint32_t *n_picks = fetched(a.n_picks, SEQS * 4);
        const uint32_t *picks = fetched(a.picks, SEQS * PICKS * 4);
        for (uint32_t s = 0; s < SEQS; s++) {
            REQUIRE(n_picks[s] == (s == KEPT ? 0xeeeeeeeeu : PICKS), "%u picks of sequence %u",
                    n_picks[s], s);
            for (uint32_t i = 0; i < PICKS; i++)
                REQUIRE((picks[s * PICKS + i] == 0xeeeeeeeeu) == (s == KEPT),
                        "sequence %u: pick %u is %u", s, i, picks[s * PICKS + i]);
        }
    }
}
