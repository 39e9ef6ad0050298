/*
 * gca_layers.c: the layers of the decoder; shapes and formulas are those of model.py in
 * worker/python/kvasir/gca, and a test compares the two. Belongs to the context's thread.
 *
 * Attention goes through the product op too: for up to a chunk of queries, all heads at once, the
 * scores are q times K turned, and the output the softmax times V.
 */
#include <math.h>
#include <string.h>

#include "gca_internal.h"

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
    return c->m->ops->project(c->m->be, &args, NULL);
}

kvc_status gca_product(const gca_context *c, const float *in, size_t n, size_t n_in, const float *w,
                       size_t n_out, float *out)
{
    return heads_product(c, in, n_in, n, 1, n_in, w, n_out, out);
}

kvc_status gca_add_product(gca_context *c, float *x, size_t n, const float *w)
{
    size_t h = c->m->s.hidden;
    kvc_status st = gca_product(c, c->mix, n, h, w, h, c->norm);
    if (st == KVC_OK)
        gca_add(x, c->norm, n * h);
    return st;
}

kvc_status gca_mlp(gca_context *c, float *x, size_t n, const mlp_weights *w)
{
    size_t h = c->m->s.hidden, wide = c->m->s.mlp;
    gca_rms_norm(x, w->norm, n, h, c->norm);
    kvc_status st = gca_product(c, c->norm, n, h, w->up, wide, c->mlp);
    if (st != KVC_OK)
        return st;
    gca_gelu(c->mlp, n * wide);
    st = gca_product(c, c->mlp, n, wide, w->down, h, c->mix);
    if (st == KVC_OK)
        gca_add(x, c->mix, n * h);
    return st;
}

/* The keys of a block as c->kt [heads, d, n_keys], its values as c->vh [heads, n_keys, d]. */
static void pack(gca_context *c, const gca_attention *a)
{
    size_t heads = c->m->s.heads, d = c->m->s.hidden / heads, n = a->n_keys;
    for (size_t head = 0; head < heads; head++) {
        float *kt = c->kt + head * d * n, *vh = c->vh + head * d * n;
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
    size_t heads = c->m->s.heads, d = c->m->s.hidden / heads;
    float scale = 1 / sqrtf((float)d);
    pack(c, a);
    kvc_status st =
        heads_product(c, a->q, a->q_stride, a->n, heads, d, c->kt, a->n_keys, c->scores);
    if (st != KVC_OK)
        return st;
    for (size_t i = 0; i < a->n; i++) {
        size_t end = a->back ? a->n_keys - a->n + i + 1 : a->n_keys;
        size_t first = a->back && end > a->back ? end - a->back : 0;
        for (size_t head = 0; head < heads; head++) {
            float slope = a->back ? exp2f(-8.0f * (float)(head + 1) / (float)heads) : 0;
            gca_softmax(c->scores + (i * heads + head) * a->n_keys, a->n_keys, first, end, scale,
                        slope);
        }
    }
    return heads_product(c, c->scores, heads * a->n_keys, a->n, heads, a->n_keys, c->vh, d, a->out);
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

kvc_status gca_window_layer(gca_context *c, float *x, size_t n, const layer_weights *w,
                            window *past)
{
    size_t h = c->m->s.hidden, bytes = h * sizeof(float);
    gca_rms_norm(x, w->norm, n, h, c->norm);
    kvc_status st = gca_product(c, c->norm, n, h, w->qkv, 3 * h, c->qkv);
    if (st != KVC_OK)
        return st;
    for (size_t i = 0; i < n; i++) {
        memcpy(past->k + (past->n + i) * h, c->qkv + i * 3 * h + h, bytes);
        memcpy(past->v + (past->n + i) * h, c->qkv + i * 3 * h + 2 * h, bytes);
    }
    st = attend_window(c, n, past);
    size_t all = past->n + n, kept = all < c->m->s.window ? all : c->m->s.window;
    memmove(past->k, past->k + (all - kept) * h, kept * bytes);
    memmove(past->v, past->v + (all - kept) * h, kept * bytes);
    past->n = kept;
    return st == KVC_OK ? gca_add_product(c, x, n, w->out) : st;
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

/* Bidirectional attention inside each chunk, with rotary positions from its first row. */
kvc_status gca_encoder_layer(gca_context *c, size_t n, const layer_weights *w)
{
    const gca_sizes *s = &c->m->s;
    size_t h = s->hidden, d = h / s->heads, half = d / 2;
    gca_rms_norm(c->e, w->norm, n, h, c->norm);
    kvc_status st = gca_product(c, c->norm, n, h, w->qkv, 3 * h, c->qkv);
    for (size_t i = 0; st == KVC_OK && i < n; i++) {
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
    if (st == KVC_OK)
        st = gca_add_product(c, c->e, n, w->out);
    return st == KVC_OK ? gca_mlp(c, c->e, n, &w->mlp) : st;
}
