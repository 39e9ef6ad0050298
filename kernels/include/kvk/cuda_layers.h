/*
 * cuda_layers.h: the pieces of a small f32 transformer on a CUDA device, so that a decoder whose
 * memory is a worker's can read a long context there. Rules for all ops: those of cuda.h.
 *
 * Everything is f32, row-major; sums are fused multiply-adds in f32, so a result is within n u of
 * the sum of |terms| of the exact one, n terms long, u = 2^-24, which is how bounds are given here.
 * Equal bits for a row whatever rows are beside it; of local_attend, at an equal place in its run.
 */
#ifndef KVK_CUDA_LAYERS_H
#define KVK_CUDA_LAYERS_H

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/*
 * out[i] = table[t_i] + sum over j < n_taps of taps[j] * table[t_(i - 1 - j)], element by element:
 * a token's embedding with those of the few before it; tokens begins with n_before tokens that
 * have no output, and taps that reach further back count nothing. A token that is not below vocab
 * has an embedding of zeros. Bound: (n_taps + 1) u. dim a multiple of 4, at most 4096; n_before <=
 * n_taps <= 64.
 */
typedef struct kvk_cuda_embed_args {
    const uint32_t *tokens; /* [n_before + n] */
    uint32_t n, n_before, n_taps, vocab, dim;
    const float *table; /* [vocab, dim] */
    const float *taps;  /* [n_taps, dim] */
    float *out;         /* [n, dim] */
} kvk_cuda_embed_args;
kvc_status kvk_cuda_embed(kvk_cuda *cuda, const kvk_cuda_embed_args *args,
                          kvk_stream *stream) KVC_MUST_CHECK;

/* out = x / sqrt(mean of x^2 + 1e-6) * weight, row by row. Bound: (dim / 2 + 8) u of |out|. dim a
 * multiple of 4; out may be x where stride is dim. */
typedef struct kvk_cuda_rms_norm_args {
    const float *x; /* rows stride elements apart, a multiple of 4 */
    uint32_t n, dim, stride;
    const float *weight; /* [dim] */
    float *out;          /* [n, dim] */
} kvk_cuda_rms_norm_args;
kvc_status kvk_cuda_rms_norm(kvk_cuda *cuda, const kvk_cuda_rms_norm_args *args,
                             kvk_stream *stream) KVC_MUST_CHECK;

/*
 * out = in times weight, then by form: as it is; gelu (the tanh form) of it; or added to what out
 * has. Bound: (n_in + 2) u of sum |in weight| and of what was in out; gelu 2^-20 of its input more.
 * n_in and n_out multiples of 4, at most 65536.
 */
typedef enum kvk_cuda_linear_form {
    KVK_CUDA_STORE = 0,
    KVK_CUDA_GELU = 1,
    KVK_CUDA_ADD = 2
} kvk_cuda_linear_form;
typedef struct kvk_cuda_linear_args {
    const float *in; /* [n, n_in] */
    uint32_t n, n_in, n_out;
    const float *weight; /* [n_in, n_out] */
    kvk_cuda_linear_form form;
    float *out; /* [n, n_out]; not in */
} kvk_cuda_linear_args;
kvc_status kvk_cuda_linear(kvk_cuda *cuda, const kvk_cuda_linear_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/* Rotates n_heads heads of row i in place, pairs (t, t + head_dim / 2), by the angles of row i %
 * period. Bound: 3 u of |a| + |b|. head_dim a multiple of 2. */
typedef struct kvk_cuda_rotate_args {
    float *x; /* rows stride elements apart, heads dense in each */
    uint32_t n, stride, n_heads, head_dim, period;
    const float *cos, *sin; /* [period, head_dim / 2] */
} kvk_cuda_rotate_args;
kvc_status kvk_cuda_rotate(kvk_cuda *cuda, const kvk_cuda_rotate_args *args,
                           kvk_stream *stream) KVC_MUST_CHECK;

/*
 * Attention of n queries in one run of n_keys rows, of which the last n are the queries' own. With
 * window: query i sees its own row and the window - 1 before it, as far as there are such, and a
 * score falls by slopes[head] a row of distance (ALiBi). Without (0): every query sees the `chunk`
 * rows of its own chunk, n_keys = n a multiple of it, and slopes is not read. Bound: with e = (dim
 * + 8) u scale S + 2^-20 (1 + log2 of the keys), S the largest sum |q k|: 2 e max|v|. head_dim 32
 * or 64, else UNSUPPORTED.
 */
typedef struct kvk_cuda_local_attend_args {
    const float *q;     /* [n] rows, q_stride elements apart, heads dense in each */
    const float *k, *v; /* [n_keys] rows, kv_stride apart, likewise */
    uint32_t n, n_keys, n_heads, head_dim, q_stride, kv_stride; /* strides: multiples of 4 */
    uint32_t window, chunk;
    const float *slopes; /* [n_heads] */
    float scale;
    float *out; /* [n, n_heads, head_dim] */
} kvk_cuda_local_attend_args;
kvc_status kvk_cuda_local_attend(kvk_cuda *cuda, const kvk_cuda_local_attend_args *args,
                                 kvk_stream *stream) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
