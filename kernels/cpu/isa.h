/*
 * isa.h: the inner loops that are built once per isa (portable, avx2, avx512, amx) from the headers
 * in micro/. Ops see only this table. None of these functions allocates, checks or starts threads,
 * and each gives for one output the same bits whatever the rest of its tile holds.
 */
#ifndef KVKI_ISA_H
#define KVKI_ISA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvk/compute.h"

/* c [m, n] = (accumulate ? c : 0) + a [m, k] x b [k, n]; each c is one chain over k, in order. */
typedef struct kvki_gemm {
    const float *a, *b;
    float *c;
    size_t lda, ldb, ldc; /* elements */
    uint32_t m, n, k;
    bool accumulate;
} kvki_gemm;

#define KVKI_DOT_QUERIES 4u /* queries that meet one load of a key */

/* out[i][j] = q[i] . (row j at rows[j] + off_bytes), for nq <= KVKI_DOT_QUERIES queries. */
typedef struct kvki_dot {
    const float *q[KVKI_DOT_QUERIES];
    float *out[KVKI_DOT_QUERIES];
    uint32_t nq, dim, n;
    const void *const *rows; /* [n] */
    size_t off_bytes;
    kvk_dtype dtype;
} kvki_dot;

/*
 * Scores of int8 rows for the query rows of one kv head: out[r][j] = ((float)(q_r . v_j) * scale_j)
 * * q_scale_r, with v_j at index + j * stride + v_off and its bf16 scale at + scale_off. Row r is
 * (query r / group, head first_head + r % group) in q, q_scale and out, which hold n_q_heads rows a
 * query. q rows are int16, zero from dim on to a multiple of 64. Reads stay below `end`.
 */
typedef struct kvki_score_i8 {
    const int16_t *q;
    const float *q_scale;
    float *out;
    size_t q_stride, out_stride; /* elements */
    size_t n_rows, group, n_q_heads, first_head;
    uint32_t dim; /* <= KVKI_I8_DIM_MAX: sums fit in int32 */
    size_t n;
    const char *index, *end;
    size_t stride_bytes, v_off_bytes, scale_off_bytes;
} kvki_score_i8;

#define KVKI_I8_DIM_MAX 256u
#define KVKI_I8_PAD     64u

/*
 * One block of keys, packed for a kv head: kt in panels of `panel` keys, [panels][head_dim][panel];
 * v in panels of `panel` columns, [panels][KVKI_ATTEND_KEYS][panel]. finite: no Inf or NaN in v.
 */
#define KVKI_ATTEND_KEYS 128u
#define KVKI_ATTEND_ROWS 48u
#define KVKI_PACK_ROWS   16u

typedef struct kvki_attend_pack {
    const void *const *rows; /* [n] */
    uint32_t n, head_dim;
    size_t k_off_bytes, v_off_bytes;
    kvk_dtype dtype;
    bool coded; /* elements are to be multiplied by the row's scales of this head: */
    size_t k_scale_off_bytes, v_scale_off_bytes;
    const float *cos, *sin; /* [n, head_dim / 2], NULL: K is not rotated */
    bool turned;            /* cos and sin are [ceil(n / lanes), head_dim / 2, lanes] */
    float *tmp;             /* [KVKI_PACK_ROWS, head_dim rounded up to 16] */
    float *kt, *v;
    bool *finite_p;
} kvki_attend_pack;

/* The partial of `m` query rows (KVKI_ATTEND_ROWS at most) over one packed block. */
typedef struct kvki_attend_block {
    const float *q; /* [m, head_dim], scaled */
    uint32_t m, head_dim;
    const uint32_t *limit; /* [m] keys of this block that row i sees; non-decreasing */
    const float *kt, *v;
    bool finite;
    float softcap;
    float *s;   /* [KVKI_ATTEND_ROWS, KVKI_ATTEND_KEYS] scratch */
    float *o;   /* [m, ldo], unnormalised */
    size_t ldo; /* head_dim rounded up to `panel` */
    float *max, *sum;
} kvki_attend_block;

/* Rows that will be wanted soon: K and V of all heads of each, line by line. */
typedef struct kvki_ahead {
    const void *const *rows; /* [n] */
    uint32_t n, row, side;   /* side 0: K, 1: V */
    size_t off_bytes[2], len_bytes, at_bytes;
} kvki_ahead;

struct kvki_isa {
    const char *name;
    uint32_t panel; /* columns of a gemm panel */
    uint32_t lanes; /* of a vector of floats */

    /* of coded rows: without their scales */
    void (*convert)(const void *in, kvk_dtype dtype, size_t n, float *out);
    void (*add)(float *acc, const float *x, size_t n);
    void (*add_f64)(double *acc, const float *x, size_t n);
    /* cos and sin [half] of position * inv_freq[i] */
    void (*angles)(double position, const double *inv_freq, uint32_t half, float *cos, float *sin);
    /* out = x [2 * half] rotated; x may be out */
    void (*rotate)(const float *x, const float *cos, const float *sin, uint32_t half, float *out);
    void (*gemm)(const kvki_gemm *g);
    void (*quantize)(const float *x, uint32_t n, float scale, int8_t *out);
    void (*e4m3)(const float *x, uint32_t n, float scale, uint8_t *out);
    void (*dot)(const kvki_dot *d);
    void (*score_i8)(const kvki_score_i8 *s);
    /* the largest of x and start; NaN is passed over */
    float (*max)(const float *x, size_t n, float start);
    /* sum of exp(x - max) */
    double (*exp_sum)(const float *x, size_t n, float max);
    /* out += exp(x - max) * weight */
    void (*exp_add)(const float *x, size_t n, float max, float weight, float *out);
    /* out = max(out, x - shift); NaN is passed over */
    void (*fold_max)(const float *x, size_t n, float shift, float *out);
    /* out = max(x, y); out may be x, and y may overlap it further on */
    void (*max2)(const float *x, const float *y, size_t n, float *out);
    /* appends the positions j in [from, to) with x[j] >= low to pos; answers how many */
    uint32_t (*filter)(const float *x, uint32_t from, uint32_t to, float low, uint32_t *pos);
    void (*attend_pack)(const kvki_attend_pack *p);
    void (*attend_block)(const kvki_attend_block *b);
    /* cos and sin of `lanes` keys, turned: key t's are at from[t], [2, half]; to cos and sin
       [half, lanes]; half is a multiple of lanes */
    void (*turn_angles)(const float *const *from, uint32_t half, float *cos, float *sin);
    /* both for few query rows that see the same p->n keys (> 0), without packing (p->kt and p->v
       are not used); head_dim is a multiple of `lanes`; moves ahead to its end. p->turned: BF16,
       and head_dim is a multiple of 4 * lanes */
    void (*attend_few)(const kvki_attend_pack *p, const kvki_attend_block *b, kvki_ahead *ahead);
    /* merges the partial (max, sum, o) of m rows of n columns into (max_a, sum_a, o_a) */
    void (*attend_merge)(uint32_t m, uint32_t n, size_t ldo, const float *max, const float *sum,
                         const float *o, float *max_a, float *sum_a, float *o_a);
    /* x = x * a + y * b */
    void (*axpby)(float *x, float a, const float *y, float b, size_t n);
    double (*dot_f64)(const float *a, const float *b, size_t n);
};

typedef struct kvki_isa kvki_isa;

extern const kvki_isa kvki_isa_portable;
#if defined(__x86_64__)
extern const kvki_isa kvki_isa_avx2;
extern const kvki_isa kvki_isa_avx512;
extern const kvki_isa kvki_isa_amx;
#endif

/* isa.c: the best isa here (name NULL) or the one named. INVALID: no such name; UNSUPPORTED. */
kvc_status kvki_isa_pick(const char *name, const kvki_isa **isa_p) KVC_MUST_CHECK;

#endif
