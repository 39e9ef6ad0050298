/*
 * gca_internal.h: what the decoder's files share: weights as found, a context's state, the pieces
 * that a layer is made of. All matrices are [in, out] f32; h is hidden, rows are h apart unless a
 * stride says otherwise. Nothing here is thread-safe beyond what gca_model.h says.
 */
#ifndef GCA_INTERNAL_H
#define GCA_INTERNAL_H

#include <stdbool.h>

#include "gca_model.h"

enum { GCA_MAX_MATRICES = 256, GCA_MAX_TAPS = 16 };

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
    float *owned[GCA_MAX_MATRICES]; /* transposed */
    size_t n_owned;
    bool failed;
    const float *embed, *taps, *encoder_norm, *key, *value, *out_norm, *head;
    const float *query_norm[GCA_MAX_GROUPS];
    layer_weights lower[GCA_MAX_LAYERS], encoder[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    float *cos, *sin; /* [chunk, head_dim / 2] */
};

/* K and V of the rows that a layer's window reaches back to, then those of the pass. */
typedef struct window {
    float *k, *v; /* [window + pass, hidden] */
    size_t n;     /* rows kept */
} window;

struct gca_context {
    const gca_model *m;
    kvw_seq *seq;
    kvw_retriever *group[GCA_MAX_GROUPS];
    uint64_t n_chunks; /* appended */
    uint64_t n_tail;   /* of them in the tail */
    uint32_t n_rows;   /* of the tail's chunk under way */
    uint32_t n_last;   /* tokens before the pass that are known, at the end of last */
    uint32_t last[GCA_MAX_TAPS];
    uint32_t *tokens; /* [chunk] of the chunk under way */
    float *chunk_x;   /* [chunk, hidden] lower half's output of the chunk under way */
    window lower[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    float *memory; /* all that follows, the windows and chunk_x */
    float *x, *e, *norm, *mix, *k, *v, *qkv, *mlp;
    float *kt, *vh, *scores; /* of one block of queries: K turned, V by head, attention */
};

/* n queries over n_keys keys; query i sees those up to i + n_keys - n, at most `back` of them. */
typedef struct gca_attention {
    const float *q, *k, *v;
    size_t q_stride, kv_stride; /* elements between rows */
    size_t n, n_keys, back;     /* back 0: every query sees every key */
    float *out;                 /* [n, h] */
} gca_attention;

/* ---- gca_math.c: plain loops that the compiler turns into vectors ---- */

void gca_rms_norm(const float *x, const float *weight, size_t n, size_t h, float *out);
/* In place: softmax of scale * s[j] + slope * j for first <= j < end, zero elsewhere. */
void gca_softmax(float *s, size_t n, size_t first, size_t end, float scale, float slope);
void gca_gelu(float *x, size_t n);
void gca_add(float *x, const float *y, size_t n);
/* x[i] += a[i] * y[i] */
void gca_add_scaled(float *x, const float *a, const float *y, size_t n);

/* ---- gca_layers.c ---- */

kvc_status gca_product(const gca_context *c, const float *in, size_t n, size_t n_in, const float *w,
                       size_t n_out, float *out) KVC_MUST_CHECK;
/* x += w(mix): what attention mixed, through its output matrix. */
kvc_status gca_add_product(gca_context *c, float *x, size_t n, const float *w) KVC_MUST_CHECK;
kvc_status gca_mlp(gca_context *c, float *x, size_t n, const mlp_weights *w) KVC_MUST_CHECK;
/* x += attention over the window, ALiBi by distance; `past` then holds the pass's last rows. */
kvc_status gca_window_layer(gca_context *c, float *x, size_t n, const layer_weights *w,
                            window *past) KVC_MUST_CHECK;
/* A layer of the encoder over c->e: n rows, whole chunks. */
kvc_status gca_encoder_layer(gca_context *c, size_t n, const layer_weights *w) KVC_MUST_CHECK;

#endif
