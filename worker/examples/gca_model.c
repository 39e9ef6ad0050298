/*
 * gca_model.c: see gca_model.h; the shapes and formulas are those of model.py in
 * worker/python/kvasir/gca, and a test compares the two.
 *
 * Rows go through in passes. What a layer's window reaches back to is kept from pass to pass, so a
 * body of any length needs the memory of one pass. Matrices are kept as [in, out], as the product
 * op takes them.
 */
#include "gca_model.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_MATRICES = 256 };

typedef struct mlp_weights {
    const float *norm, *up, *down;
} mlp_weights;

/* Of a lower, encoder or upper layer; the last three are the upper ones'. */
typedef struct layer_weights {
    const float *norm, *qkv, *out;
    mlp_weights mlp;
    const float *cross_norm, *cross_query, *cross_out;
} layer_weights;

struct gca_model {
    gca_sizes s;
    gca_weights *file;
    kvk_backend *be;
    const kvk_ops *ops;
    float *owned[MAX_MATRICES]; /* transposed */
    size_t n_owned;
    bool failed;
    const float *embed, *taps, *encoder_norm, *key, *value, *out_norm, *head;
    const float *query_norm[GCA_MAX_GROUPS];
    layer_weights lower[GCA_MAX_LAYERS], encoder[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    float *cos, *sin; /* [chunk, head_dim / 2] */
};

/* ---- weights ---- */

static const float *vector(gca_model *m, const char *prefix, const char *name, size_t n)
{
    char full[80];
    (void)snprintf(full, sizeof(full), "%s%s", prefix, name);
    const float *x = gca_weights_get(m->file, full, n);
    m->failed = m->failed || !x;
    return x;
}

/* [out, in] of the file as [in, out]. */
static const float *matrix(gca_model *m, const char *prefix, const char *name, size_t n_in,
                           size_t n_out)
{
    const float *x = vector(m, prefix, name, n_in * n_out);
    float *t = malloc(n_in * n_out * sizeof(float));
    if (!x || !t || m->n_owned == MAX_MATRICES) {
        m->failed = true;
        free(t);
        return NULL;
    }
    for (size_t i = 0; i < n_out; i++) {
        for (size_t j = 0; j < n_in; j++)
            t[j * n_out + i] = x[i * n_in + j];
    }
    m->owned[m->n_owned++] = t;
    return t;
}

static mlp_weights find_mlp(gca_model *m, const char *prefix)
{
    size_t h = m->s.hidden, n = m->s.mlp;
    return (mlp_weights){vector(m, prefix, "mlp.norm.weight", h),
                         matrix(m, prefix, "mlp.up.weight", h, n),
                         matrix(m, prefix, "mlp.down.weight", n, h)};
}

static void find_layers(gca_model *m, const char *kind, const char *attention, uint32_t n,
                        layer_weights *out)
{
    size_t h = m->s.hidden;
    for (uint32_t i = 0; i < n; i++) {
        char layer[40], inner[60];
        (void)snprintf(layer, sizeof(layer), "%s.%u.", kind, i);
        (void)snprintf(inner, sizeof(inner), "%s%s", layer, attention);
        out[i] = (layer_weights){.norm = vector(m, inner, "norm.weight", h),
                                 .qkv = matrix(m, inner, "qkv.weight", h, 3 * h),
                                 .out = matrix(m, inner, "out.weight", h, h),
                                 .mlp = find_mlp(m, layer)};
        if (out == m->upper) {
            out[i].cross_norm = vector(m, layer, "norm.weight", h);
            out[i].cross_query = matrix(m, layer, "query.weight", h, h);
            out[i].cross_out = matrix(m, layer, "out.weight", h, h);
        }
    }
}

static void find_weights(gca_model *m)
{
    const gca_sizes *s = &m->s;
    size_t h = s->hidden;
    m->embed = vector(m, "", "embed.weight", s->vocab * h);
    m->taps = vector(m, "", "taps", s->taps * h);
    m->encoder_norm = vector(m, "", "encoder_norm.weight", h);
    m->key = matrix(m, "", "key.weight", h, h);
    m->value = matrix(m, "", "value.weight", h, h);
    m->out_norm = vector(m, "", "out_norm.weight", h);
    m->head = matrix(m, "", "head.weight", h, s->vocab);
    find_layers(m, "lower", "attention.", s->lower, m->lower);
    find_layers(m, "encoder", "", s->encoder, m->encoder);
    find_layers(m, "upper", "attention.", s->upper, m->upper);
    for (uint32_t g = 0; g < s->groups; g++) {
        char name[40];
        (void)snprintf(name, sizeof(name), "query_norms.%u.weight", g);
        m->query_norm[g] = vector(m, "", name, h);
    }
}

static kvc_status find_angles(gca_model *m)
{
    size_t half = m->s.hidden / m->s.heads / 2;
    m->cos = malloc(2 * half * m->s.chunk * sizeof(float));
    if (!m->cos)
        return KVC_NO_MEMORY;
    m->sin = m->cos + half * m->s.chunk;
    for (size_t row = 0; row < m->s.chunk; row++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)row * pow(10000.0, -(double)i / (double)half);
            m->cos[row * half + i] = (float)cos(angle);
            m->sin[row * half + i] = (float)sin(angle);
        }
    }
    return KVC_OK;
}

kvc_status gca_model_open(const char *path, gca_model **model_p)
{
    gca_model *m = calloc(1, sizeof(*m));
    *model_p = NULL;
    if (!m)
        return KVC_NO_MEMORY;
    kvc_status st = gca_weights_load(path, &m->file, &m->s);
    if (st == KVC_OK) {
        find_weights(m);
        st = m->failed ? KVC_INVALID : find_angles(m);
    }
    if (st == KVC_OK)
        st = kvk_backend_open("cpu", NULL, &m->be);
    if (st != KVC_OK) {
        gca_model_close(m);
        return st;
    }
    m->ops = kvk_backend_ops(m->be);
    *model_p = m;
    return KVC_OK;
}

void gca_model_close(gca_model *m)
{
    if (!m)
        return;
    for (size_t i = 0; i < m->n_owned; i++)
        free(m->owned[i]);
    free(m->cos);
    kvk_backend_close(m->be);
    gca_weights_free(m->file);
    free(m);
}

const gca_sizes *gca_model_sizes(const gca_model *m)
{
    return &m->s;
}

void gca_model_opts(const gca_model *m, kvw_opts *o)
{
    o->revision = gca_weights_fingerprint(m->file);
    o->n_layers = 1;
    o->n_q_heads = o->n_kv_heads = m->s.heads;
    o->head_dim = m->s.hidden / m->s.heads;
    o->dtype = KVK_F32;
    o->selector = "gca";
    o->k = m->s.topk;
    o->landmark_dim = m->s.hidden;
    o->chunk_tokens = GCA_PASS_CHUNKS * m->s.chunk;
    o->block_tokens = m->s.chunk;
    o->n_sink = o->n_recent = m->s.chunk;
}

/* ---- a context ---- */

/* K and V of the rows that a layer's window reaches back to, then those of the pass. */
typedef struct window {
    float *k, *v; /* [window + pass, hidden] */
    size_t n;     /* rows kept */
} window;

struct gca_context {
    const gca_model *m;
    kvw_seq *seq;
    kvw_retriever *group[GCA_MAX_GROUPS];
    uint32_t n_chunks, n_tail;
    uint32_t *last; /* [taps] tokens before the pass, oldest first */
    uint32_t n_last;
    window lower[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    float *memory; /* all below, and the windows */
    float *x, *e, *norm, *qkv, *mix, *mlp, *k, *v, *marks;
};

kvc_status gca_context_open(const gca_model *m, kvw_seq *seq, gca_context **context_p)
{
    const gca_sizes *s = &m->s;
    size_t h = s->hidden, pass = (size_t)GCA_PASS_CHUNKS * s->chunk, rows = s->window + pass;
    size_t windows = 2 * (size_t)(s->lower + s->upper) * rows * h;
    gca_context *c = calloc(1, sizeof(*c));
    *context_p = NULL;
    if (!c)
        return KVC_NO_MEMORY;
    c->m = m;
    c->seq = seq;
    c->last = calloc(s->taps, sizeof(*c->last));
    c->memory = calloc(windows + pass * (9 * h + s->mlp), sizeof(float));
    kvc_status st = c->last && c->memory ? KVC_OK : KVC_NO_MEMORY;
    for (uint32_t g = 0; st == KVC_OK && g < s->groups; g++)
        st = kvw_retriever_open(seq, 0, KVW_ALL_HEADS, &c->group[g]);
    if (st != KVC_OK) {
        gca_context_close(c);
        return st;
    }
    float *p = c->memory;
    for (uint32_t i = 0; i < s->lower + s->upper; i++, p += 2 * rows * h)
        *(i < s->lower ? &c->lower[i] : &c->upper[i - s->lower]) = (window){p, p + rows * h, 0};
    float **const parts[] = {&c->x, &c->e, &c->norm, &c->mix, &c->k, &c->v, &c->qkv, &c->mlp};
    const size_t widths[] = {h, h, h, h, h, h, 3 * h, s->mlp};
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++, p += pass * widths[i - 1])
        *parts[i] = p;
    *context_p = c;
    return KVC_OK;
}

void gca_context_close(gca_context *c)
{
    if (!c)
        return;
    for (uint32_t g = 0; g < GCA_MAX_GROUPS; g++)
        kvw_retriever_close(c->group[g]);
    free(c->last);
    free(c->memory);
    free(c);
}

/* ---- pieces ---- */

/* RMS norm of n rows. */
static void rms_norm(const float *x, const float *weight, size_t n, size_t h, float *out)
{
    for (size_t i = 0; i < n; i++, x += h, out += h) {
        double sum = 0;
        for (size_t j = 0; j < h; j++)
            sum += (double)x[j] * (double)x[j];
        float r = (float)(1 / sqrt(sum / (double)h + 1e-6));
        for (size_t j = 0; j < h; j++)
            out[j] = x[j] * r * weight[j];
    }
}

static kvc_status product(const gca_context *c, const float *in, size_t n, size_t n_in,
                          const float *w, size_t n_out, float *out)
{
    const kvk_project_args args = {.in = {in, n_in * sizeof(float), KVK_F32},
                                   .n = (uint32_t)n,
                                   .n_heads = 1,
                                   .dim_in = (uint32_t)n_in,
                                   .dim_out = (uint32_t)n_out,
                                   .proj = w,
                                   .out = out};
    return c->m->ops->project(c->m->be, &args, NULL);
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

/* x += w(mix): what attention mixed, through its output matrix. */
static kvc_status add_product(gca_context *c, float *x, size_t n, const float *w)
{
    size_t h = c->m->s.hidden;
    kvc_status st = product(c, c->mix, n, h, w, h, c->norm);
    if (st == KVC_OK)
        add(x, c->norm, n * h);
    return st;
}

static kvc_status mlp(gca_context *c, float *x, size_t n, const mlp_weights *w)
{
    size_t h = c->m->s.hidden, wide = c->m->s.mlp;
    rms_norm(x, w->norm, n, h, c->norm);
    kvc_status st = product(c, c->norm, n, h, w->up, wide, c->mlp);
    for (size_t i = 0; i < n * wide; i++) {
        float u = c->mlp[i];
        c->mlp[i] = 0.5f * u * (1 + tanhf(0.7978845608f * (u + 0.044715f * u * u * u)));
    }
    if (st == KVC_OK)
        st = product(c, c->mlp, n, wide, w->down, h, c->mix);
    if (st == KVC_OK)
        add(x, c->mix, n * h);
    return st;
}

/* One softmax of one head: out [d] over n rows of k and v, h apart; row j gets bias slope * j. */
static void attend(const float *q, const float *k, const float *v, size_t n, size_t h, size_t d,
                   float slope, float *out)
{
    float s[2048], max = -INFINITY, sum = 0, scale = 1 / sqrtf((float)d);
    for (size_t j = 0; j < n; j++) {
        float x = 0;
        for (size_t t = 0; t < d; t++)
            x += q[t] * k[j * h + t];
        s[j] = x * scale + slope * (float)j;
        max = s[j] > max ? s[j] : max;
    }
    memset(out, 0, d * sizeof(*out));
    for (size_t j = 0; j < n; j++) {
        float e = expf(s[j] - max);
        sum += e;
        for (size_t t = 0; t < d; t++)
            out[t] += e * v[j * h + t];
    }
    for (size_t t = 0; t < d; t++)
        out[t] /= sum;
}

/* x += attention over the window, ALiBi by distance; the window then holds the pass's last rows. */
static kvc_status window_layer(gca_context *c, float *x, size_t n, const layer_weights *w,
                               window *past)
{
    const gca_sizes *s = &c->m->s;
    size_t h = s->hidden, d = h / s->heads, bytes = h * sizeof(float);
    rms_norm(x, w->norm, n, h, c->norm);
    kvc_status st = product(c, c->norm, n, h, w->qkv, 3 * h, c->qkv);
    for (size_t i = 0; i < n; i++) {
        memcpy(past->k + (past->n + i) * h, c->qkv + i * 3 * h + h, bytes);
        memcpy(past->v + (past->n + i) * h, c->qkv + i * 3 * h + 2 * h, bytes);
    }
    for (size_t i = 0; i < n; i++) {
        size_t end = past->n + i + 1, first = end > s->window ? end - s->window : 0;
        for (size_t head = 0; head < s->heads; head++) {
            float slope = exp2f(-8.0f * (float)(head + 1) / (float)s->heads);
            size_t at = first * h + head * d;
            attend(c->qkv + i * 3 * h + head * d, past->k + at, past->v + at, end - first, h, d,
                   slope, c->mix + i * h + head * d);
        }
    }
    size_t all = past->n + n, kept = all < s->window ? all : s->window;
    memmove(past->k, past->k + (all - kept) * h, kept * bytes);
    memmove(past->v, past->v + (all - kept) * h, kept * bytes);
    past->n = kept;
    return st == KVC_OK ? add_product(c, x, n, w->out) : st;
}

/* Rotates one row's head in place: pairs (i, i + half). */
static void rotate(float *x, const float *cos, const float *sin, size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
}

/* ---- halves ---- */

/* Tokens [n] -> c->x: embeddings with those of the few tokens before, then the lower layers. */
static kvc_status lower_half(gca_context *c, const uint32_t *tokens, uint32_t n)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, taps = m->s.taps;
    for (size_t i = 0; i < n; i++) {
        float *x = c->x + i * h;
        if (tokens[i] >= m->s.vocab)
            return KVC_INVALID;
        memcpy(x, m->embed + tokens[i] * h, h * sizeof(float));
        for (size_t j = 0; j < taps; j++) {
            bool here = i >= j + 1, before = !here && j + 1 - i <= c->n_last;
            if (!here && !before)
                continue;
            uint32_t token = here ? tokens[i - j - 1] : c->last[taps - (j + 1 - i)];
            for (size_t t = 0; t < h; t++)
                x[t] += m->taps[j * h + t] * m->embed[token * h + t];
        }
    }
    memcpy(c->last, tokens + n - taps, taps * sizeof(*tokens)); /* a pass is longer than taps */
    c->n_last = (uint32_t)taps;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < m->s.lower; i++) {
        st = window_layer(c, c->x, n, &m->lower[i], &c->lower[i]);
        if (st == KVC_OK)
            st = mlp(c, c->x, n, &m->lower[i].mlp);
    }
    return st;
}

/* Bidirectional attention inside each chunk, with rotary positions from its first row. */
static kvc_status encoder_layer(gca_context *c, size_t n, const layer_weights *w)
{
    const gca_sizes *s = &c->m->s;
    size_t h = s->hidden, d = h / s->heads, half = d / 2;
    rms_norm(c->e, w->norm, n, h, c->norm);
    kvc_status st = product(c, c->norm, n, h, w->qkv, 3 * h, c->qkv);
    for (size_t i = 0; i < n; i++) {
        size_t at = i % s->chunk * half;
        for (size_t part = 0; part < 2 * s->heads; part++) /* the heads of q, then those of k */
            rotate(c->qkv + i * 3 * h + part * d, c->m->cos + at, c->m->sin + at, half);
    }
    for (size_t i = 0; i < n; i++) {
        const float *chunk = c->qkv + i / s->chunk * s->chunk * 3 * h;
        for (size_t head = 0; head < s->heads; head++)
            attend(c->qkv + i * 3 * h + head * d, chunk + h + head * d, chunk + 2 * h + head * d,
                   s->chunk, 3 * h, d, 0, c->mix + i * h + head * d);
    }
    if (st == KVC_OK)
        st = add_product(c, c->e, n, w->out);
    return st == KVC_OK ? mlp(c, c->e, n, &w->mlp) : st;
}

/* c->x -> K, V and landmarks of its chunks: a row has the V of the next token, a landmark's row is
 * zero. */
static kvc_status encode(gca_context *c, size_t n)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, s = m->s.chunk, bytes = h * sizeof(float);
    memcpy(c->e, c->x, n * bytes);
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < m->s.encoder; i++)
        st = encoder_layer(c, n, &m->encoder[i]);
    rms_norm(c->e, m->encoder_norm, n, h, c->norm);
    if (st == KVC_OK)
        st = product(c, c->norm, n, h, m->key, h, c->k);
    if (st == KVC_OK)
        st = product(c, c->norm, n, h, m->value, h, c->v);
    c->marks = c->mix;
    for (size_t i = 0; i < n; i += s) {
        memcpy(c->marks + i / s * h, c->norm + (i + s - 1) * h, bytes);
        memmove(c->v + i * h, c->v + (i + 1) * h, (s - 1) * bytes);
        memset(c->v + (i + s - 1) * h, 0, bytes);
        memset(c->k + (i + s - 1) * h, 0, bytes);
    }
    return st;
}

static kvc_status append(gca_context *c, const uint32_t *tokens, uint32_t n_chunks)
{
    uint32_t n = n_chunks * c->m->s.chunk;
    kvc_status st = lower_half(c, tokens, n);
    if (st == KVC_OK)
        st = encode(c, n);
    if (st == KVC_OK)
        st = kvw_tokens(c->seq, tokens, n);
    if (st == KVC_OK)
        st = kvw_append_chunks(c->seq, 0, c->k, c->v, c->marks, n);
    c->n_chunks += n_chunks;
    return st;
}

kvc_status gca_context_body(gca_context *c, const uint32_t *tokens, uint32_t n_chunks)
{
    if (n_chunks == 0 || n_chunks > GCA_PASS_CHUNKS || c->n_tail != 0)
        return KVC_INVALID;
    return append(c, tokens, n_chunks);
}

/* One upper layer over the chunk in c->x; the tail's first chunk has no memory. */
static kvc_status upper_layer(gca_context *c, const layer_weights *w, window *past,
                              kvw_retriever *group)
{
    size_t h = c->m->s.hidden, n = c->m->s.chunk;
    kvc_status st = window_layer(c, c->x, n, w, past);
    if (st == KVC_OK && c->n_tail != 0) {
        rms_norm(c->x, w->cross_norm, n, h, c->norm);
        st = product(c, c->norm, n, h, w->cross_query, h, c->mix);
        if (st == KVC_OK)
            st = kvw_retriever_attend(group, c->mix, (uint32_t)n, c->mix);
        if (st == KVC_OK)
            st = add_product(c, c->x, n, w->cross_out);
    }
    return st == KVC_OK ? mlp(c, c->x, n, &w->mlp) : st;
}

kvc_status gca_context_tail(gca_context *c, const uint32_t *tokens, float *logits)
{
    const gca_model *m = c->m;
    size_t h = m->s.hidden, n = m->s.chunk, size = m->s.upper / m->s.groups;
    float query[1024];
    kvc_status st = append(c, tokens, 1);
    for (size_t g = 0; st == KVC_OK && g < m->s.groups; g++) {
        /* before the group's layers; asked with when they are done with what they have */
        rms_norm(c->x + (n - 1) * h, m->query_norm[g], 1, h, query);
        for (size_t i = g * size; st == KVC_OK && i < (g + 1) * size; i++)
            st = upper_layer(c, &m->upper[i], &c->upper[i], c->group[g]);
        if (st == KVC_OK)
            st = kvw_retrieve(c->group[g], query, c->n_chunks - 1);
    }
    c->n_tail++;
    if (st != KVC_OK)
        return st;
    rms_norm(c->x, m->out_norm, n, h, c->norm);
    return product(c, c->norm, n, h, m->head, m->s.vocab, logits);
}
