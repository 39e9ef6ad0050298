/*
 * gca_internal.h: what the decoder's files share: weights as found, a context's state, the table of
 * what is done to numbers (gca_math) and the layers made of it. All matrices are [in, out] f32; h
 * is hidden, rows are h apart unless a stride says otherwise. Nothing here is thread-safe beyond
 * what gca_model.h says.
 */
#ifndef GCA_INTERNAL_H
#define GCA_INTERNAL_H

#include <stdbool.h>

#include "gca_model.h"

enum {
    GCA_MAX_MATRICES = 256,
    GCA_MAX_TAPS = 16,
    GCA_WORKER_CHUNKS = 8, /* a pass of the worker: enters its recipe */
};

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
    const struct gca_math *math;
    void *form; /* the math's own */
    char backend[16];
    float *owned[GCA_MAX_MATRICES]; /* transposed */
    size_t n_owned;
    kvc_status failed; /* while it is being opened */
    /* where the math reads them */
    const float *embed, *taps, *encoder_norm, *key, *value, *out_norm, *head;
    const float *query_norm[GCA_MAX_GROUPS];
    layer_weights lower[GCA_MAX_LAYERS], encoder[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    const float *cos, *sin; /* [chunk, head_dim / 2] */
};

/* What a layer's window reaches back to, n rows, then room for those of the pass: K and V by
 * themselves on the CPU; on a GPU `k` has rows of q, K and V as the product writes them. */
typedef struct window {
    float *k, *v;
    size_t n;
} window;

struct gca_context {
    const gca_model *m;
    kvw_seq *seq;
    kvw_retriever *group[GCA_MAX_GROUPS];
    void *form;        /* the math's own */
    uint64_t n_chunks; /* appended */
    uint64_t n_tail;   /* of them in the tail */
    uint32_t n_rows;   /* of the tail's chunk under way */
    uint32_t n_last;   /* tokens before the pass that are known, at the end of last */
    uint32_t last[GCA_MAX_TAPS];
    uint32_t *tokens; /* [chunk] of the chunk under way */
    /* where the math reads and writes: one memory */
    float *memory;
    float *chunk_x; /* [chunk, hidden] lower half's output of the chunk under way */
    window lower[GCA_MAX_LAYERS], upper[GCA_MAX_LAYERS];
    float *x, *e, *norm, *mix, *k, *v, *qkv, *mlp, *sum, *logits;
};

/* ---- what is done to numbers, and where they lie: gca_cpu.c, gca_cuda.c ---- */

typedef enum gca_form { GCA_STORE, GCA_GELU, GCA_ADD } gca_form;

/* Chunks as the worker takes them: host memory, until the next call of the context. */
typedef struct gca_encoded {
    const float *k, *v, *marks;
} gca_encoded;

/* Shapes as in the context: n rows. What fails leaves the context of no more use. */
typedef struct gca_math {
    const char *name;
    uint32_t pass_chunks;                              /* most that a pass of the body has */
    kvc_status (*open)(gca_model *m, uint32_t number); /* m->form; the file is loaded */
    void (*close)(gca_model *m);                       /* m->form may be NULL */
    /* n numbers where the math reads them, as long as the model; NULL: no memory. */
    const float *(*keep)(gca_model *m, const float *x, size_t n);
    /* c->memory of n numbers, and c->form. */
    kvc_status (*context_open)(gca_context *c, size_t n);
    void (*context_close)(gca_context *c);
    size_t (*window_floats)(const gca_model *m, size_t pass); /* of a window's memory */
    kvc_status (*copy)(gca_context *c, float *to, const float *from, size_t n);
    /* Numbers in host memory, after all that was done before; changed ones go back by `back`. */
    kvc_status (*host)(gca_context *c, float *x, size_t n, float **host_p);
    kvc_status (*back)(gca_context *c, float *x, size_t n);
    /* Embeddings of tokens with those of the few before, which c->last has, into c->x. */
    kvc_status (*embed)(gca_context *c, const uint32_t *tokens, uint32_t n);
    kvc_status (*norm)(gca_context *c, const float *x, const float *weight, size_t n, float *out);
    kvc_status (*product)(gca_context *c, const float *in, size_t n, size_t n_in, const float *w,
                          size_t n_out, gca_form form, float *out);
    /* Where the product of a window layer leaves q, K and V of the pass's rows. */
    float *(*qkv)(gca_context *c, window *past);
    /* Attention over those and what the window has, ALiBi by distance, into c->mix; `past` then
     * holds the pass's last rows. */
    kvc_status (*window)(gca_context *c, size_t n, window *past);
    /* Both ways inside each chunk of c->qkv, with rotary positions from its first row. */
    kvc_status (*chunks)(gca_context *c, size_t n);
    /* c->k and c->v of whole chunks and the landmarks in c->norm, of c->e: a row has the V of the
     * next token, a landmark's row is zero. */
    kvc_status (*encoded)(gca_context *c, size_t n, gca_encoded *out_p);
} gca_math;

extern const gca_math gca_math_cpu, gca_math_cuda;

/* ---- gca_math.c: plain loops that the compiler turns into vectors ---- */

void gca_rms_norm(const float *x, const float *weight, size_t n, size_t h, float *out);
/* In place: softmax of scale * s[j] + slope * j for first <= j < end, zero elsewhere. */
void gca_softmax(float *s, size_t n, size_t first, size_t end, float scale, float slope);
void gca_gelu(float *x, size_t n);
void gca_add(float *x, const float *y, size_t n);
/* x[i] += a[i] * y[i] */
void gca_add_scaled(float *x, const float *a, const float *y, size_t n);
/* Of ALiBi. */
float gca_slope(uint32_t head, uint32_t heads);

/* ---- gca_layers.c ---- */

kvc_status gca_mlp(gca_context *c, float *x, size_t n, const mlp_weights *w) KVC_MUST_CHECK;
/* c->x += attention over the window. */
kvc_status gca_window_layer(gca_context *c, size_t n, const layer_weights *w,
                            window *past) KVC_MUST_CHECK;
/* A layer of the encoder over c->e: n rows, whole chunks. */
kvc_status gca_encoder_layer(gca_context *c, size_t n, const layer_weights *w) KVC_MUST_CHECK;

#endif
