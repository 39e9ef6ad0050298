/*
 * compute.h: the op table of the compute layer, plain C11.
 *
 * A backend ("reference", "cpu", later "cuda") fills one kvk_ops. An op runs on the caller's stream
 * (NULL and synchronous on CPU backends), allocates nothing that outlives the call, validates its
 * arguments and returns KVC_INVALID before it touches an output. All pointers are borrowed until
 * the op has completed on its stream. Ops are thread-safe: one backend may be used from several
 * threads at once; the backend's own threads share out the work of one call.
 *
 * Shapes are in brackets, row-major unless a stride is given; units come last in names. Query head
 * h meets kv head h / (n_q_heads / n_kv_heads) everywhere (never h mod n_kv_heads). Order of every
 * top-k: score descending, then position ascending; a NaN score sorts last. Determinism: for given
 * inputs, backend and isa an op's output bits do not depend on the number of threads, on how a
 * batch of rows or queries is split into calls, or on earlier calls. (A running statistic over
 * pieces of one row, softmax_stats, may differ in the last bits with the pieces.)
 *
 * n = 0 (or m, n_q = 0) is valid and writes nothing but counts. Input rows need no alignment; float
 * arrays do. Rows of a matrix may not overlap. A maximum passes over NaN. Error bounds per op and
 * dtype: kernels/README.md.
 */
#ifndef KVK_COMPUTE_H
#define KVK_COMPUTE_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/*
 * The _SCALED ones are coded rows, which encode, decode and attend take and nothing else: a slice
 * (K or V) of n_heads heads of `dim` is a byte an element [n_heads, dim], then a bf16 scale a head
 * [n_heads]. An element is byte * scale, exact in f32: int8, or e4m3 (4 exponent and 3 mantissa
 * bits, at most 448, no infinity, 0x7f and 0xff are NaN).
 */
typedef enum kvk_dtype {
    KVK_F32 = 1,
    KVK_F16 = 2,
    KVK_BF16 = 3,
    KVK_I8 = 4,
    KVK_E4M3_SCALED = 6,
    KVK_I8_SCALED = 7
} kvk_dtype;

typedef struct kvk_backend kvk_backend;
typedef struct kvk_stream kvk_stream; /* opaque; NULL on CPU backends */

/* n rows of `width` elements each, row i at data + i * stride_bytes. */
typedef struct kvk_rows {
    const void *data;
    size_t stride_bytes;
    kvk_dtype dtype;
} kvk_rows;

/* out [n, width] f32 = in [n, width] in its dtype. */
typedef struct kvk_convert_args {
    kvk_rows in;
    uint32_t n, width;
    float *out;
} kvk_convert_args;

/*
 * out[j] = mean over n rows of in[i][j], added in row order (prefill chunk query of TokenSelect;
 * 2411.02886 sec 4). n = 0 gives zeros.
 */
typedef struct kvk_mean_args {
    kvk_rows in;
    uint32_t n, width;
    float *out; /* [width] */
} kvk_mean_args;

/*
 * The GQA collapse of ESA (2502.14477 eq. 3): out [n, n_kv_heads, head_dim] = sum of the query
 * heads of each group; in rows are [n_q_heads, head_dim].
 */
typedef struct kvk_group_sum_args {
    kvk_rows in;
    uint32_t n, n_q_heads, n_kv_heads, head_dim;
    float *out;
} kvk_group_sum_args;

/*
 * Rotary embedding, pairs (i, i + head_dim/2): out [n, n_heads, head_dim] f32. Row i is rotated by
 * position positions[i], or by const_position where positions is NULL. inv_freq [head_dim/2] comes
 * from kvk_rope_inv_freq; NULL inv_freq copies (position 0). In f32; angles computed in double.
 */
typedef struct kvk_rope_args {
    kvk_rows in;
    uint32_t n, n_heads, head_dim;
    const double *inv_freq;
    const int32_t *positions;
    int32_t const_position;
    float *out;
} kvk_rope_args;

/* out [n, n_heads, dim_out] f32 = in [n, n_heads, dim_in] x proj [n_heads, dim_in, dim_out] f32. */
typedef struct kvk_project_args {
    kvk_rows in;
    uint32_t n, n_heads, dim_in, dim_out;
    const float *proj;
    float *out;
} kvk_project_args;

/*
 * Index rows: in [n, n_heads, dims] f32 -> n rows of n_heads * (dims + 2) bytes:
 * int8 v [n_heads, dims], then bf16 scale [n_heads]; x ~= v * scale. The scale is max|x| / 127
 * rounded UP to bf16, v = round-half-even(x / scale), the quotient in f32; a zero head has scale 0.
 * The same bits on every backend. A non-finite input is KVC_INVALID.
 */
typedef struct kvk_quantize_args {
    const float *in;
    uint32_t n, n_heads, dims;
    void *out;
    size_t out_stride_bytes;
} kvk_quantize_args;

static inline int kvk_is_coded(kvk_dtype dtype)
{
    return dtype == KVK_E4M3_SCALED || dtype == KVK_I8_SCALED;
}

static inline size_t kvk_index_row_bytes(uint32_t n_heads, uint32_t dims)
{
    return n_heads * ((size_t)dims + 2u);
}

/*
 * Scores of int8 index rows: out[i][h][j] for query row i, query head h, index row j.
 * q [m, n_q_heads, dims] f32 is quantised inside, per (row, head), to int16 with an f32 scale
 * (max|q| / 32767); the dot is exact in int32 (int64 where dims > 256), and
 *   out = ((float)dot * k_scale) * q_scale
 * in f32 in this order, so every backend gives the same bits. A non-finite q is KVC_INVALID. ESA:
 * n_q_heads = n_kv_heads = 1. With many queries keep a call's out in cache: m * n of some 256 K.
 */
typedef struct kvk_score_index_args {
    const float *q;
    uint32_t m, n_q_heads, n_kv_heads, dims;
    const void *index;
    size_t index_stride_bytes;
    uint32_t n;
    float *out;        /* out[(i * n_q_heads + h) * out_stride + j] */
    size_t out_stride; /* elements, >= n */
} kvk_score_index_args;

/*
 * Scores of exact keys: out[i][h][j] = q[i][h] . k[j][h / g], q f32, keys [n, n_kv_heads, head_dim]
 * in their dtype, accumulated in f32 (double in the reference). No 1/sqrt(d).
 * Bound: |error| <= head_dim * 2^-23 * sum|q_i k_i|.
 */
typedef struct kvk_score_keys_args {
    const float *q; /* [m, n_q_heads, head_dim] */
    uint32_t m, n_q_heads, n_kv_heads, head_dim;
    kvk_rows keys;
    uint32_t n;
    float *out;
    size_t out_stride;
} kvk_score_keys_args;

/*
 * Like score_keys, for chosen rows: row j is at rows[j] (K starts there). Used to re-rank
 * candidates whose keys are resident.
 */
typedef struct kvk_score_rows_args {
    const float *q; /* [m, n_q_heads, head_dim] */
    uint32_t m, n_q_heads, n_kv_heads, head_dim;
    const void *const *rows; /* [n] */
    kvk_dtype dtype;
    uint32_t n;
    float *out;
    size_t out_stride;
} kvk_score_rows_args;

/*
 * Streaming softmax statistics per head over logits [n_heads, n] (stride elements): updates
 * max[h], sumexp[h] in place (start: -INFINITY, 0), sumexp relative to max. A NaN logit makes its
 * head's sumexp NaN.
 */
typedef struct kvk_softmax_stats_args {
    const float *logits;
    size_t stride;
    uint32_t n_heads, n;
    float *max, *sumexp; /* [n_heads] in/out */
} kvk_softmax_stats_args;

/*
 * Soft vote (2411.02886 eq. 7): out[j] = sum_h exp(logits[h][j] - max[h]) / sumexp[h]. A head whose
 * sumexp is 0 saw no candidate and adds nothing.
 */
typedef struct kvk_vote_args {
    const float *logits;
    size_t stride;
    uint32_t n_heads, n;
    const float *max, *sumexp;
    float *out; /* [n] */
} kvk_vote_args;

/* row_max[i] = max(row_max[i], max_j scores[i][j]): the inner maximum of ESA's eq. 4. */
typedef struct kvk_row_max_args {
    const float *scores;
    size_t stride;
    uint32_t m, n;
    float *row_max; /* [m] in/out */
} kvk_row_max_args;

/* ESA eq. 4: out[j] = max(out[j], max_i (scores[i][j] - row_max[i])); start out at -INFINITY. */
typedef struct kvk_chunk_fold_args {
    const float *scores;
    size_t stride;
    uint32_t m, n;
    const float *row_max;
    float *out; /* [n] in/out */
} kvk_chunk_fold_args;

/* ESA eq. 8: out[j] = max of in[max(j-eps,0) .. min(j+eps,n-1)]. out and in must not overlap. */
typedef struct kvk_window_max_args {
    const float *in;
    uint32_t n, eps;
    float *out;
} kvk_window_max_args;

/*
 * The k best of n scores, in order (score desc, position asc). ids and out_scores [k]; *n_out_p =
 * min(k, n). Position = base + j. out_scores may be NULL. workspace: at least
 * kvk_topk_workspace_bytes(n, k), any alignment.
 */
typedef struct kvk_topk_args {
    const float *scores;
    uint32_t n, k, base;
    uint32_t *ids;
    float *out_scores;
    uint32_t *n_out_p;
    void *workspace;
    size_t workspace_bytes;
} kvk_topk_args;

/*
 * Which picks are resident: slot_of [n_positions], -1 = not resident. Both output lists keep order.
 * A pick at or above n_positions is KVC_INVALID.
 */
typedef struct kvk_resolve_args {
    const uint32_t *picks;
    uint32_t n;
    const int32_t *slot_of;
    uint32_t n_positions;
    uint32_t *hits;   /* [n] indexes into picks */
    uint32_t *misses; /* [n] indexes into picks */
    uint32_t *n_hits_p, *n_misses_p;
} kvk_resolve_args;

/* out row i (row_bytes, dense) = *rows[i]. */
typedef struct kvk_gather_args {
    const void *const *rows;
    uint32_t n;
    size_t row_bytes;
    void *out;
} kvk_gather_args;

/*
 * Coded slices of n rows: in [n, n_heads, dims] F32, F16 or BF16 -> out + i * out_stride_bytes, in
 * dtype (a _SCALED one), kvk_slice_bytes each. A head's scale is max|x| / 127 (int8) or / 448
 * (e4m3) rounded UP to bf16, an element x / scale, the quotient in f32, to nearest even; a zero
 * head has scale 0. int8: what quantize writes. The same bits on every backend. |x - decoded| is
 * at most scale / 2 (int8), or |x| / 16 and, below 2^-6 of the scale, scale / 1024 (e4m3), for
 * heads up to 2^127: in larger ones the scale, rounded up, may take the largest elements of f32's
 * range, and they come back infinite. A non-finite input is KVC_INVALID.
 */
typedef struct kvk_encode_args {
    kvk_rows in;
    uint32_t n, n_heads, dims;
    kvk_dtype dtype;
    void *out;
    size_t out_stride_bytes;
} kvk_encode_args;

/* out [n, n_heads, dims] f32 = the elements of coded slices, in.dtype a _SCALED one. Exact. */
typedef struct kvk_decode_args {
    kvk_rows in;
    uint32_t n, n_heads, dims;
    float *out;
} kvk_decode_args;

/*
 * Attention of n_q queries over n_kv rows, a partial: o normalised over these rows, lse natural log
 * of the sum of exp(scale * q.k (softcapped)). rows[j] points at a token row: K [n_kv_heads,
 * head_dim] at k_off_bytes, V likewise at v_off_bytes, in dtype, coded or not. Where inv_freq is
 * not NULL, K of row j is rotated by k_positions[j] on the fly (NULL k_positions: not rotated); q
 * arrives rotated. visible [n_q]: query i sees rows 0 .. visible[i]-1 (NULL: all). A query that
 * sees nothing gets o = 0, lse = -INFINITY. Rows are taken in the order given, so equal lists give
 * equal bits. What lies in rows that a query does not see cannot reach it, Inf and NaN included.
 * Bound against the double reference: |o error| <= 2^-20 * max|v| * (1 + log2(n_kv + 1)) + the
 * rounding of f32 logits (stated in kernels/README.md).
 */
typedef struct kvk_attend_args {
    const float *q; /* [n_q, n_q_heads, head_dim] */
    uint32_t n_q, n_q_heads, n_kv_heads, head_dim;
    const void *const *rows; /* [n_kv] */
    uint32_t n_kv;
    size_t k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    const int32_t *k_positions; /* [n_kv] or NULL */
    const double *inv_freq;     /* [head_dim/2] or NULL */
    const uint32_t *visible;    /* [n_q], non-decreasing, or NULL */
    float scale;                /* e.g. 1/sqrt(head_dim) */
    float softcap;              /* 0: none; else c * tanh(x / c) */
    float *o;                   /* [n_q, n_q_heads, head_dim] */
    float *lse;                 /* [n_q, n_q_heads] */
} kvk_attend_args;

/* Merges partial b into a by log-sum-exp, in place: o [n, dim], lse [n]; -INFINITY means empty. */
typedef struct kvk_merge_args {
    float *o_a, *lse_a;
    const float *o_b, *lse_b;
    uint32_t n, dim;
} kvk_merge_args;

/* cos_p = a.b / (|a| |b|) in double; 0 where either norm is 0 (Selection Cache test). */
typedef struct kvk_cosine_args {
    const float *a, *b;
    uint32_t n;
    double *cos_p;
} kvk_cosine_args;

typedef enum kvk_fusion {
    KVK_FUSE_SOFTMAX = 1, /* GCA (2410.01651): softmax over the chosen scores, nothing else */
    KVK_FUSE_STICK = 2    /* HSA (2504.16795): stick breaking, from the newest chunk down */
} kvk_fusion;

#define KVK_CHUNKS_MAX 1024u /* chosen chunks of one query */

/*
 * Weights of the k chunks that each of n queries chose, x = scale * score:
 *   SOFTMAX  w_i = exp(x_i) / sum_j exp(x_j)
 *   STICK    w_i = sigma(x_i) * prod over j with ids_j > ids_i of (1 - sigma(x_j))
 * A score of -INFINITY (a place of a list that had fewer candidates) weighs 0, also where all are;
 * a NaN score makes its query's weights NaN. ids of one query that score above -INFINITY differ, or
 * the call is KVC_INVALID; SOFTMAX does not read them. In double, in order: equal bits everywhere.
 */
typedef struct kvk_chunk_weights_args {
    const float *scores; /* [n, k] */
    const uint32_t *ids; /* [n, k] chunks by position; SOFTMAX: may be NULL */
    uint32_t n, k;       /* k <= KVK_CHUNKS_MAX */
    kvk_fusion fusion;
    float scale;    /* e.g. 1/sqrt(hidden) */
    float *weights; /* [n, k] */
} kvk_chunk_weights_args;

/*
 * The weighted sum of per-chunk attention: out [n, dim] = sum_c weights[c] * g * o[c], where o [c]
 * and lse [c] are the partial of `attend` over chunk c alone, n its (query, head) rows. off_by_one:
 * each chunk's softmax has 1 in its denominator besides, which is g = sigma(lse); else g = 1. A
 * chunk of weight 0, or at lse = -INFINITY (empty), adds nothing and its o is not read.
 * Bound: (n_chunks + 3) u sum |w g o|.
 */
typedef struct kvk_chunk_fuse_args {
    const float *o;       /* [n_chunks, n, dim] */
    const float *lse;     /* [n_chunks, n] */
    const float *weights; /* [n_chunks] */
    uint32_t n_chunks, n, dim;
    uint32_t off_by_one; /* 0 or 1 */
    float *out;          /* [n, dim]; may not overlap o */
} kvk_chunk_fuse_args;

/* Every op of the table: name, its args struct is kvk_<name>_args. One row adds an op everywhere.
 */
/* clang-format off */
#define KVK_OPS(X) \
    X(convert) X(mean) X(group_sum) X(rope) X(project) X(quantize) X(score_index) X(score_keys) \
    X(score_rows) X(softmax_stats) X(vote) X(row_max) X(chunk_fold) X(window_max) X(topk) \
    X(resolve) X(gather) X(encode) X(decode) X(attend) X(merge) X(cosine) X(chunk_weights) \
    X(chunk_fuse)
/* clang-format on */

/* The table. Every slot is REQ. */
typedef struct kvk_ops {
    const char *name; /* "reference", "cpu" */
#define KVK_OP_SLOT(op)                                                                            \
    kvc_status (*op)(kvk_backend * be, const kvk_##op##_args *args, kvk_stream *stream);
    KVK_OPS(KVK_OP_SLOT)
#undef KVK_OP_SLOT
} kvk_ops;

/*
 * Where the calls of a backend get what they need beside their arguments, so that it can be
 * counted: take gives len_bytes at a multiple of 64, or NULL (the call is NO_MEMORY); give takes
 * them back before the call returns. Any thread, several at once.
 */
typedef struct kvk_memory {
    void *(*take)(void *arg, size_t len_bytes);
    void (*give)(void *arg, void *memory);
    void *arg;
} kvk_memory;

typedef struct kvk_backend_opts {
    size_t size_bytes;  /* sizeof(kvk_backend_opts) */
    uint32_t n_threads; /* 0: one per core this process may use */
    const char *isa;    /* NULL: best; "portable", "avx2", "avx512", "amx" to force (cpu only) */
    kvk_memory memory;  /* take NULL: the backend's own, which keeps some (cpu only) */
} kvk_backend_opts;

/*
 * Opens a backend by name ("cpu" fast forms with run-time dispatch, "reference" accumulates in
 * double). opts may be NULL. Starts the backend's threads. INVALID: unknown name or isa;
 * UNSUPPORTED: this CPU lacks the isa; NO_MEMORY. Any thread. *be_p is NULL on error.
 */
kvc_status kvk_backend_open(const char *name, const kvk_backend_opts *opts,
                            kvk_backend **be_p) KVC_MUST_CHECK;
/* Stops the threads and frees; NULL is fine. No op may be running. */
void kvk_backend_close(kvk_backend *be);
/* The table of an open backend; lives as long as the backend. */
const kvk_ops *kvk_backend_ops(const kvk_backend *be);
/* The isa in use: "double", "portable", "avx2", "avx512" or "amx". */
const char *kvk_backend_isa(const kvk_backend *be);
/* Name of the i-th registered backend, NULL past the end: conformance tests loop over it. */
const char *kvk_backend_name(uint32_t i);

size_t kvk_topk_workspace_bytes(uint32_t n, uint32_t k);
size_t kvk_dtype_bytes(kvk_dtype dtype);
/* Bytes of n_heads heads of K or of V in a row, the scales of a coded one included. */
static inline size_t kvk_slice_bytes(kvk_dtype dtype, uint32_t n_heads, uint32_t dim)
{
    return kvk_is_coded(dtype) ? kvk_index_row_bytes(n_heads, dim)
                               : (size_t)n_heads * dim * kvk_dtype_bytes(dtype);
}
/* out [n] in dtype (F32, F16 or BF16), which needs no alignment, = in [n], to nearest even;
 * overflow becomes infinity, NaN stays NaN. */
void kvk_from_f32(const float *in, size_t n, kvk_dtype dtype, void *out);

/* Scaling of rotary frequencies; type 0: plain theta; 1: Llama-3 (uses the four factors). */
typedef struct kvk_rope_params {
    uint32_t type;
    double theta, factor, low_freq_factor, high_freq_factor;
    uint32_t original_max_position;
} kvk_rope_params;

/* inv_freq [head_dim/2]. INVALID: head_dim odd or 0, theta <= 0, or factors out of range. */
kvc_status kvk_rope_inv_freq(const kvk_rope_params *params, uint32_t head_dim,
                             double *inv_freq) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
