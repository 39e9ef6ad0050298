/*
 * gca_cuda.c: the decoder's math on a GPU, over kvk/cuda_layers.h: f32 like the CPU's, sums in
 * another order. Belongs to the context's thread.
 *
 * A context has a stream of its own, on which everything happens in order; the thread waits for it
 * where numbers come to the host. What a window reaches back to lies in front of the pass's rows,
 * as the product wrote it: q, K and V in one row.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "gca_internal.h"
#include "kvk/cuda_layers.h"

enum { MAX_KEPT = 2 * GCA_MAX_MATRICES };

typedef struct cuda_model {
    kvk_cuda *cuda;
    void *kept[MAX_KEPT];
    size_t n_kept;
    const float *slopes; /* [heads] */
} cuda_model;

typedef struct cuda_context {
    kvk_stream *stream;
    void *memory, *pinned;
    uint32_t *tokens; /* [taps + pass] */
    float *scratch;   /* [window, 3 h] */
    float *marks;     /* [pass_chunks, h] */
    /* pinned */
    uint32_t *host_tokens;
    float *host, *host_k, *host_v, *host_marks; /* host: [chunk] rows of the widest kind */
} cuda_context;

static kvk_cuda *cuda_of(const gca_context *c)
{
    const cuda_model *form = c->m->form;
    return form->cuda;
}

/* ---- model ---- */

static void cuda_close(gca_model *m)
{
    cuda_model *form = m->form;
    if (!form)
        return;
    for (size_t i = 0; i < form->n_kept; i++)
        kvk_cuda_free(form->cuda, KVK_CUDA_DEVICE, form->kept[i]);
    kvk_cuda_close(form->cuda);
    free(form);
}

static const float *cuda_keep(gca_model *m, const float *x, size_t n)
{
    cuda_model *form = m->form;
    void *p = NULL;
    if (form->n_kept == MAX_KEPT ||
        kvk_cuda_alloc(form->cuda, KVK_CUDA_DEVICE, n * sizeof(float), &p) != KVC_OK)
        return NULL;
    form->kept[form->n_kept++] = p;
    bool there = kvk_cuda_copy(form->cuda, p, x, n * sizeof(float), NULL) == KVC_OK &&
                 kvk_cuda_stream_sync(form->cuda, NULL) == KVC_OK;
    return there ? p : NULL;
}

static kvc_status cuda_open(gca_model *m, uint32_t number)
{
    const gca_sizes *s = &m->s;
    float slopes[1024];
    cuda_model *form = calloc(1, sizeof(*form));
    m->form = form;
    if (!form)
        return KVC_NO_MEMORY;
    uint32_t dim = s->hidden / s->heads;
    if ((dim != 32 && dim != 64) || s->mlp % 4 != 0 || s->vocab % 4 != 0)
        return KVC_UNSUPPORTED;
    kvc_status st = kvk_cuda_open(number, &form->cuda);
    if (st != KVC_OK)
        return st;
    for (uint32_t head = 0; head < s->heads; head++)
        slopes[head] = gca_slope(head, s->heads);
    form->slopes = cuda_keep(m, slopes, s->heads);
    return form->slopes ? KVC_OK : KVC_NO_MEMORY;
}

/* ---- context ---- */

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Where its pieces begin in a memory, each on 16 bytes; returns the floats. */
static size_t share_device(const gca_model *m, cuda_context *own, float *p)
{
    const gca_sizes *s = &m->s;
    size_t marks = (size_t)m->math->pass_chunks * s->hidden, back = 3ul * s->window * s->hidden;
    own->scratch = p;
    own->marks = p ? p + back : NULL;
    own->tokens = p ? (uint32_t *)(void *)(p + back + marks) : NULL;
    return back + marks + GCA_MAX_TAPS + (size_t)m->math->pass_chunks * s->chunk;
}

static size_t share_pinned(const gca_model *m, cuda_context *own, float *p)
{
    const gca_sizes *s = &m->s;
    size_t pass = (size_t)m->math->pass_chunks * s->chunk, rows = pass * s->hidden;
    size_t marks = (size_t)m->math->pass_chunks * s->hidden;
    own->host_k = p;
    own->host_v = p ? p + rows : NULL;
    own->host_marks = p ? p + 2 * rows : NULL;
    own->host = p ? p + 2 * rows + marks : NULL;
    size_t at = 2 * rows + marks + s->chunk * most(s->hidden, s->vocab);
    own->host_tokens = p ? (uint32_t *)(void *)(p + at) : NULL;
    return at + GCA_MAX_TAPS + pass;
}

static void cuda_context_close(gca_context *c)
{
    cuda_context *own = c->form;
    if (!own)
        return;
    kvk_cuda *cuda = cuda_of(c);
    bool idle = !own->stream || kvk_cuda_stream_sync(cuda, own->stream) == KVC_OK;
    if (idle) { /* else the device is lost, and its memory with it */
        kvk_cuda_free(cuda, KVK_CUDA_DEVICE, c->memory);
        kvk_cuda_free(cuda, KVK_CUDA_DEVICE, own->memory);
        kvk_cuda_free(cuda, KVK_CUDA_PINNED, own->pinned);
    }
    kvk_cuda_stream_destroy(cuda, own->stream);
    free(own);
}

static kvc_status cuda_context_open(gca_context *c, size_t n)
{
    kvk_cuda *cuda = cuda_of(c);
    cuda_context *own = calloc(1, sizeof(*own));
    void *memory = NULL;
    c->form = own;
    if (!own)
        return KVC_NO_MEMORY;
    kvc_status st = kvk_cuda_stream_create(cuda, &own->stream);
    if (st == KVC_OK)
        st = kvk_cuda_alloc(cuda, KVK_CUDA_DEVICE, n * sizeof(float), &memory);
    c->memory = memory;
    if (st == KVC_OK)
        st = kvk_cuda_alloc(cuda, KVK_CUDA_DEVICE, share_device(c->m, own, NULL) * sizeof(float),
                            &own->memory);
    if (st == KVC_OK)
        st = kvk_cuda_alloc(cuda, KVK_CUDA_PINNED, share_pinned(c->m, own, NULL) * sizeof(float),
                            &own->pinned);
    if (st == KVC_OK) {
        (void)share_device(c->m, own, own->memory);
        (void)share_pinned(c->m, own, own->pinned);
    }
    return st;
}

static size_t cuda_window_floats(const gca_model *m, size_t pass)
{
    return 3 * (m->s.window + pass) * m->s.hidden;
}

static kvc_status cuda_copy(gca_context *c, float *to, const float *from, size_t n)
{
    const cuda_context *own = c->form;
    return kvk_cuda_copy(cuda_of(c), to, from, n * sizeof(float), own->stream);
}

static kvc_status wait(gca_context *c)
{
    const cuda_context *own = c->form;
    return kvk_cuda_stream_sync(cuda_of(c), own->stream);
}

static kvc_status cuda_host(gca_context *c, float *x, size_t n, float **host_p)
{
    const cuda_context *own = c->form;
    kvc_status st = cuda_copy(c, own->host, x, n);
    *host_p = own->host;
    return st == KVC_OK ? wait(c) : st;
}

static kvc_status cuda_back(gca_context *c, float *x, size_t n)
{
    const cuda_context *own = c->form;
    return cuda_copy(c, x, own->host, n);
}

/* ---- rows ---- */

static kvc_status cuda_embed(gca_context *c, const uint32_t *tokens, uint32_t n)
{
    const gca_model *m = c->m;
    const cuda_context *own = c->form;
    uint32_t before = c->n_last;
    memcpy(own->host_tokens, c->last + m->s.taps - before, before * sizeof(*tokens));
    memcpy(own->host_tokens + before, tokens, n * sizeof(*tokens));
    const kvk_cuda_embed_args args = {.tokens = own->tokens,
                                      .n = n,
                                      .n_before = before,
                                      .n_taps = m->s.taps,
                                      .vocab = m->s.vocab,
                                      .dim = m->s.hidden,
                                      .table = m->embed,
                                      .taps = m->taps,
                                      .out = c->x};
    kvc_status st = kvk_cuda_copy(cuda_of(c), own->tokens, own->host_tokens,
                                  (before + n) * sizeof(*tokens), own->stream);
    return st == KVC_OK ? kvk_cuda_embed(cuda_of(c), &args, own->stream) : st;
}

static kvc_status norm_rows(gca_context *c, const float *x, uint32_t stride, const float *weight,
                            size_t n, float *out)
{
    const cuda_context *own = c->form;
    const kvk_cuda_rms_norm_args args = {.x = x,
                                         .n = (uint32_t)n,
                                         .dim = c->m->s.hidden,
                                         .stride = stride,
                                         .weight = weight,
                                         .out = out};
    return kvk_cuda_rms_norm(cuda_of(c), &args, own->stream);
}

static kvc_status cuda_norm(gca_context *c, const float *x, const float *weight, size_t n,
                            float *out)
{
    return norm_rows(c, x, c->m->s.hidden, weight, n, out);
}

static kvc_status cuda_product(gca_context *c, const float *in, size_t n, size_t n_in,
                               const float *w, size_t n_out, gca_form form, float *out)
{
    const cuda_context *own = c->form;
    const kvk_cuda_linear_args args = {.in = in,
                                       .n = (uint32_t)n,
                                       .n_in = (uint32_t)n_in,
                                       .n_out = (uint32_t)n_out,
                                       .weight = w,
                                       .form = form == GCA_GELU  ? KVK_CUDA_GELU
                                               : form == GCA_ADD ? KVK_CUDA_ADD
                                                                 : KVK_CUDA_STORE,
                                       .out = out};
    return kvk_cuda_linear(cuda_of(c), &args, own->stream);
}

/* ---- attention ---- */

/* The last n of n_keys rows [q, K, V] query those: back as in gca_sizes.window, 0: their chunk. */
static kvc_status attend(gca_context *c, const float *rows, size_t n_keys, size_t n, uint32_t back)
{
    const gca_sizes *s = &c->m->s;
    const cuda_model *form = c->m->form;
    const cuda_context *own = c->form;
    size_t h = s->hidden;
    uint32_t dim = s->hidden / s->heads;
    const kvk_cuda_local_attend_args args = {.q = rows + (n_keys - n) * 3 * h,
                                             .k = rows + h,
                                             .v = rows + 2 * h,
                                             .n = (uint32_t)n,
                                             .n_keys = (uint32_t)n_keys,
                                             .n_heads = s->heads,
                                             .head_dim = dim,
                                             .q_stride = 3 * s->hidden,
                                             .kv_stride = 3 * s->hidden,
                                             .window = back,
                                             .chunk = s->chunk,
                                             .slopes = form->slopes,
                                             .scale = 1 / sqrtf((float)dim),
                                             .out = c->mix};
    return kvk_cuda_local_attend(form->cuda, &args, own->stream);
}

static float *cuda_qkv(gca_context *c, window *past)
{
    return past->k + past->n * 3 * c->m->s.hidden;
}

static kvc_status cuda_window(gca_context *c, size_t n, window *past)
{
    const cuda_context *own = c->form;
    size_t row = 3ul * c->m->s.hidden, all = past->n + n;
    size_t kept = all < c->m->s.window ? all : c->m->s.window;
    kvc_status st = attend(c, past->k, all, n, c->m->s.window);
    if (st == KVC_OK && kept < all) { /* by way of scratch: the two may overlap */
        st = cuda_copy(c, own->scratch, past->k + (all - kept) * row, kept * row);
        if (st == KVC_OK)
            st = cuda_copy(c, past->k, own->scratch, kept * row);
    }
    past->n = kept;
    return st;
}

static kvc_status cuda_chunks(gca_context *c, size_t n)
{
    const gca_sizes *s = &c->m->s;
    const cuda_context *own = c->form;
    const kvk_cuda_rotate_args args = {.x = c->qkv,
                                       .n = (uint32_t)n,
                                       .stride = 3 * s->hidden,
                                       .n_heads = 2 * s->heads, /* of q, then of k */
                                       .head_dim = s->hidden / s->heads,
                                       .period = s->chunk,
                                       .cos = c->m->cos,
                                       .sin = c->m->sin};
    kvc_status st = kvk_cuda_rotate(cuda_of(c), &args, own->stream);
    return st == KVC_OK ? attend(c, c->qkv, n, n, 0) : st;
}

/* V moves up by a row on its way, so that a row has the next token's. */
static kvc_status cuda_encoded(gca_context *c, size_t n, gca_encoded *out_p)
{
    const gca_sizes *s = &c->m->s;
    const cuda_context *own = c->form;
    size_t h = s->hidden, chunk = s->chunk;
    kvc_status st = norm_rows(c, c->e + (chunk - 1) * h, s->chunk * s->hidden, c->m->encoder_norm,
                              n / chunk, own->marks);
    if (st == KVC_OK)
        st = cuda_copy(c, own->host_marks, own->marks, n / chunk * h);
    if (st == KVC_OK)
        st = cuda_copy(c, own->host_k, c->k, n * h);
    if (st == KVC_OK)
        st = cuda_copy(c, own->host_v, c->v + h, (n - 1) * h);
    if (st == KVC_OK)
        st = wait(c);
    for (size_t i = chunk - 1; i < n; i += chunk) { /* the landmarks' rows */
        memset(own->host_k + i * h, 0, h * sizeof(float));
        memset(own->host_v + i * h, 0, h * sizeof(float));
    }
    *out_p = (gca_encoded){own->host_k, own->host_v, own->host_marks};
    return st;
}

const gca_math gca_math_cuda = {
    .name = "cuda",
    .pass_chunks = 256,
    .open = cuda_open,
    .close = cuda_close,
    .keep = cuda_keep,
    .context_open = cuda_context_open,
    .context_close = cuda_context_close,
    .window_floats = cuda_window_floats,
    .copy = cuda_copy,
    .host = cuda_host,
    .back = cuda_back,
    .embed = cuda_embed,
    .norm = cuda_norm,
    .product = cuda_product,
    .qkv = cuda_qkv,
    .window = cuda_window,
    .chunks = cuda_chunks,
    .encoded = cuda_encoded,
};
