/*
 * rig.c: see rig.h.
 */
#include "rig.h"

#include <math.h>

#include "base/digest.h"
#include "base/place.h"
#include "internal.h"

#ifdef __clang__
typedef __fp16 half; /* clang before 15 lacks _Float16 on x86 */
#else
__extension__ typedef _Float16 half;
#endif

/* A number in (-1, 1) with a bell shape, of the key and an index. */
static double noise(uint64_t key, uint64_t i)
{
    support_random random = {key * 0x9e3779b97f4a7c15ull + i * 0xd1342543de82ef95ull};
    double sum = 0;
    for (int j = 0; j < 4; j++)
        sum += (double)(support_next(&random) >> 11) * 0x1p-53;
    return sum - 2.0;
}

static uint16_t f32_to_bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

double rig_get(kvk_dtype dtype, const void *data, size_t i)
{
    if (dtype == KVK_F32)
        return (double)((const float *)data)[i];
    if (dtype == KVK_F16) {
        half h;
        memcpy(&h, (const char *)data + 2 * i, 2);
        return (double)h;
    }
    uint32_t u = (uint32_t)((const uint16_t *)data)[i] << 16;
    float f;
    memcpy(&f, &u, sizeof(f));
    return (double)f;
}

void rig_set(kvk_dtype dtype, void *data, size_t i, double x)
{
    if (dtype == KVK_F32) {
        ((float *)data)[i] = (float)x;
    } else if (dtype == KVK_F16) {
        half h = (half)x;
        memcpy((char *)data + 2 * i, &h, 2);
    } else {
        ((uint16_t *)data)[i] = f32_to_bf16((float)x);
    }
}

const char *rig_rows_way(kvc_client *client)
{
    kvc_way_cost costs[KVC_WAY_COUNT];
    const kvc_way_ask ask = {.n_rows = 1, .row_bytes = 16};
    if (client == NULL)
        return NULL;
    (void)kvc_way_costs(client, &ask, costs, NULL);
    return costs[KVC_WAY_SHM].why_not == NULL ? "shm" : "rows";
}

void rig_init(rig *r, const char *selector, uint32_t n_tokens)
{
    *r = (rig){.n_tokens = n_tokens, .seed = 1, .k_scale = 1.0, .q_scale = 1.0};
    r->opts = (kvw_opts){
        .size_bytes = sizeof(kvw_opts),
        .model = "test-model",
        .revision = "1",
        .n_layers = 2,
        .n_q_heads = 4,
        .n_kv_heads = 2,
        .head_dim = 16,
        .dtype = KVK_F32,
        .rope = {.theta = 10000.0},
        .block_tokens = 64,
        .n_threads = 2,
        .selector = selector,
        .index = KVW_INDEX_EXACT,
        .n_sink = 8,
        .n_recent = 40,
        .k = 48,
        .chunk_tokens = 64,
    };
}

static double grained(const rig *r, double x)
{
    return r->grain == 0 ? x : r->grain * nearbyint(x / r->grain);
}

/* Data of the whole model, from which a rank takes its heads. */
static void fill_one(const rig *r, uint64_t what, uint32_t heads, double scale, double *out)
{
    const kvw_opts *o = &r->opts;
    uint32_t width = heads * o->head_dim, first = o->tp_rank * width;
    uint8_t cell[4];
    for (uint32_t layer = 0; layer < o->n_layers; layer++) {
        for (uint32_t t = 0; t < r->n_tokens; t++) {
            uint32_t p = what == 0 && r->repeat != 0 ? t % r->repeat : t;
            uint64_t key = ((r->seed * 3u + what) * 1009u + layer) * 1000003u + p;
            for (uint32_t i = 0; i < width; i++) {
                rig_set(o->dtype, cell, 0, grained(r, scale * noise(key, first + i)));
                *out++ = rig_get(o->dtype, cell, 0);
            }
        }
    }
}

void rig_fill(rig *r)
{
    const kvw_opts *o = &r->opts;
    size_t rows = (size_t)o->n_layers * r->n_tokens;
    r->k = malloc(rows * rig_kv_width(r) * sizeof(double));
    r->v = malloc(rows * rig_kv_width(r) * sizeof(double));
    r->q = malloc(rows * rig_q_width(r) * sizeof(double));
    r->tokens = malloc((r->n_tokens + 1u) * sizeof(uint32_t));
    assert_true(r->k != NULL && r->v != NULL && r->q != NULL && r->tokens != NULL);
    fill_one(r, 0, o->n_kv_heads, r->k_scale, r->k);
    fill_one(r, 1, o->n_kv_heads, 1.0, r->v);
    fill_one(r, 2, o->n_q_heads, r->q_scale, r->q);
    for (uint32_t t = 0; t < r->n_tokens; t++)
        r->tokens[t] = (uint32_t)(r->seed * 7919u + t * 31u) % 50000u;
}

void rig_project(rig *r, uint32_t dims)
{
    const kvw_opts *o = &r->opts;
    bool esa = strcmp(o->selector, "esa") == 0;
    uint32_t tp = o->tp_size == 0 ? 1 : o->tp_size;
    kvwi_projection p = {.n_layers = o->n_layers,
                         .n_kv_heads = o->n_kv_heads * tp,
                         .head_dim = o->head_dim,
                         .dims = dims,
                         .form = esa ? KVWI_SHARED : KVWI_PER_HEAD,
                         .rope = (int32_t)(esa && o->far_position ? o->far_position : o->n_recent),
                         .nested = true};
    (void)snprintf(p.selector, sizeof(p.selector), "%s", o->selector);
    (void)snprintf(p.model, sizeof(p.model), "%s", o->model);
    size_t d_in = esa ? (size_t)p.n_kv_heads * p.head_dim : p.head_dim;
    size_t n = (size_t)p.n_layers * (esa ? 1 : p.n_kv_heads) * d_in * dims;
    p.a = malloc(n * sizeof(float));
    p.b = malloc(n * sizeof(float));
    assert_true(p.a != NULL && p.b != NULL);
    for (size_t i = 0; i < n; i++) {
        p.b[i] = (float)grained(r, noise(r->seed + 77u, i) / sqrt((double)dims));
        p.a[i] = (float)grained(r, (double)p.b[i] + 0.1 * noise(r->seed + 78u, i));
    }
    const char *base = getenv("TMPDIR");
    (void)snprintf(r->projection, sizeof(r->projection), "%s/kvasir-proj-%d-%s-%u.bin",
                   base == NULL ? "." : base, (int)getpid(), o->selector, o->tp_rank);
    assert_ok(kvwi_projection_write(r->projection, &p));
    free(p.a);
    free(p.b);
    r->opts.projection_path = r->projection;
}

/* Digests of the whole blocks as a prefill in chunks names them; how many. The caller frees. */
static uint32_t cold_digests(const rig *r, kvc_digest **digests_p)
{
    kvw_opts alone = r->opts;
    kvw_worker *worker = NULL;
    uint32_t bt = r->opts.block_tokens, n = r->n_tokens / bt;
    kvc_digest *digests = malloc((n + 1u) * sizeof(*digests));
    alone.client = NULL;
    alone.clients = NULL;
    alone.server_names = NULL;
    alone.n_clients = 0;
    assert_non_null(digests);
    assert_ok(kvw_open(&alone, &worker));
    for (uint32_t b = 0; b < n; b++)
        assert_ok(kvc_block_digest(kvw_schema_digest(worker), b == 0 ? NULL : &digests[b - 1],
                                   r->tokens + b * bt, bt, NULL, 0, &digests[b]));
    kvw_close(worker);
    *digests_p = digests;
    return n;
}

/* Whether each server has its part of blocks [1, end). */
static bool is_spread(const rig *r, const kvc_digest *digests, uint32_t end)
{
    uint32_t n = (uint32_t)r->opts.n_clients, count[8] = {0};
    uint64_t keys[8];
    for (uint32_t i = 0; i < n; i++)
        assert_ok(kvc_place_key(r->server_name[i], &keys[i]));
    for (uint32_t b = 1; b < end; b++)
        count[kvc_place_owner(keys, n, &digests[b])]++;
    for (uint32_t i = 0; i < n; i++)
        if (count[i] < 1 || count[i] < end / (2 * n))
            return false;
    return true;
}

void rig_name_servers(rig *r)
{
    kvc_digest *digests = NULL;
    bool spread = false;
    if (r->k == NULL)
        rig_fill(r);
    uint32_t n = cold_digests(r, &digests);
    assert_true(r->opts.n_clients <= 8 && n > 3);
    for (uint32_t try = 0; !spread && try < 10000; try++) {
        for (uint32_t i = 0; i < r->opts.n_clients; i++) {
            (void)snprintf(r->server_name[i], sizeof(r->server_name[i]), "%u of %u", i, try);
            r->server_names[i] = r->server_name[i];
        }
        spread = is_spread(r, digests, n - 2);
    }
    assert_true(spread);
    free(digests);
    r->opts.server_names = r->server_names;
}

void rig_open(rig *r)
{
    if (r->k == NULL)
        rig_fill(r);
    kvc_status st = kvw_open(&r->opts, &r->worker);
    if (st != KVC_OK)
        print_error("kvw_open: %s\n", kvw_last_error());
    assert_ok(st);
}

/* The number at row [dims] of codes and its scale. */
static double coded(const uint8_t *row, uint32_t n_heads, uint32_t dims, uint32_t head, uint32_t d,
                    double *scale_p)
{
    const uint8_t *at = row + n_heads * dims + 2u * head;
    uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
    float scale = 0;
    memcpy(&scale, &bits, sizeof(scale));
    *scale_p = (double)scale;
    return *scale_p * (int8_t)row[head * dims + d];
}

static void check_level_row(const uint8_t *coarse, const uint8_t *fine, const kvw_worker *w,
                            uint32_t at)
{
    uint32_t dims = w->level[0].dims, heads = w->opts.n_kv_heads;
    for (uint32_t i = 0; i < heads * dims; i++) {
        double s = 0, t = 0;
        double x = coded(coarse, heads, dims, i / dims, i % dims, &s);
        double y = coded(fine, heads, w->level[1].dims, i / dims, i % dims, &t);
        if (fabs(x - y) > 0.51 * (s + t))
            fail_msg("row %u, head %u, number %u: %g, and %g in the finer level", at, i / dims,
                     i % dims, x, y);
    }
}

void rig_check_levels(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    size_t coarse_bytes = w->level[0].row_bytes, fine_bytes = w->level[1].row_bytes;
    uint8_t *coarse = malloc(coarse_bytes), *fine = malloc(fine_bytes);
    assert_true(coarse != NULL && fine != NULL && w->n_levels == 2);
    if (w->device != NULL)
        assert_ok(w->device_ops->settle(seq));
    for (uint32_t layer = 0; layer < w->opts.n_layers; layer++) {
        const kvwi_pages *levels = seq->layers[layer].level;
        assert_true(levels[0].n_rows > 0 && levels[0].n_rows == levels[1].n_rows);
        for (uint32_t at = 0; at < levels[0].n_rows; at++) {
            kvwi_pages_read(&levels[0], at, 1, coarse, coarse_bytes);
            kvwi_pages_read(&levels[1], at, 1, fine, fine_bytes);
            check_level_row(coarse, fine, w, at);
        }
    }
    free(coarse);
    free(fine);
}

void rig_close(rig *r)
{
    kvw_close(r->worker);
    if (r->projection[0] != '\0')
        (void)unlink(r->projection);
    free(r->k);
    free(r->v);
    free(r->q);
    free(r->tokens);
}

void *rig_bytes(const rig *r, const double *array, uint32_t width, uint32_t layer, uint32_t first,
                uint32_t n)
{
    size_t count = (size_t)n * width;
    const double *src = array + ((size_t)layer * r->n_tokens + first) * width;
    void *out = malloc(count * sizeof(float) + 1u);
    assert_non_null(out);
    for (size_t i = 0; i < count; i++)
        rig_set(r->opts.dtype, out, i, src[i]);
    return out;
}

static void one_layer(rig *r, kvw_seq *seq, uint32_t layer, uint32_t first, uint32_t n,
                      rig_check *check, void *arg)
{
    void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, first, n);
    void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, first, n);
    void *q = rig_bytes(r, r->q, rig_q_width(r), layer, first, n);
    void *out = malloc((size_t)n * rig_q_width(r) * sizeof(float));
    float *lse = malloc((size_t)n * r->opts.n_q_heads * sizeof(float));
    assert_true(out != NULL && lse != NULL);
    kvc_status st = kvw_forward(seq, layer, q, k, v, n, out, lse);
    if (st != KVC_OK)
        print_error("kvw_forward at %u: %s\n", first, kvw_last_error());
    assert_ok(st);
    const rig_step step = {
        .seq = seq, .layer = layer, .first = first, .n = n, .out = out, .lse = lse};
    if (check != NULL)
        check(arg, r, &step);
    free(k);
    free(v);
    free(q);
    free(out);
    free(lse);
}

void rig_pass(rig *r, kvw_seq *seq, uint32_t first, uint32_t n, rig_check *check, void *arg)
{
    kvc_status st = kvw_tokens(seq, r->tokens + first, n);
    if (st != KVC_OK)
        print_error("kvw_tokens at %u: %s\n", first, kvw_last_error());
    assert_ok(st);
    for (uint32_t layer = 0; layer < r->opts.n_layers; layer++)
        one_layer(r, seq, layer, first, n, check, arg);
}

void rig_prefill(rig *r, kvw_seq *seq, uint32_t first, uint32_t end, rig_check *check, void *arg)
{
    while (first < end) {
        uint32_t n = end - first < r->opts.chunk_tokens ? end - first : r->opts.chunk_tokens;
        rig_pass(r, seq, first, n, check, arg);
        first += n;
    }
}

void rig_decode(rig *r, kvw_seq *seq, uint32_t first, uint32_t end, rig_check *check, void *arg)
{
    for (; first < end; first++)
        rig_pass(r, seq, first, 1, check, arg);
}

void rig_record_init(rig_record *record, const rig *r)
{
    size_t rows = (size_t)r->opts.n_layers * r->n_tokens;
    record->row_bytes = rig_q_width(r) * (r->opts.dtype == KVK_F32 ? 4u : 2u);
    record->out = calloc(rows, record->row_bytes);
    record->lse = calloc(rows * r->opts.n_q_heads, sizeof(float));
    assert_true(record->out != NULL && record->lse != NULL);
}

void rig_record_fini(rig_record *record)
{
    free(record->out);
    free(record->lse);
}

void rig_record_step(void *arg, const rig *r, const rig_step *step)
{
    rig_record *record = arg;
    size_t at = (size_t)step->layer * r->n_tokens + step->first, heads = r->opts.n_q_heads;
    memcpy(record->out + at * record->row_bytes, step->out, step->n * record->row_bytes);
    memcpy(record->lse + at * heads, step->lse, step->n * heads * sizeof(float));
}

double rig_record_diff(const rig *r, const rig_record *a, const rig_record *b, uint32_t first,
                       uint32_t end)
{
    double worst = 0;
    for (uint32_t layer = 0; layer < r->opts.n_layers; layer++) {
        size_t at = ((size_t)layer * r->n_tokens + first) * rig_q_width(r);
        size_t n = (size_t)(end - first) * rig_q_width(r);
        for (size_t i = at; i < at + n; i++) {
            double d = fabs(rig_get(r->opts.dtype, a->out, i) - rig_get(r->opts.dtype, b->out, i));
            worst = d > worst || isnan(d) ? d : worst;
        }
    }
    return worst;
}

void rig_record_equal(const rig *r, const rig_record *a, const rig_record *b, uint32_t first,
                      uint32_t end)
{
    for (uint32_t layer = 0; layer < r->opts.n_layers; layer++) {
        for (uint32_t t = first; t < end; t++) {
            size_t at = (size_t)layer * r->n_tokens + t, heads = r->opts.n_q_heads;
            if (memcmp(a->out + at * a->row_bytes, b->out + at * a->row_bytes, a->row_bytes) != 0 ||
                memcmp(a->lse + at * heads, b->lse + at * heads, heads * sizeof(float)) != 0)
                fail_msg("layer %u position %u differs", layer, t);
        }
    }
}

kvc_status rig_one_step(const rig *r, kvw_seq *seq, uint32_t pos, float *out, float *lse)
{
    kvc_status st = KVC_OK;
    assert_ok(kvw_tokens(seq, r->tokens + pos, 1));
    for (uint32_t layer = r->opts.n_layers; layer-- > 0;) {
        void *k = rig_bytes(r, r->k, rig_kv_width(r), layer, pos, 1);
        void *v = rig_bytes(r, r->v, rig_kv_width(r), layer, pos, 1);
        void *q = rig_bytes(r, r->q, rig_q_width(r), layer, pos, 1);
        if (layer == 0)
            st = kvw_forward(seq, layer, q, k, v, 1, out, lse);
        else
            assert_ok(kvw_append(seq, layer, k, v, 1));
        free(k);
        free(v);
        free(q);
    }
    return st;
}

int rig_find_device(rig *r)
{
    kvc_status st = kvw_open(&r->opts, &r->worker);
    bool absent = st == KVC_UNSUPPORTED && strncmp(kvw_last_error(), "backend", 7) == 0;
    if (st != KVC_OK)
        printf("%s: %s\n", absent ? "SKIPPED" : "FAILED", kvw_last_error());
    rig_close(r);
    return st == KVC_OK ? 0 : absent ? 77 : 1;
}
