/*
 * cuda_cases_chunk_attend.c: attention over chosen chunks and their weighted sum on the device
 * against the CPU's ops; then retrieval as a whole, with chunks that come from pinned memory.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"

typedef struct setting {
    uint32_t n_lists, k, n_q, heads, kv_heads, dim, n_rows;
    kvk_dtype dtype;
    uint32_t n_chunks, row_bytes, chunk_bytes;
    uint8_t *memory; /* [n_chunks, chunk_bytes], pinned */
    float *q;
    kvk_cuda_chunk_attend_args a;
} setting;

/* Chunks of 64 rows whose last one, the landmark's, is zero in K and V. */
static void make_memory(numbers *from, setting *s)
{
    size_t elem = s->dtype == KVK_F32 ? 4 : 2;

    s->row_bytes = (uint32_t)(2 * s->kv_heads * s->dim * elem);
    s->chunk_bytes = 64 * s->row_bytes;
    s->memory = pinned_bytes((size_t)s->n_chunks * s->chunk_bytes);
    for (size_t i = 0; i < (size_t)s->n_chunks * s->chunk_bytes / elem; i++) {
        float x = normal(from);
        kvk_from_f32(&x, 1, s->dtype, s->memory + i * elem);
    }
    for (size_t c = 0; c < s->n_chunks; c++)
        memset(s->memory + c * s->chunk_bytes + 63u * s->row_bytes, 0, s->row_bytes);
}

static void set_up(numbers *from, setting *s)
{
    size_t width = (size_t)s->n_q * s->heads * s->dim, entries = (size_t)s->n_lists * s->k;

    make_memory(from, s);
    s->q = normals(from, s->n_lists * width);
    s->a = (kvk_cuda_chunk_attend_args){.n_seqs = s->n_lists,
                                        .k = s->k,
                                        .n_q = s->n_q,
                                        .n_q_heads = s->heads,
                                        .n_kv_heads = s->kv_heads,
                                        .head_dim = s->dim,
                                        .q = device_copy(s->q, s->n_lists * width * 4),
                                        .n_rows = s->n_rows,
                                        .row_bytes = s->row_bytes,
                                        .chunk_bytes = s->chunk_bytes,
                                        .v_off_bytes = s->row_bytes / 2,
                                        .dtype = s->dtype,
                                        .scale = 1.0f / sqrtf((float)s->dim),
                                        .o = device_bytes(entries * width * 4),
                                        .lse = device_bytes(entries * s->n_q * s->heads * 4)};
}

/* The partial of one chunk by the reference. */
static void want_chunk(const setting *s, uint32_t list, uint32_t chunk, float *o, float *lse)
{
    const void *rows[64];

    for (uint32_t j = 0; j < 64; j++)
        rows[j] = s->memory + (size_t)chunk * s->chunk_bytes + (size_t)j * s->row_bytes;
    CPU(false, attend, s->q + (size_t)list * s->n_q * s->heads * s->dim, s->n_q, s->heads,
        s->kv_heads, s->dim, rows, s->n_rows, s->a.k_off_bytes, s->a.v_off_bytes, s->dtype, NULL,
        NULL, NULL, s->a.scale, 0, o, lse);
}

/* The bound of kernels/README.md; sums of |products| stay below 1.2 dim, |v| below 4. */
static void check_chunk(const setting *s, const float *o, const float *lse, const float *want_o,
                        const float *want_lse)
{
    size_t rows = (size_t)s->n_q * s->heads;
    double e = (s->dim + 12.0) * 0x1p-24 * (double)s->a.scale * 1.2 * s->dim +
               0x1p-20 * (1 + log2(s->n_rows + 1.0));

    for (size_t i = 0; i < rows; i++)
        REQUIRE(fabs((double)lse[i] - (double)want_lse[i]) <= 2 * e,
                "dim %u, %u queries: lse[%zu] is %.9g, wanted %.9g", s->dim, s->n_q, i,
                (double)lse[i], (double)want_lse[i]);
    for (size_t i = 0; i < rows * s->dim; i++)
        REQUIRE(fabs((double)o[i] - (double)want_o[i]) <= 2 * e * 4,
                "dim %u, %u queries: o[%zu] is %.9g, wanted %.9g", s->dim, s->n_q, i, (double)o[i],
                (double)want_o[i]);
}

static void check_attend(setting *s, const int32_t *list, const uint32_t *n_list)
{
    size_t rows = (size_t)s->n_q * s->heads, width = rows * s->dim;
    size_t entries = (size_t)s->n_lists * s->k;
    float *want = host_bytes(width * 4), *want_lse = host_bytes(rows * 4);

    OK(kvk_cuda_chunk_attend(gpu(), &s->a, gpu_stream()));
    const float *o = fetched(s->a.o, entries * width * 4);
    const float *lse = fetched(s->a.lse, entries * rows * 4);
    for (size_t e = 0; e < entries; e++) {
        bool there = e % s->k < n_list[e / s->k] && list[e] >= 0;
        for (size_t i = 0; !there && i < rows; i++)
            REQUIRE(lse[e * rows + i] == -INFINITY, "entry %zu is not there", e);
        if (!there)
            continue;
        want_chunk(s, (uint32_t)(e / s->k), (uint32_t)list[e], want, want_lse);
        check_chunk(s, o + e * width, lse + e * rows, want, want_lse);
    }
}

void cuda_case_chunk_attend(numbers *from)
{
    static const uint32_t shapes[][6] = {/* queries, heads, kv heads, dim, rows, k */
                                         {1, 32, 8, 128, 64, 8}, {64, 32, 8, 128, 63, 3},
                                         {1, 4, 4, 32, 64, 8},   {64, 4, 4, 32, 64, 2},
                                         {7, 12, 2, 64, 1, 2},   {3, 16, 1, 128, 40, 2},
                                         {33, 9, 3, 64, 64, 1}};
    static const kvk_dtype dtypes[] = {KVK_F32, KVK_BF16, KVK_F16};

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        setting s = {.n_lists = 3,
                     .n_q = shapes[i][0],
                     .heads = shapes[i][1],
                     .kv_heads = shapes[i][2],
                     .dim = shapes[i][3],
                     .n_rows = shapes[i][4],
                     .k = shapes[i][5],
                     .dtype = dtypes[i % 3],
                     .n_chunks = 9};
        uint32_t n_list[3] = {s.k, s.k - 1, s.k};
        int32_t *list = host_bytes(3 * s.k * 4);
        kvk_cuda_residency res[3];
        set_up(from, &s);
        for (uint32_t e = 0; e < 3 * s.k; e++)
            list[e] = e == 2 * s.k ? -1 : (int32_t)number_below(from, 9);
        for (size_t l = 0; l < 3; l++)
            res[l] = (kvk_cuda_residency){.slots = s.memory};
        s.a.list = device_copy(list, 3 * s.k * 4);
        s.a.n_list = device_copy(n_list, sizeof(n_list));
        s.a.res = device_copy(res, sizeof(res));
        check_attend(&s, list, n_list);
        s.a.n_rows = KVK_CUDA_CHUNK_ROWS + 1;
        REQUIRE(kvk_cuda_chunk_attend(gpu(), &s.a, gpu_stream()) != KVC_OK, "too many rows");
        s.a.n_rows = 64;
        s.a.head_dim = 48;
        REQUIRE(kvk_cuda_chunk_attend(gpu(), &s.a, gpu_stream()) != KVC_OK, "48 dims");
        release_all();
    }
}

/* HSA: each list attends for its own kv head. */
void cuda_case_chunk_attend_heads(numbers *from)
{
    enum { HEADS = 4, GROUP = 2, DIM = 64, K = 2 };
    setting all = {.n_lists = 1,
                   .n_q = 2,
                   .heads = HEADS * GROUP,
                   .kv_heads = HEADS,
                   .dim = DIM,
                   .n_rows = 64,
                   .k = K,
                   .dtype = KVK_BF16,
                   .n_chunks = 3};
    size_t part = GROUP * DIM, width = HEADS * part;
    int32_t list[HEADS * K] = {2, 0, 2, 0, 2, 0, 2, 0};
    uint32_t n_list[HEADS] = {K, K, K, K}, first[HEADS] = {0, 1, 2, 3};
    float *q = host_bytes(2 * width * 4);
    kvk_cuda_residency res[HEADS];

    set_up(from, &all);
    for (size_t h = 0; h < HEADS; h++) {
        res[h] = (kvk_cuda_residency){.slots = all.memory};
        for (size_t i = 0; i < 2; i++)
            memcpy(q + (h * 2 + i) * part, all.q + i * width + h * part, part * 4);
    }
    all.a.list = device_copy(list, sizeof(list));
    all.a.n_list = device_copy(n_list, sizeof(n_list));
    all.a.res = device_copy(res, sizeof(res));
    OK(kvk_cuda_chunk_attend(gpu(), &all.a, gpu_stream()));
    const float *want = fetched(all.a.o, K * 2 * width * 4);
    kvk_cuda_chunk_attend_args a = all.a;
    a.n_seqs = HEADS;
    a.n_q_heads = GROUP;
    a.n_kv_heads = 1;
    a.q = device_copy(q, 2 * width * 4);
    a.first_head = device_copy(first, sizeof(first));
    a.o = device_bytes(K * 2 * width * 4);
    a.lse = device_bytes(K * 2 * HEADS * GROUP * 4);
    OK(kvk_cuda_chunk_attend(gpu(), &a, gpu_stream()));
    const float *got = fetched(a.o, K * 2 * width * 4);
    for (size_t h = 0; h < HEADS; h++) {
        for (size_t i = 0; i < K * 2; i++)
            REQUIRE(memcmp(got + (h * K * 2 + i) * part, want + i * width + h * part, part * 4) ==
                        0,
                    "head %zu", h);
    }
}

/* ---- the weighted sum ---- */

void cuda_case_chunk_fuse(numbers *from)
{
    static const uint32_t shapes[][3] = {{8, 130, 128}, {1, 1, 1}, {64, 9, 66}, {0, 3, 32}};
    enum { LISTS = 3 };

    for (size_t t = 0; t < 8; t++) {
        uint32_t k = shapes[t / 2][0], n = shapes[t / 2][1], dim = shapes[t / 2][2], off = t % 2;
        size_t rows = (size_t)LISTS * k * n;
        float *o = normals(from, rows * dim), *lse = normals(from, rows);
        float *w = normals(from, LISTS * k), *want = host_bytes((size_t)n * dim * 4);
        for (size_t i = 0; i < rows; i++)
            lse[i] = i % 17 == 3 ? -INFINITY : lse[i] * 10;
        for (size_t i = 0; i < LISTS * k; i++)
            w[i] = i % 8 == 2 ? 0 : fabsf(w[i]);
        for (size_t i = 0; i < rows * dim; i++) /* what must not be read */
            o[i] = w[i / dim / n] == 0 || lse[i / dim] == -INFINITY ? NAN : o[i];
        kvk_cuda_chunk_fuse_args a = {.n_seqs = LISTS,
                                      .k = k,
                                      .n = n,
                                      .dim = dim,
                                      .off_by_one = off,
                                      .o = device_copy(o, rows * dim * 4),
                                      .lse = device_copy(lse, rows * 4),
                                      .weights = device_copy(w, LISTS * k * 4),
                                      .out = device_bytes((size_t)LISTS * n * dim * 4)};
        OK(kvk_cuda_chunk_fuse(gpu(), &a, gpu_stream()));
        const float *got = fetched(a.out, (size_t)LISTS * n * dim * 4);
        for (size_t s = 0; s < LISTS; s++) {
            const float *part = o + s * k * n * dim;
            CPU(false, chunk_fuse, part, lse + s * k * n, w + s * k, k, n, dim, off, want);
            for (size_t i = 0; i < (size_t)n * dim; i++) {
                double sum = 0, x = (double)got[s * n * dim + i];
                for (size_t c = 0; c < k; c++) {
                    float y = part[c * n * dim + i];
                    sum += isnan(y) ? 0 : fabs((double)w[s * k + c] * (double)y);
                }
                REQUIRE(fabs(x - (double)want[i]) <= (k + 3) * 0x1p-24 * sum,
                        "k %u: out[%zu] is %.9g, wanted %.9g", k, i, x, (double)want[i]);
            }
        }
        release_all();
    }
}

/* Whole chunks of 256 KiB, and lengths that are no multiple of a piece, from pinned memory. */
void cuda_case_chunk_gather(numbers *from)
{
    static const uint32_t sizes[] = {256 << 10, 4112, (12 << 10) + 16};
    enum { N = 24, CHUNKS = 40 };

    for (size_t t = 0; t < 3; t++) {
        uint32_t bytes = sizes[t], n_list = N - 1, fetch[N];
        int32_t list[N];
        uint8_t *memory = pinned_bytes((size_t)CHUNKS * bytes);
        const void *blocks[CHUNKS];
        for (size_t i = 0; i < (size_t)CHUNKS * bytes / 8; i++)
            ((uint64_t *)(void *)memory)[i] = number(from);
        for (size_t b = 0; b < CHUNKS; b++)
            blocks[b] = b == 3 ? NULL : memory + b * bytes;
        kvk_cuda_residency res = {.slots = device_bytes((size_t)N * bytes)};
        kvk_cuda_source source = {device_copy(blocks, sizeof(blocks)), CHUNKS, 1};
        uint8_t *want = fetched(res.slots, (size_t)N * bytes);
        for (uint32_t i = 0; i < N; i++) {
            list[i] = i == 5 ? -1 : (int32_t)(N - 1 - i);
            fetch[i] = i == 7   ? KVK_CUDA_RESIDENT
                       : i == 8 ? 3 /* a block that the source lacks */
                       : i == 9 ? CHUNKS
                                : (i * 17 + 5) % CHUNKS;
            if (list[i] >= 0 && i < n_list && fetch[i] < CHUNKS && fetch[i] != 3)
                memcpy(want + (size_t)list[i] * bytes, memory + (size_t)fetch[i] * bytes, bytes);
        }
        kvk_cuda_gather_args a = {.n_seqs = 1,
                                  .stride = N,
                                  .list = device_copy(list, sizeof(list)),
                                  .fetch = device_copy(fetch, sizeof(fetch)),
                                  .n_list = device_copy(&n_list, 4),
                                  .res = device_copy(&res, sizeof(res)),
                                  .source = device_copy(&source, sizeof(source)),
                                  .row_bytes = bytes};
        OK(kvk_cuda_gather(gpu(), &a, gpu_stream()));
        REQUIRE(memcmp(fetched(res.slots, (size_t)N * bytes), want, (size_t)N * bytes) == 0,
                "chunks of %u bytes", bytes);
        release_all();
    }
}

/* ---- all of it together ---- */

enum { PATH_LISTS = 3, PATH_K = 8, PATH_CHUNKS = 40, PATH_HIDDEN = 64, PATH_SLOTS = 10 };

/* Three groups over one memory, each with landmarks, slots and a view of its own. */
typedef struct path {
    setting s;
    float *marks, *query; /* [chunks, hidden], [lists, hidden] */
    kvk_cuda_candidates cands[PATH_LISTS];
    kvk_cuda_chunk_select_args select;
    kvk_chunk_weights_args weights;
    kvk_cuda_resolve_args resolve;
    kvk_cuda_gather_args gather;
    kvk_cuda_chunk_fuse_args fuse;
} path;

/* Empty slots; all of them at once where n_slots is as many as there are chunks. */
static void place(path *p, uint32_t n_slots)
{
    kvk_cuda_residency res[PATH_LISTS];
    uint32_t zero = 0, *used = host_bytes(n_slots * 4), *none = host_bytes(PATH_CHUNKS * 4);

    memset(none, 0xff, PATH_CHUNKS * 4);
    for (size_t l = 0; l < PATH_LISTS; l++)
        res[l] = (kvk_cuda_residency){.slots = device_bytes((size_t)n_slots * p->s.chunk_bytes),
                                      .slot_of = device_copy(none, PATH_CHUNKS * 4),
                                      .pos_of = device_copy(none, n_slots * 4),
                                      .used = device_copy(used, n_slots * 4),
                                      .step = device_copy(&zero, 4),
                                      .n_positions = PATH_CHUNKS};
    p->resolve.n_slots = n_slots;
    p->resolve.res = p->gather.res = p->s.a.res = device_copy(res, sizeof(res));
}

/* The memory, four chunks a block, for every group. */
static const kvk_cuda_source *source_of(const path *p)
{
    enum { PER_BLOCK = 4 };
    const void *blocks[PATH_CHUNKS / PER_BLOCK];
    kvk_cuda_source source[PATH_LISTS];

    for (size_t b = 0; b < PATH_CHUNKS / PER_BLOCK; b++)
        blocks[b] = p->s.memory + b * PER_BLOCK * p->s.chunk_bytes;
    for (size_t l = 0; l < PATH_LISTS; l++)
        source[l] = (kvk_cuda_source){device_copy(blocks, sizeof(blocks)), PATH_CHUNKS / PER_BLOCK,
                                      PER_BLOCK};
    return device_copy(source, sizeof(source));
}

static void make_path(numbers *from, path *p)
{
    enum { ENTRIES = PATH_LISTS * PATH_K };
    size_t work = kvk_cuda_chunk_select_workspace_bytes(PATH_LISTS, PATH_CHUNKS);

    p->s = (setting){.n_lists = PATH_LISTS,
                     .n_q = 3,
                     .heads = 8,
                     .kv_heads = 2,
                     .dim = 64,
                     .n_rows = 64,
                     .k = PATH_K,
                     .dtype = KVK_BF16,
                     .n_chunks = PATH_CHUNKS};
    set_up(from, &p->s);
    p->marks = normals(from, PATH_CHUNKS * PATH_HIDDEN);
    for (size_t i = 0; i < PATH_CHUNKS * PATH_HIDDEN; i++)
        p->marks[i] = rintf(p->marks[i] * 2);
    const void *marks = device_copy(p->marks, PATH_CHUNKS * PATH_HIDDEN * 4);
    for (size_t l = 0; l < PATH_LISTS; l++)
        p->cands[l] = (kvk_cuda_candidates){marks, 0, 0};
    p->select = (kvk_cuda_chunk_select_args){.n_seqs = PATH_LISTS,
                                             .dims = PATH_HIDDEN,
                                             .k = PATH_K,
                                             .rows_max = PATH_CHUNKS,
                                             .dtype = KVK_F32,
                                             .stride_bytes = PATH_HIDDEN * 4,
                                             .q = device_bytes(PATH_LISTS * PATH_HIDDEN * 4),
                                             .cands = device_bytes(sizeof(p->cands)),
                                             .picks = device_bytes(ENTRIES * 4),
                                             .scores = device_bytes(ENTRIES * 4),
                                             .n_picks = device_bytes(PATH_LISTS * 4),
                                             .workspace = device_bytes(work),
                                             .workspace_bytes = work};
    p->weights = (kvk_chunk_weights_args){
        p->select.scores, p->select.picks,          PATH_LISTS, PATH_K, KVK_FUSE_SOFTMAX,
        0.125f,           device_bytes(ENTRIES * 4)};
    p->resolve = (kvk_cuda_resolve_args){.n_seqs = PATH_LISTS,
                                         .k = PATH_K,
                                         .picks = p->select.picks,
                                         .n_picks = p->select.n_picks,
                                         .list = device_bytes(ENTRIES * 4),
                                         .fetch = device_bytes(ENTRIES * 4),
                                         .stride = PATH_K,
                                         .n_list = device_bytes(PATH_LISTS * 4),
                                         .n_misses = device_bytes(PATH_LISTS * 4)};
    p->gather = (kvk_cuda_gather_args){.n_seqs = PATH_LISTS,
                                       .stride = PATH_K,
                                       .list = p->resolve.list,
                                       .fetch = p->resolve.fetch,
                                       .n_list = p->resolve.n_list,
                                       .source = source_of(p),
                                       .row_bytes = p->s.chunk_bytes};
    p->s.a.list = p->resolve.list;
    p->s.a.n_list = p->resolve.n_list;
    p->fuse = (kvk_cuda_chunk_fuse_args){
        .n_seqs = PATH_LISTS,
        .k = PATH_K,
        .n = p->s.n_q * p->s.heads,
        .dim = p->s.dim,
        .o = p->s.a.o,
        .lse = p->s.a.lse,
        .weights = p->weights.weights,
        .out = device_bytes((size_t)PATH_LISTS * p->s.n_q * p->s.heads * p->s.dim * 4)};
}

static void enqueue(const path *p)
{
    OK(kvk_cuda_chunk_select(gpu(), &p->select, gpu_stream()));
    OK(kvk_cuda_chunk_weights(gpu(), &p->weights, gpu_stream()));
    OK(kvk_cuda_resolve(gpu(), &p->resolve, gpu_stream()));
    OK(kvk_cuda_gather(gpu(), &p->gather, gpu_stream()));
    OK(kvk_cuda_chunk_attend(gpu(), &p->s.a, gpu_stream()));
    OK(kvk_cuda_chunk_fuse(gpu(), &p->fuse, gpu_stream()));
}

/* New queries; every group sees another number of chunks, the first of them perhaps none. */
static void turn(numbers *from, path *p, uint32_t step)
{
    p->query = normals(from, PATH_LISTS * PATH_HIDDEN);
    for (size_t i = 0; i < PATH_LISTS * PATH_HIDDEN; i++)
        p->query[i] = rintf(p->query[i]);
    for (uint32_t l = 0; l < PATH_LISTS; l++)
        p->cands[l].n_rows = step < 2 ? step * 3 + l * 7 : number_below(from, PATH_CHUNKS + 1);
    upload((void *)(uintptr_t)p->select.q, p->query, PATH_LISTS * PATH_HIDDEN * 4);
    upload((void *)(uintptr_t)p->select.cands, p->cands, sizeof(p->cands));
}

/* The same by the CPU's ops, for one group. */
static void want_path(const path *p, uint32_t l, float *out)
{
    uint32_t n = p->cands[l].n_rows, ids[PATH_K], n_ids = 0;
    size_t rows = (size_t)p->s.n_q * p->s.heads, width = rows * p->s.dim;
    size_t bytes = kvk_topk_workspace_bytes(n, PATH_K);
    float scores[PATH_CHUNKS], best[PATH_K], w[PATH_K], *o = host_bytes(PATH_K * width * 4);
    float *lse = host_bytes(PATH_K * rows * 4);

    CPU(false, score_keys, p->query + l * PATH_HIDDEN, 1, 1, 1, PATH_HIDDEN,
        {p->marks, PATH_HIDDEN * 4, KVK_F32}, n, scores, PATH_CHUNKS);
    CPU(false, topk, scores, n, PATH_K, 0, ids, best, &n_ids, host_bytes(bytes), bytes);
    CPU(false, chunk_weights, best, ids, 1, n_ids, p->weights.fusion, 0.125f, w);
    for (uint32_t i = 0; i < n_ids; i++)
        want_chunk(&p->s, l, ids[i], o + i * width, lse + i * rows);
    CPU(false, chunk_fuse, o, lse, w, n_ids, (uint32_t)rows, p->s.dim, p->fuse.off_by_one, out);
}

static void check_path(const path *p, const float *got, const char *what)
{
    size_t width = (size_t)p->s.n_q * p->s.heads * p->s.dim;
    float *want = host_bytes(width * 4);
    /* weights add up to at most 1; |v| below 4 */
    double e = (p->s.dim + 12.0) * 0x1p-24 * (double)p->s.a.scale * 1.2 * p->s.dim +
               0x1p-20 * (1 + log2(65.0));

    for (uint32_t l = 0; l < PATH_LISTS; l++) {
        want_path(p, l, want);
        for (size_t i = 0; i < width; i++)
            REQUIRE(fabs((double)got[l * width + i] - (double)want[i]) <= 3 * e * 4,
                    "%s: group %u of %u chunks: out[%zu] is %.9g, wanted %.9g", what, l,
                    p->cands[l].n_rows, i, (double)got[l * width + i], (double)want[i]);
    }
}

/*
 * Retrieval over steps, one by one and as a replayed graph, with slots for few chunks (the others
 * come from pinned memory) and with slots for all: the same bits, and the oracle's numbers. A
 * landmark's zero row and 1 in the denominator are the same.
 */
void cuda_case_chunk_path(numbers *from)
{
    for (int kind = 0; kind < 2; kind++) {
        path p;
        kvk_cuda_graph *graph = NULL;
        make_path(from, &p);
        size_t bytes = (size_t)PATH_LISTS * p.fuse.n * p.fuse.dim * 4;
        p.weights.fusion = kind ? KVK_FUSE_STICK : KVK_FUSE_SOFTMAX;
        for (uint32_t step = 0; step < 6; step++) {
            turn(from, &p, step);
            const float *few = NULL;
            place(&p, PATH_CHUNKS);
            for (int pass = 0; pass < 2; pass++) /* the second finds all that it wants */
                enqueue(&p);
            const float *resident = fetched(p.fuse.out, bytes);
            check_path(&p, resident, "resident");
            place(&p, PATH_SLOTS);
            enqueue(&p);
            few = fetched(p.fuse.out, bytes);
            REQUIRE(memcmp(few, resident, bytes) == 0, "offloaded differs from resident");
            p.s.a.n_rows = p.s.n_rows = 63;
            p.fuse.off_by_one = 1;
            enqueue(&p);
            check_path(&p, fetched(p.fuse.out, bytes), "1 in the denominator");
            p.s.a.n_rows = p.s.n_rows = 64;
            p.fuse.off_by_one = 0;
        }
        OK(kvk_cuda_graph_begin(gpu(), gpu_stream()));
        enqueue(&p);
        OK(kvk_cuda_graph_end(gpu(), gpu_stream(), &graph));
        for (uint32_t step = 0; step < 12; step++) { /* slots fill up and are taken over */
            turn(from, &p, step);
            OK(kvk_cuda_graph_launch(gpu(), graph, gpu_stream()));
            check_path(&p, fetched(p.fuse.out, bytes), "graph");
        }
        kvk_cuda_graph_destroy(gpu(), graph);
        release_all();
    }
}
