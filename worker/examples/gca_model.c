/*
 * gca_model.c: the decoder's weights, found by name and turned so that the product op takes them;
 * see gca_model.h. Immutable after opening.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "gca_internal.h"

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
    if (!x || !t || m->n_owned == GCA_MAX_MATRICES) {
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
    o->put_window = 8 * GCA_PASS_CHUNKS;
}
