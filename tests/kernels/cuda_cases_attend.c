/*
 * cuda_cases_attend.c: attend and merge against the reference backend, and a captured step.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_rig.h"

/* A batch of attentions over one context, each sequence with its own list. */
typedef struct setting {
    uint32_t n_seqs, heads, kv_heads, dim, stride;
    kvk_dtype dtype;
    bool rotated, swapped; /* swapped: V lies ahead of K */
    float softcap;
    context c;
    model m;
    uint32_t *n_list, *positions; /* [n_seqs, stride] of the context */
    int32_t *k_positions;
    float *q;
    double inv_freq[64];
    kvk_cuda_attend_args a;
} setting;

static void set_up(numbers *from, setting *s)
{
    size_t entries = (size_t)s->n_seqs * s->stride, width = (size_t)s->heads * s->dim;
    kvk_rope_params rope = {.theta = 500000};
    size_t bytes = kvk_cuda_attend_workspace_bytes(s->n_seqs, s->stride, s->heads, s->dim);

    s->c = kv_context_of(from, 3000, s->kv_heads, s->dim, s->dtype);
    s->m = model_of(3000, (uint32_t)entries, 0, s->c.row_bytes);
    s->n_list = host_bytes(s->n_seqs * 4);
    s->positions = host_bytes(entries * 4);
    s->k_positions = host_bytes(entries * 4);
    s->q = normals(from, s->n_seqs * width);
    OK(kvk_rope_inv_freq(&rope, s->dim, s->inv_freq));
    for (uint32_t i = 0; i < s->n_seqs; i++)
        s->n_list[i] = i == 1 ? 0 : s->stride - number_below(from, i ? s->stride : 1);
    for (size_t i = 0; i < entries; i++) {
        s->positions[i] = number_below(from, 3000);
        s->k_positions[i] = (int32_t)number_below(from, 100000);
    }
    s->a = (kvk_cuda_attend_args){
        .n_seqs = s->n_seqs,
        .n_q_heads = s->heads,
        .n_kv_heads = s->kv_heads,
        .head_dim = s->dim,
        .q = device_copy(s->q, s->n_seqs * width * 4),
        .n_list = device_copy(s->n_list, s->n_seqs * 4),
        .stride = s->stride,
        .row_bytes = s->c.row_bytes,
        .k_off_bytes = s->swapped ? s->c.v_off_bytes : 0,
        .v_off_bytes = s->swapped ? 0 : s->c.v_off_bytes,
        .dtype = s->dtype,
        .k_positions = s->rotated ? device_copy(s->k_positions, entries * 4) : NULL,
        .inv_freq = s->rotated ? device_copy(s->inv_freq, s->dim / 2 * sizeof(double)) : NULL,
        .scale = 1.0f / sqrtf((float)s->dim),
        .softcap = s->softcap,
        .o = device_bytes(s->n_seqs * width * 4),
        .lse = device_bytes((size_t)s->n_seqs * s->heads * 4),
        .workspace = device_bytes(bytes),
        .workspace_bytes = bytes};
}

/* Lists slots 0, 1, ... for the entries; one in `share` is missing and comes from the source. */
static void place(numbers *from, setting *s, uint32_t share)
{
    size_t entries = (size_t)s->n_seqs * s->stride, row = s->c.row_bytes;
    int32_t *list = host_bytes(entries * 4);
    uint32_t *fetch = host_bytes(entries * 4);
    uint8_t *slots = host_bytes(entries * row);
    kvk_cuda_residency *res = host_bytes(s->n_seqs * sizeof(*res));
    kvk_cuda_source *source = host_bytes(s->n_seqs * sizeof(*source));

    memset(slots, 0xff, entries * row); /* NaN */
    for (size_t i = 0; i < entries; i++) {
        bool missing = share && number_below(from, share) == 0;
        list[i] = (int32_t)i;
        fetch[i] = missing ? s->positions[i] : KVK_CUDA_RESIDENT;
        if (!missing)
            memcpy(slots + i * row, s->c.rows + (size_t)s->positions[i] * row, row);
    }
    upload(s->m.res.slots, slots, entries * row);
    for (uint32_t i = 0; i < s->n_seqs; i++) {
        res[i] = s->m.res;
        source[i] = s->c.source;
    }
    s->a.res = device_copy(res, s->n_seqs * sizeof(*res));
    s->a.list = device_copy(list, entries * 4);
    s->a.fetch = share ? device_copy(fetch, entries * 4) : NULL;
    s->a.source = share ? device_copy(source, s->n_seqs * sizeof(*source)) : NULL;
}

/* The bound of kernels/README.md; sums of |products| stay below 1.2 dim, |v| below 4. */
static void compare(const setting *s, const char *what)
{
    size_t width = (size_t)s->heads * s->dim;
    const float *o = fetched(s->a.o, s->n_seqs * width * 4);
    const float *lse = fetched(s->a.lse, (size_t)s->n_seqs * s->heads * 4);
    float *want = host_bytes(width * 4), *want_lse = host_bytes(s->heads * 4);

    for (uint32_t i = 0; i < s->n_seqs; i++) {
        uint32_t n = s->n_list[i];
        const void **rows = host_bytes((n + 1) * sizeof(*rows));
        double e = (s->dim + 12.0) * 0x1p-24 * (double)s->a.scale * 1.2 * s->dim +
                   0x1p-20 * (1 + log2(n + 1.0));
        for (uint32_t j = 0; j < n; j++)
            rows[j] = s->c.rows + (size_t)s->positions[(size_t)i * s->stride + j] * s->c.row_bytes;
        CPU(false, attend, s->q + i * width, 1, s->heads, s->kv_heads, s->dim, rows, n,
            s->a.k_off_bytes, s->a.v_off_bytes, s->dtype,
            s->rotated ? s->k_positions + (size_t)i * s->stride : NULL,
            s->rotated ? s->inv_freq : NULL, NULL, s->a.scale, s->softcap, want, want_lse);
        for (size_t d = 0; d < width; d++) {
            double off = fabs((double)o[i * width + d] - (double)want[d]);
            REQUIRE(off <= 2 * e * 4, "%s: seq %u of %u rows: o[%zu] is %.9g, wanted %.9g", what, i,
                    n, d, (double)o[i * width + d], (double)want[d]);
        }
        for (uint32_t h = 0; h < s->heads; h++) {
            float got = lse[i * s->heads + h];
            REQUIRE(got == want_lse[h] || fabs((double)got - (double)want_lse[h]) <= 2 * e,
                    "%s: lse[%u] is %.9g, wanted %.9g", what, h, (double)got, (double)want_lse[h]);
        }
    }
}

void cuda_case_attend(numbers *from)
{
    static const uint32_t shapes[][4] = {
        /* heads, kv heads, dim, stride */
        {32, 8, 128, 2048}, {32, 8, 128, 1}, {9, 3, 64, 333},  {8, 8, 128, 17}, {16, 2, 64, 100},
        {28, 4, 128, 65},   {5, 1, 64, 31},  {12, 2, 128, 15}, {4, 2, 64, 16},  {16, 4, 64, 4113}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        for (int kind = 0; kind < 8; kind++) {
            static const kvk_dtype dtypes[] = {KVK_BF16, KVK_F16, KVK_E4M3_SCALED, KVK_I8_SCALED};
            setting s = {.n_seqs = 4,
                         .heads = shapes[i][0],
                         .kv_heads = shapes[i][1],
                         .dim = shapes[i][2],
                         .stride = shapes[i][3],
                         .dtype = dtypes[kind % 4],
                         .rotated = kind >= 4,
                         .swapped = i % 2 == 1,
                         .softcap = kind == 3 || kind == 4 ? 20.0f : 0};
            set_up(from, &s);
            place(from, &s, kind == 1 ? 0 : 3);
            OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
            compare(&s, "attend");
            release_all();
        }
    }
}

/* What was resident does not show, rows that came are kept, NaN shows where it is seen. */
void cuda_case_attend_exact(numbers *from)
{
    setting s = {
        .n_seqs = 3, .heads = 32, .kv_heads = 8, .dim = 128, .stride = 500, .dtype = KVK_BF16};
    size_t o_bytes = (size_t)3 * 32 * 128 * 4, slots = (size_t)3 * 500 * 4096;
    const float *first = NULL, *o = NULL;
    const uint16_t nan = 0x7fc0;

    set_up(from, &s);
    for (uint32_t share = 0; share <= 4; share++) { /* 0: all resident, 1: none, 2: half */
        place(from, &s, share);
        OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
        o = fetched(s.a.o, o_bytes);
        first = first ? first : o;
        REQUIRE(memcmp(first, o, o_bytes) == 0, "other bits with one in %u missing", share);
        if (share == 0)
            continue;
        const uint8_t *kept = fetched(s.m.res.slots, slots);
        for (uint32_t seq = 0; seq < 3; seq++) {
            for (uint32_t j = 0; j < s.n_list[seq]; j++) {
                size_t i = (size_t)seq * 500 + j;
                REQUIRE(memcmp(kept + i * 4096, s.c.rows + (size_t)s.positions[i] * 4096, 4096) ==
                            0,
                        "slot %zu does not hold its row", i);
            }
        }
    }
    place(from, &s, 0);
    upload((char *)s.m.res.slots + 7 * 4096, &nan, 2); /* K of kv head 0, row 7 of sequence 0 */
    OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
    o = fetched(s.a.o, o_bytes);
    for (uint32_t h = 0; h < 32; h++)
        REQUIRE(!!isnan(o[h * 128]) == (h < 4), "head %u", h);
    REQUIRE(memcmp(o + 32 * 128, first + 32 * 128, o_bytes - 32 * 128 * 4) == 0, "other sequences");
}

/* ---- near ---- */

enum { RING = 70, NEAR_MAX = 64 };

typedef struct near_side {
    uint32_t first[4], n[4];
    float *q;
    uint8_t *ring; /* [RING] rows, the same for all sequences */
    uint16_t *out; /* device */
    uint32_t *done;
    float *o, *lse; /* wanted, of one sequence */
} near_side;

/* The newest rows of each sequence: any rows of the context, in a ring that wraps. */
static void add_near(numbers *from, setting *s, near_side *n, bool rotated)
{
    size_t width = (size_t)s->heads * s->dim, row = s->c.row_bytes;
    size_t bytes =
        kvk_cuda_attend_workspace_bytes(s->n_seqs, s->stride + NEAR_MAX + 16, s->heads, s->dim);
    kvk_cuda_residency *res = host_bytes(s->n_seqs * sizeof(*res));
    uint32_t *counts = device_bytes(8);

    n->q = normals(from, s->n_seqs * width);
    n->ring = host_bytes(RING * row);
    memcpy(n->ring, s->c.rows + 100 * row, RING * row);
    n->out = device_bytes(s->n_seqs * width * 2);
    n->done = pinned_bytes(4);
    n->o = host_bytes(width * 4);
    n->lse = host_bytes(s->heads * 4);
    for (uint32_t i = 0; i < s->n_seqs; i++) {
        n->first[i] = 1000 + number_below(from, 1000);
        n->n[i] = i == 2 ? 0 : NEAR_MAX - (i ? number_below(from, NEAR_MAX) : 0);
        res[i].slots = device_copy(n->ring, RING * row);
    }
    OK(kvk_cuda_fill(gpu(), counts, 0, 8, gpu_stream()));
    const double *inv_freq = device_copy(s->inv_freq, s->dim / 2 * sizeof(double));
    s->a.near = (kvk_cuda_near){.q = device_copy(n->q, s->n_seqs * width * 4),
                                .ring = device_copy(res, s->n_seqs * sizeof(*res)),
                                .first = device_copy(n->first, s->n_seqs * 4),
                                .n = device_copy(n->n, s->n_seqs * 4),
                                .ring_rows = RING,
                                .n_max = NEAR_MAX,
                                .inv_freq = rotated ? inv_freq : NULL,
                                .early = 1};
    s->a.workspace = device_bytes(bytes);
    s->a.workspace_bytes = bytes;
    s->a.result = (kvk_cuda_result){
        .out = n->out, .dtype = KVK_BF16, .lse = s->a.lse, .counts = counts, .done = n->done};
}

/* Both sides by the reference, merged. */
static void want_near(const setting *s, near_side *n, uint32_t seq)
{
    size_t width = (size_t)s->heads * s->dim, row = s->c.row_bytes;
    const void **rows = host_bytes((s->stride + NEAR_MAX) * sizeof(*rows));
    int32_t positions[NEAR_MAX];
    float *o = host_bytes(width * 4), *lse = host_bytes(s->heads * 4);

    for (uint32_t j = 0; j < s->n_list[seq]; j++)
        rows[j] = s->c.rows + (size_t)s->positions[(size_t)seq * s->stride + j] * row;
    CPU(false, attend, s->q + seq * width, 1, s->heads, s->kv_heads, s->dim, rows, s->n_list[seq],
        0, s->a.v_off_bytes, s->dtype, s->rotated ? s->k_positions + (size_t)seq * s->stride : NULL,
        s->rotated ? s->inv_freq : NULL, NULL, s->a.scale, s->softcap, n->o, n->lse);
    for (uint32_t j = 0; j < n->n[seq]; j++) {
        rows[j] = n->ring + (size_t)((n->first[seq] + j) % RING) * row;
        positions[j] = (int32_t)j;
    }
    CPU(false, attend, n->q + seq * width, 1, s->heads, s->kv_heads, s->dim, rows, n->n[seq], 0,
        s->a.v_off_bytes, s->dtype, s->a.near.inv_freq ? positions : NULL,
        s->a.near.inv_freq ? s->inv_freq : NULL, NULL, s->a.scale, s->softcap, o, lse);
    CPU(false, merge, n->o, n->lse, o, lse, s->heads, s->dim);
}

static void compare_near(const setting *s, near_side *n)
{
    size_t width = (size_t)s->heads * s->dim;
    const uint16_t *out = fetched(n->out, s->n_seqs * width * 2);
    const float *lse = fetched(s->a.lse, (size_t)s->n_seqs * s->heads * 4);
    double e = (s->dim + 12.0) * 0x1p-24 * (double)s->a.scale * 1.2 * s->dim + 0x1p-20 * 12;

    for (uint32_t i = 0; i < s->n_seqs; i++) {
        want_near(s, n, i);
        for (size_t d = 0; d < width; d++) {
            double want = (double)n->o[d], got = (double)of_bf16(out[i * width + d]);
            REQUIRE(fabs(got - want) <= 8 * e + fabs(want) * 0x1p-8, "seq %u: o[%zu] %g not %g", i,
                    d, got, want);
        }
        for (uint32_t h = 0; h < s->heads; h++) {
            float got = lse[i * s->heads + h];
            REQUIRE(got == n->lse[h] || fabs((double)got - (double)n->lse[h]) <= 2 * e,
                    "seq %u: lse[%u] %g not %g", i, h, (double)got, (double)n->lse[h]);
        }
    }
}

static void near_shape(numbers *from, const uint32_t shape[4])
{
    static const kvk_dtype dtypes[] = {KVK_BF16, KVK_E4M3_SCALED, KVK_I8_SCALED};

    for (int kind = 0; kind < 9; kind++) { /* keys of none rotated, of near, of both */
        setting s = {.n_seqs = 4,
                     .heads = shape[0],
                     .kv_heads = shape[1],
                     .dim = shape[2],
                     .stride = shape[3],
                     .dtype = dtypes[kind % 3],
                     .rotated = kind >= 6,
                     .softcap = kind == 1 ? 20.0f : 0};
        near_side n;
        set_up(from, &s);
        place(from, &s, 3);
        add_near(from, &s, &n, kind >= 3);
        for (uint32_t pass = 1; pass <= 3; pass++) {
            s.a.near.early = pass != 2;
            OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
            compare_near(&s, &n);
            REQUIRE(*n.done == pass, "done is %u after %u", *n.done, pass);
        }
        release_all();
    }
}

/* A list and the newest rows in one launch, of every kind of row, told to the host. */
void cuda_case_attend_near(numbers *from)
{
    static const uint32_t shapes[][4] = {
        {32, 8, 128, 300}, {9, 3, 64, 333}, {28, 4, 128, 65}, {16, 16, 64, 1}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        near_shape(from, shapes[i]);
}

void cuda_case_near_small(numbers *from)
{
    static const uint32_t shapes[][4] = {{14, 2, 128, 33}, {4, 4, 64, 1}};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        near_shape(from, shapes[i]);
}

void cuda_case_merge(numbers *from)
{
    enum { N = 70, DIM = 128 };
    float *o_a = normals(from, N * DIM), *o_b = normals(from, N * DIM);
    float *lse_a = normals(from, N), *lse_b = normals(from, N);
    void *d_a = NULL, *d_lse = NULL;

    lse_a[1] = lse_b[2] = lse_a[3] = lse_b[3] = -INFINITY;
    lse_a[4] = 90;
    o_a[DIM] = NAN; /* not read: its partial is empty */
    d_a = device_copy(o_a, N * DIM * 4);
    d_lse = device_copy(lse_a, N * 4);
    OK(kvk_cuda_merge(gpu(),
                      &(kvk_merge_args){d_a, d_lse, device_copy(o_b, N * DIM * 4),
                                        device_copy(lse_b, N * 4), N, DIM},
                      gpu_stream()));
    CPU(false, merge, o_a, lse_a, o_b, lse_b, N, DIM);
    const float *got = fetched(d_a, N * DIM * 4), *lse = fetched(d_lse, N * 4);
    for (size_t i = 0; i < N * DIM; i++)
        REQUIRE(fabs((double)got[i] - (double)o_a[i]) <= 4 * 0x1p-24 * 8, "o[%zu]", i);
    for (size_t i = 0; i < N; i++)
        REQUIRE(lse[i] == lse_a[i] ||
                    fabs((double)lse[i] - (double)lse_a[i]) <= 0x1p-22 * fabs((double)lse_a[i]),
                "lse[%zu]", i);
}

/* A captured step replayed with other data gives what the ops give one by one. */
void cuda_case_graph(numbers *from)
{
    setting s = {
        .n_seqs = 2, .heads = 32, .kv_heads = 8, .dim = 128, .stride = 300, .dtype = KVK_BF16};
    kvk_cuda_graph *graph = NULL;
    size_t o_bytes = (size_t)2 * 32 * 128 * 4;

    set_up(from, &s);
    place(from, &s, 2);
    OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
    OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
    OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
    for (int pass = 0; pass < 3; pass++) {
        float *q = normals(from, 2 * 32 * 128);
        upload((void *)(uintptr_t)s.a.q, q, o_bytes);
        OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
        const float *replayed = fetched(s.a.o, o_bytes);
        OK(kvk_cuda_fill(gpu(), s.a.o, 0xee, o_bytes, gpu_stream()));
        OK(kvk_cuda_attend(gpu(), &s.a, gpu_stream()));
        REQUIRE(memcmp(replayed, fetched(s.a.o, o_bytes), o_bytes) == 0, "pass %d", pass);
    }
    kvk_cuda_graph_destroy(gpu(), graph);
}
