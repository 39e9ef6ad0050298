/*
 * gca_model.c: the decoder's weights, found by name, turned so that products take them, and kept
 * where its math reads them; see gca_model.h. Immutable after opening.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gca_internal.h"

/* ---- weights ---- */

/* Notes the first thing that is not there. */
static void fail(gca_model *m, const float *x, kvc_status why)
{
    m->failed = m->failed == KVC_OK && !x ? why : m->failed;
}

static const float *in_file(gca_model *m, const char *prefix, const char *name, size_t n)
{
    char full[80];
    (void)snprintf(full, sizeof(full), "%s%s", prefix, name);
    const float *x = gca_weights_get(m->file, full, n);
    fail(m, x, KVC_INVALID);
    return x;
}

static const float *keep(gca_model *m, const float *x, size_t n)
{
    const float *kept = x ? m->math->keep(m, x, n) : NULL;
    fail(m, kept, KVC_NO_MEMORY);
    return kept;
}

static const float *vector(gca_model *m, const char *prefix, const char *name, size_t n)
{
    return keep(m, in_file(m, prefix, name, n), n);
}

/* [out, in] of the file as [in, out]. */
static const float *matrix(gca_model *m, const char *prefix, const char *name, size_t n_in,
                           size_t n_out)
{
    const float *x = in_file(m, prefix, name, n_in * n_out);
    float *t = malloc(n_in * n_out * sizeof(float));
    if (!x || !t || m->n_owned == GCA_MAX_MATRICES) {
        fail(m, NULL, KVC_NO_MEMORY);
        free(t);
        return NULL;
    }
    for (size_t i = 0; i < n_out; i++) {
        for (size_t j = 0; j < n_in; j++)
            t[j * n_out + i] = x[i * n_in + j];
    }
    m->owned[m->n_owned++] = t;
    return keep(m, t, n_in * n_out);
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

static void find_angles(gca_model *m)
{
    size_t half = m->s.hidden / m->s.heads / 2, n = half * m->s.chunk;
    float *angles = malloc(2 * n * sizeof(float));
    if (!angles || m->n_owned == GCA_MAX_MATRICES) {
        fail(m, NULL, KVC_NO_MEMORY);
        free(angles);
        return;
    }
    m->owned[m->n_owned++] = angles;
    for (size_t row = 0; row < m->s.chunk; row++) {
        for (size_t i = 0; i < half; i++) {
            double angle = (double)row * pow(10000.0, -(double)i / (double)half);
            angles[row * half + i] = (float)cos(angle);
            angles[n + row * half + i] = (float)sin(angle);
        }
    }
    m->cos = keep(m, angles, n);
    m->sin = keep(m, angles + n, n);
}

/* The math that a backend's name asks for, and the device's number; NULL: it names none. */
static const gca_math *find_math(const char *backend, uint32_t *number_p)
{
    static const gca_math *const all[] = {&gca_math_cpu, &gca_math_cuda};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        size_t n = strlen(all[i]->name);
        char *end = NULL;
        if (strncmp(backend, all[i]->name, n) != 0 ||
            strlen(backend) >= sizeof(((gca_model *)0)->backend))
            continue;
        *number_p = backend[n] == ':' ? (uint32_t)strtoul(backend + n + 1, &end, 10) : 0;
        if (backend[n] == 0 || (end && end != backend + n + 1 && *end == 0))
            return all[i];
    }
    return NULL;
}

static kvc_status open_all(gca_model *m, const char *path, uint32_t number)
{
    kvc_status st = gca_weights_load(path, &m->file, &m->s);
    if (st == KVC_OK)
        st = m->math->open(m, number);
    if (st == KVC_OK) {
        find_weights(m);
        find_angles(m);
    }
    return st == KVC_OK ? m->failed : st;
}

kvc_status gca_model_open(const char *path, const char *backend, gca_model **model_p)
{
    uint32_t number = 0;
    const gca_math *math = find_math(backend, &number);
    gca_model *m = math ? calloc(1, sizeof(*m)) : NULL;
    *model_p = NULL;
    if (!m)
        return math ? KVC_NO_MEMORY : KVC_INVALID;
    m->math = math;
    memcpy(m->backend, backend, strlen(backend) + 1);
    kvc_status st = open_all(m, path, number);
    if (st != KVC_OK) {
        gca_model_close(m);
        return st;
    }
    *model_p = m;
    return KVC_OK;
}

void gca_model_close(gca_model *m)
{
    if (!m)
        return;
    for (size_t i = 0; i < m->n_owned; i++)
        free(m->owned[i]);
    m->math->close(m);
    gca_weights_free(m->file);
    free(m);
}

const gca_sizes *gca_model_sizes(const gca_model *m)
{
    return &m->s;
}

uint32_t gca_model_pass_chunks(const gca_model *m)
{
    return m->math->pass_chunks;
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
    o->backend = m->backend;
    o->way = "rows"; /* partials made elsewhere would have other bits */
    o->chunk_tokens = GCA_WORKER_CHUNKS * m->s.chunk;
    o->block_tokens = m->s.chunk;
    o->n_sink = o->n_recent = m->s.chunk;
    o->put_window = 8 * GCA_WORKER_CHUNKS;
}
