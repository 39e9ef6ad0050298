/*
 * cuda_cases_picked.c: attention that resolves on the way, against resolve and attend one after the
 * other, which other cases hold to the oracles: results, lists, tables and slots, bit for bit, over
 * steps that miss all, some and none; near's rows early, as a worker has them; and two steps in one
 * workspace, one right behind the other.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_rig.h"

enum { SEQS = 3, OFF = 5, POSITIONS = 3000, RING = 70, NEAR_MAX = 40, STEPS = 7 };

typedef struct shape {
    uint32_t heads, kv_heads, dim, k, n_slots;
    kvk_dtype dtype;
    bool rotated, near;
} shape;

/* One way of doing it, with tables and slots of its own. */
typedef struct side {
    model m[SEQS];
    kvk_cuda_resolve_args resolve;
    kvk_cuda_attend_args attend;
    float *o[2]; /* of steps in turn */
} side;

/* What each step picks. */
typedef struct plan {
    uint32_t n_picks[STEPS][SEQS];
    const uint32_t *d_picks[STEPS], *d_n_picks[STEPS]; /* device */
} plan;

static void add_near(numbers *from, const shape *s, const context *c, kvk_cuda_attend_args *a)
{
    size_t width = (size_t)SEQS * s->heads * s->dim;
    kvk_cuda_residency ring[SEQS] = {0};
    uint32_t first[SEQS], n[SEQS];

    for (uint32_t i = 0; i < SEQS; i++) {
        ring[i].slots = device_copy(c->rows, (size_t)RING * c->row_bytes);
        first[i] = 1000 + i;
        n[i] = i == 1 ? 0 : NEAR_MAX - i;
    }
    a->near = (kvk_cuda_near){.q = device_copy(normals(from, width), width * 4),
                              .ring = device_copy(ring, sizeof(ring)),
                              .first = device_copy(first, sizeof(first)),
                              .n = device_copy(n, sizeof(n)),
                              .ring_rows = RING,
                              .n_max = NEAR_MAX};
}

static void make_side(numbers *from, const shape *s, const context *c, const float *q, side *to)
{
    size_t width = (size_t)SEQS * s->heads * s->dim, row = c->row_bytes;
    uint32_t stride = s->k + OFF;
    size_t entries = (size_t)SEQS * stride;
    size_t work = kvk_cuda_attend_workspace_bytes(SEQS, stride + NEAR_MAX + 16, s->heads, s->dim);
    kvk_cuda_residency res[SEQS];
    kvk_cuda_source source[SEQS];
    int32_t *list = host_bytes(entries * 4), *ranks = host_bytes(entries * 4);
    uint32_t *fetch = host_bytes(entries * 4), *resolved = device_bytes(entries * 4);
    kvk_rope_params rope = {.theta = 500000};
    double inv_freq[64];

    OK(kvk_rope_inv_freq(&rope, s->dim, inv_freq));
    OK(kvk_cuda_fill(gpu(), resolved, 0, entries * 4, gpu_stream()));
    for (uint32_t i = 0; i < SEQS; i++) {
        to->m[i] = model_of(POSITIONS, s->n_slots, OFF, row);
        upload(to->m[i].res.slots, c->rows, OFF * row);
        res[i] = to->m[i].res;
        source[i] = c->source;
    }
    for (size_t i = 0; i < entries; i++) {
        list[i] = i % stride < OFF ? (int32_t)(i % stride) : 7777;
        fetch[i] = KVK_CUDA_RESIDENT;
        ranks[i] = (int32_t)(i % stride);
    }
    to->resolve = (kvk_cuda_resolve_args){.n_seqs = SEQS,
                                          .k = s->k,
                                          .n_slots = s->n_slots,
                                          .n_pinned = OFF,
                                          .res = device_copy(res, sizeof(res)),
                                          .list = device_copy(list, entries * 4),
                                          .fetch = device_copy(fetch, entries * 4),
                                          .stride = stride,
                                          .off = OFF,
                                          .n_list = device_bytes(SEQS * 4),
                                          .n_misses = device_bytes(SEQS * 4)};
    to->attend = (kvk_cuda_attend_args){
        .n_seqs = SEQS,
        .n_q_heads = s->heads,
        .n_kv_heads = s->kv_heads,
        .head_dim = s->dim,
        .q = device_copy(q, width * 4),
        .list = to->resolve.list,
        .fetch = to->resolve.fetch,
        .n_list = to->resolve.n_list,
        .stride = stride,
        .res = to->resolve.res,
        .source = device_copy(source, sizeof(source)),
        .row_bytes = c->row_bytes,
        .v_off_bytes = c->v_off_bytes,
        .dtype = s->dtype,
        .k_positions = s->rotated ? device_copy(ranks, entries * 4) : NULL,
        .inv_freq = s->rotated ? device_copy(inv_freq, s->dim / 2 * 8) : NULL,
        .scale = 1.0f / sqrtf((float)s->dim),
        .o = device_bytes(width * 4),
        .lse = device_bytes((size_t)SEQS * s->heads * 4),
        .workspace = device_bytes(work),
        .workspace_bytes = work,
        .resolved = resolved};
    to->o[0] = to->attend.o;
    to->o[1] = device_bytes(width * 4);
    if (s->near)
        add_near(from, s, c, &to->attend);
}

static void same(const void *a, const void *b, size_t len_bytes, uint32_t step, const char *what)
{
    REQUIRE(memcmp(fetched(a, len_bytes), fetched(b, len_bytes), len_bytes) == 0,
            "step %u: %s differ", step, what);
}

/* Of the lists what there is; of the rest everything. */
static void compare(const shape *s, const context *c, const side *a, const side *b,
                    const uint32_t *n_picks, uint32_t step)
{
    size_t width = (size_t)SEQS * s->heads * s->dim, stride = s->k + OFF;

    same(a->resolve.n_list, b->resolve.n_list, SEQS * 4, step, "lengths");
    same(a->resolve.n_misses, b->resolve.n_misses, SEQS * 4, step, "misses");
    for (uint32_t i = 0; i < SEQS; i++) {
        size_t there = (OFF + n_picks[i]) * 4u;
        const kvk_cuda_residency *x = &a->m[i].res, *y = &b->m[i].res;
        same(a->resolve.list + i * stride, b->resolve.list + i * stride, there, step, "lists");
        same(a->resolve.fetch + i * stride, b->resolve.fetch + i * stride, there, step, "fetches");
        same(x->slot_of, y->slot_of, POSITIONS * 4, step, "slots of positions");
        same(x->pos_of, y->pos_of, s->n_slots * 4, step, "positions of slots");
        same(x->used, y->used, s->n_slots * 4, step, "stamps");
        same(x->step, y->step, 4, step, "steps");
        same(x->slots, y->slots, (size_t)s->n_slots * c->row_bytes, step, "rows");
    }
    same(a->attend.o, b->attend.o, width * 4, step, "results");
    same(a->attend.lse, b->attend.lse, (size_t)SEQS * s->heads * 4, step, "sums");
}

static plan plan_of(numbers *from, uint32_t k)
{
    uint32_t *picks = host_bytes((size_t)SEQS * k * 4);
    plan p;

    for (uint32_t t = 0; t < STEPS; t++) {
        for (uint32_t i = 0; i < SEQS; i++) { /* some of the step before; t 5: the same again */
            p.n_picks[t][i] = t == 3 ? i : k - number_below(from, k / 2 + 1);
            if (t != 5 || i == 0)
                distinct_positions(from, picks + i * k, k, t % 2 ? POSITIONS : k * 2);
            if (t == 4)
                picks[i * k] = POSITIONS + i; /* not a position */
        }
        p.d_picks[t] = device_copy(picks, (size_t)SEQS * k * 4);
        p.d_n_picks[t] = device_copy(p.n_picks[t], sizeof(p.n_picks[t]));
    }
    return p;
}

static void run_apart(side *to, const plan *p, uint32_t t)
{
    to->resolve.picks = p->d_picks[t];
    to->resolve.n_picks = p->d_n_picks[t];
    to->attend.o = to->o[t % 2];
    OK(kvk_cuda_resolve(gpu(), &to->resolve, gpu_stream()));
    OK(kvk_cuda_attend(gpu(), &to->attend, gpu_stream()));
}

/* early: the op before this one has another workspace. */
static void run_one(side *to, const plan *p, uint32_t t, bool early)
{
    to->resolve.picks = p->d_picks[t];
    to->resolve.n_picks = p->d_n_picks[t];
    to->attend.o = to->o[t % 2];
    to->attend.resolve = to->resolve;
    to->attend.near.early = early;
    OK(kvk_cuda_attend(gpu(), &to->attend, gpu_stream()));
}

/* Step by step, or in pairs of steps that follow each other at once, in one workspace. */
static void run_shape(numbers *from, const shape *s, bool pairs)
{
    context c = kv_context_of(from, POSITIONS, s->kv_heads, s->dim, s->dtype);
    size_t o_bytes = (size_t)SEQS * s->heads * s->dim * 4;
    const float *q = normals(from, (size_t)SEQS * s->heads * s->dim);
    numbers again = *from;
    side apart, one;
    plan p;

    make_side(from, s, &c, q, &apart);
    make_side(&again, s, &c, q, &one);
    p = plan_of(from, s->k);
    for (uint32_t t = 0; t < STEPS; t++) {
        bool second = pairs && t % 2 == 1;
        run_apart(&apart, &p, t);
        if (pairs && t % 2 == 0 && t + 1 < STEPS)
            continue;
        if (second)
            run_one(&one, &p, t - 1, true);
        run_one(&one, &p, t, !second);
        compare(s, &c, &apart, &one, p.n_picks[t], t);
        if (second)
            same(apart.o[0], one.o[0], o_bytes, t - 1, "results");
    }
    one.attend.resolve.stride++;
    REQUIRE(kvk_cuda_attend(gpu(), &one.attend, gpu_stream()) == KVC_INVALID, "another stride");
    one.attend.resolve.stride--;
    one.attend.resolved = NULL;
    REQUIRE(kvk_cuda_attend(gpu(), &one.attend, gpu_stream()) == KVC_INVALID, "no flags");
    release_all();
}

void cuda_case_attend_resolve(numbers *from)
{
    static const shape shapes[] = {
        {32, 8, 128, 300, 640, KVK_BF16, false, false},
        {32, 8, 128, 300, 305, KVK_BF16, false, true},
        {9, 3, 64, 1000, 2100, KVK_BF16, true, false},
        {28, 4, 128, 65, 400, KVK_E4M3_SCALED, false, false},
        {16, 16, 64, 100, 300, KVK_I8_SCALED, false, true},
        {4, 2, 64, 17, 30, KVK_F16, false, false},
        {8, 8, 128, 40, 6000, KVK_F16, true, false},
    };

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++)
        for (int pairs = 0; pairs < 2; pairs++)
            run_shape(from, &shapes[i], pairs);
}
