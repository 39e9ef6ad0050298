/*
 * gca_cpu.c: the decoder's math on the CPU; shapes and formulas are those of model.py in
 * worker/python/kvasir/gca, and a test compares the two. Belongs to the context's thread.
 *
 * Attention goes through the product op too: for up to a chunk of queries, all heads at once, the
 * scores are q times K turned, and the output the softmax times V.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "gca_internal.h"

typedef struct cpu_model {
    kvk_backend *be;
    const kvk_ops *ops;
} cpu_model;

/* Of one block of queries: K turned, V by head, attention. */
typedef struct cpu_context {
    float *kt, *vh, *scores;
} cpu_context;

/* n queries over n_keys keys; query i sees those up to i + n_keys - n, at most `back` of them. */
typedef struct gca_attention {
    const float *q, *k, *v;
    size_t q_stride, kv_stride; /* elements between rows */
    size_t n, n_keys, back;     /* back 0: every query sees every key */
    float *out;                 /* [n, h] */
} gca_attention;

/* ---- model and context ---- */

static void cpu_close(gca_model *m)
{
    cpu_model *form = m->form;
    if (form)
        kvk_backend_close(form->be);
    free(form);
}

static kvc_status cpu_open(gca_model *m, uint32_t number)
{
    cpu_model *form = calloc(1, sizeof(*form));
    m->form = form;
    if (!form)
        return KVC_NO_MEMORY;
    kvc_status st = number == 0 ? kvk_backend_open("cpu", NULL, &form->be) : KVC_UNSUPPORTED;
    if (st == KVC_OK)
        form->ops = kvk_backend_ops(form->be);
    return st;
}

static const float *cpu_keep(gca_model *m, const float *x, size_t n)
{
    (void)m;
    (void)n;
    return x; /* the file's, or the model's own */
}

static void cpu_context_close(gca_context *c)
{
    cpu_context *own = c->form;
    free(c->memory);
    if (own)
        free(own->kt);
    free(own);
}

static kvc_status cpu_context_open(gca_context *c, size_t n)
{
    const gca_sizes *s = &c->m->s;
    size_t keys = (size_t)s->window + s->chunk, kv = keys * s->hidden;
    cpu_context *own = calloc(1, sizeof(*own));
    c->form = own;
    c->memory = calloc(n, sizeof(float));
    if (!own || !c->memory)
        return KVC_NO_MEMORY;
    own->kt = calloc(2 * kv + (size_t)s->chunk * s->heads * keys, sizeof(float));
    own->vh = own->kt + kv;
    own->scores = own->vh + kv;
    return own->kt ? KVC_OK : KVC_NO_MEMORY;
}

static size_t cpu_window_floats(const gca_model *m, size_t pass)
{
    return 2 * (m->s.window + pass) * m->s.hidden;
}

static kvc_status cpu_copy(gca_context *c, float *to, const float *from, size_t n)
{
    (void)c;
    memcpy(to, from, n * sizeof(float));
    return KVC_OK;
}

static kvc_status cpu_host(gca_context *c, float *x, size_t n, float **host_p)
{
    (void)c;
    (void)n;
    *host_p = x;
    return KVC_OK;
}

static kvc_status cpu_back(gca_context *c, float *x, size_t n)
{
    (void)c;
    (void)x;
    (void)n;
    return KVC_OK;
}

/* ---- rows ---- */

static kvc_status cpu_embed(gca_context *c, const uint32_t *tokens, uint32_t n)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, taps = m->s.taps;
    for (size_t i = 0; i < n; i++) {
        float *x = c->x + i * h;
        memcpy(x, m->embed + tokens[i] * h, h * sizeof(float));
        for (size_t j = 0; j < taps; j++) {
            bool here = i >= j + 1, before = !here && j + 1 - i <= c->n_last;
            if (!here && !before)
                continue;
            uint32_t token = here ? tokens[i - j - 1] : c->last[taps - (j + 1 - i)];
            gca_add_scaled(x, m->taps + j * h, m->embed + token * h, h);
        }
    }
    return KVC_OK;
}

static kvc_status cpu_norm(gca_context *c, const float *x, const float *weight, size_t n,
                           float *out)
{
    gca_rms_norm(x, weight, n, c->m->s.hidden, out);
    return KVC_OK;
}

static kvc_status heads_product(const gca_context *c, const float *in, size_t stride, size_t n,
                                size_t n_heads, size_t n_in, const float *w, size_t n_out,
                                float *out)
{
    const kvk_project_args args = {.in = {in, stride * sizeof(float), KVK_F32},
                                   .n = (uint32_t)n,
                                   .n_heads = (uint32_t)n_heads,
                                   .dim_in = (uint32_t)n_in,
                                   .dim_out = (uint32_t)n_out,
                                   .proj = w,
                                   .out = out};
    const cpu_model *form = c->m->form;
    return form->ops->project(form->be, &args, NULL);
}

static kvc_status cpu_product(gca_context *c, const float *in, size_t n, size_t n_in,
                              const float *w, size_t n_out, gca_form form, float *out)
{
    float *to = form == GCA_ADD ? c->sum : out;
    kvc_status st = heads_product(c, in, n_in, n, 1, n_in, w, n_out, to);
    if (st == KVC_OK && form == GCA_GELU)
        gca_gelu(out, n * n_out);
    if (st == KVC_OK && form == GCA_ADD)
        gca_add(out, to, n * n_out);
    return st;
}

/* ---- attention ---- */

/* The keys of a block as own->kt [heads, d, n_keys], its values as own->vh [heads, n_keys, d]. */
static void pack(gca_context *c, const gca_attention *a)
{
    const cpu_context *own = c->form;
    size_t heads = c->m->s.heads, d = c->m->s.hidden / heads, n = a->n_keys;
    for (size_t head = 0; head < heads; head++) {
        float *kt = own->kt + head * d * n, *vh = own->vh + head * d * n;
        for (size_t j = 0; j < n; j++) {
            const float *k = a->k + j * a->kv_stride + head * d;
            for (size_t t = 0; t < d; t++)
                kt[t * n + j] = k[t];
            memcpy(vh + j * d, a->v + j * a->kv_stride + head * d, d * sizeof(*vh));
        }
    }
}

/* One block of at most a chunk of queries. */
static kvc_status attend(gca_context *c, const gca_attention *a)
{
    const cpu_context *own = c->form;
    size_t heads = c->m->s.heads, d = c->m->s.hidden / heads;
    float scale = 1 / sqrtf((float)d);
    pack(c, a);
    kvc_status st =
        heads_product(c, a->q, a->q_stride, a->n, heads, d, own->kt, a->n_keys, own->scores);
    if (st != KVC_OK)
        return st;
    for (size_t i = 0; i < a->n; i++) {
        size_t end = a->back ? a->n_keys - a->n + i + 1 : a->n_keys;
        size_t first = a->back && end > a->back ? end - a->back : 0;
        for (size_t head = 0; head < heads; head++) {
            float slope = a->back ? gca_slope((uint32_t)head, (uint32_t)heads) : 0;
            gca_softmax(own->scores + (i * heads + head) * a->n_keys, a->n_keys, first, end, scale,
                        slope);
        }
    }
    return heads_product(c, own->scores, heads * a->n_keys, a->n, heads, a->n_keys, own->vh, d,
                         a->out);
}

/* The rows of a pass, chunk by chunk, over what the window holds and themselves. */
static kvc_status attend_window(gca_context *c, size_t n, const window *past)
{
    size_t h = c->m->s.hidden, chunk = c->m->s.chunk, back = c->m->s.window;
    kvc_status st = KVC_OK;
    for (size_t i = 0; st == KVC_OK && i < n; i += chunk) {
        size_t rows = n - i < chunk ? n - i : chunk, seen = past->n + i;
        size_t first = seen + 1 > back ? seen + 1 - back : 0;
        const gca_attention a = {.q = c->qkv + i * 3 * h,
                                 .k = past->k + first * h,
                                 .v = past->v + first * h,
                                 .q_stride = 3 * h,
                                 .kv_stride = h,
                                 .n = rows,
                                 .n_keys = seen + rows - first,
                                 .back = back,
                                 .out = c->mix + i * h};
        st = attend(c, &a);
    }
    return st;
}

static float *cpu_qkv(gca_context *c, window *past)
{
    (void)past;
    return c->qkv;
}

static kvc_status cpu_window(gca_context *c, size_t n, window *past)
{
    size_t h = c->m->s.hidden, bytes = h * sizeof(float);
    for (size_t i = 0; i < n; i++) {
        memcpy(past->k + (past->n + i) * h, c->qkv + i * 3 * h + h, bytes);
        memcpy(past->v + (past->n + i) * h, c->qkv + i * 3 * h + 2 * h, bytes);
    }
    kvc_status st = attend_window(c, n, past);
    size_t all = past->n + n, kept = all < c->m->s.window ? all : c->m->s.window;
    memmove(past->k, past->k + (all - kept) * h, kept * bytes);
    memmove(past->v, past->v + (all - kept) * h, kept * bytes);
    past->n = kept;
    return st;
}

/* Rotates one row's head in place: pairs (i, i + half). */
static void rotate(float *restrict x, const float *restrict cos, const float *restrict sin,
                   size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

static kvc_status cpu_chunks(gca_context *c, size_t n)
{
    const gca_sizes *s = &c->m->s;
    size_t h = s->hidden, d = h / s->heads, half = d / 2;
    kvc_status st = KVC_OK;
    for (size_t i = 0; i < n; i++) {
        size_t at = i % s->chunk * half;
        for (size_t part = 0; part < 2 * s->heads; part++) /* the heads of q, then those of k */
            rotate(c->qkv + i * 3 * h + part * d, c->m->cos + at, c->m->sin + at, half);
    }
    for (size_t i = 0; st == KVC_OK && i < n; i += s->chunk) {
        const float *qkv = c->qkv + i * 3 * h;
        const gca_attention a = {.q = qkv,
                                 .k = qkv + h,
                                 .v = qkv + 2 * h,
                                 .q_stride = 3 * h,
                                 .kv_stride = 3 * h,
                                 .n = s->chunk,
                                 .n_keys = s->chunk,
                                 .out = c->mix + i * h};
        st = attend(c, &a);
    }
    return st;
}

static kvc_status cpu_encoded(gca_context *c, size_t n, gca_encoded *out_p)
{
    size_t h = c->m->s.hidden, s = c->m->s.chunk, bytes = h * sizeof(float);
    for (size_t i = 0; i < n; i += s) {
        memcpy(c->mix + i / s * h, c->norm + (i + s - 1) * h, bytes);
        memmove(c->v + i * h, c->v + (i + 1) * h, (s - 1) * bytes);
        memset(c->v + (i + s - 1) * h, 0, bytes);
        memset(c->k + (i + s - 1) * h, 0, bytes);
    }
    *out_p = (gca_encoded){c->k, c->v, c->mix};
    return KVC_OK;
}

const gca_math gca_math_cpu = {
    .name = "cpu",
    .pass_chunks = GCA_WORKER_CHUNKS,
    .open = cpu_open,
    .close = cpu_close,
    .keep = cpu_keep,
    .context_open = cpu_context_open,
    .context_close = cpu_context_close,
    .window_floats = cpu_window_floats,
    .copy = cpu_copy,
    .host = cpu_host,
    .back = cpu_back,
    .embed = cpu_embed,
    .norm = cpu_norm,
    .product = cpu_product,
    .qkv = cpu_qkv,
    .window = cpu_window,
    .chunks = cpu_chunks,
    .encoded = cpu_encoded,
};
