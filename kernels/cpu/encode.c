/*
 * encode.c: K or V of new tokens into coded slices: a byte an element, a bf16 scale a head. Both
 * forms follow the contract to the bit: the scale is the largest |x| over the largest byte, rounded
 * up to bf16, so the quotient, taken in f32, never leaves the range of the code.
 */
#include <string.h>

#include "check.h"
#include "codec.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u
#define CHUNK      128u /* elements converted at a time */

static double largest_of(kvk_dtype dtype)
{
    return dtype == KVK_I8_SCALED ? 127.0 : 448.0;
}

static bool all_finite(const kvk_rows *in, size_t row, size_t width)
{
    bool finite = true;

    for (size_t i = 0; i < width; i++)
        finite = isfinite(kvki_elem(kvki_row(in, row), in->dtype, i)) && finite;
    return finite;
}

kvc_status kvki_check_encode(const kvk_encode_args *a)
{
    size_t width = (size_t)a->n_heads * a->dims;

    if (a->n_heads == 0 || a->dims == 0 || !kvk_is_coded(a->dtype) || a->in.dtype == KVK_I8 ||
        !kvki_shape_ok(a->n, a->n_heads, (size_t)a->dims + 2) || !kvki_rows_ok(&a->in, a->n, width))
        return KVC_INVALID;
    if (a->n == 0)
        return KVC_OK;
    if (!a->out ||
        !kvki_stride_ok(a->n, a->out_stride_bytes, kvk_slice_bytes(a->dtype, a->n_heads, a->dims)))
        return KVC_INVALID;
    for (size_t i = 0; i < a->n; i++) {
        if (!all_finite(&a->in, i, width))
            return KVC_INVALID;
    }
    return KVC_OK;
}

/* The code of the finite |x| <= 448 that is nearest, to even where two are. */
static uint8_t e4m3_ref(double x)
{
    double size = fabs(x);
    int exponent = 0;
    uint8_t sign = signbit(x) ? 0x80 : 0;

    (void)frexp(size, &exponent); /* size < 2^exponent */
    exponent = size == 0 || exponent < -5 ? -5 : exponent;
    double steps = rint(ldexp(size, 4 - exponent)); /* of 2^(exponent - 4): 8 to 16, or below -6 */
    return (uint8_t)(sign | (((exponent + 5) << 3) + (int)steps));
}

kvc_status kvki_ref_encode(const kvk_encode_args *a)
{
    for (size_t i = 0; i < a->n * (size_t)a->n_heads; i++) {
        size_t row = i / a->n_heads, head = i % a->n_heads;
        const char *in = kvki_row(&a->in, row);
        char *slice = (char *)a->out + row * a->out_stride_bytes;
        float max = 0;
        for (size_t t = 0; t < a->dims; t++)
            max = fmaxf(max, fabsf(kvki_elem(in, a->in.dtype, head * a->dims + t)));
        uint16_t bits = max > 0 ? kvki_scale_bits(max, largest_of(a->dtype)) : 0;
        float scale = kvki_f32_of_bf16(bits);
        memcpy(slice + kvki_scale_off(a->n_heads, a->dims, head), &bits, sizeof(bits));
        for (size_t t = 0; t < a->dims; t++) {
            size_t at = head * a->dims + t;
            float x = scale > 0 ? kvki_elem(in, a->in.dtype, at) / scale : 0;
            slice[at] =
                (char)(a->dtype == KVK_I8_SCALED ? (int8_t)rintf(x) : (int8_t)e4m3_ref((double)x));
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_encode_args *a;
    const kvki_isa *isa;
    size_t elem_bytes, rows_per_item;
} job;

static float abs_max(const float *x, size_t n, float max)
{
    for (size_t i = 0; i < n; i++)
        max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    return max;
}

static void encode_head(const job *w, const char *in, size_t head, char *slice)
{
    const kvk_encode_args *a = w->a;
    float x[CHUNK], max = 0;
    char *to = slice + head * a->dims;

    in += head * a->dims * w->elem_bytes;
    for (size_t t = 0; t < a->dims; t += CHUNK) {
        size_t n = a->dims - t < CHUNK ? a->dims - t : CHUNK;
        w->isa->convert(in + t * w->elem_bytes, a->in.dtype, n, x);
        max = abs_max(x, n, max);
    }
    uint16_t bits = max > 0 ? kvki_scale_bits(max, largest_of(a->dtype)) : 0;
    memcpy(slice + kvki_scale_off(a->n_heads, a->dims, head), &bits, sizeof(bits));
    if (bits == 0) {
        memset(to, 0, a->dims);
        return;
    }
    for (size_t t = 0; t < a->dims; t += CHUNK) {
        uint32_t n = a->dims - t < CHUNK ? (uint32_t)(a->dims - t) : CHUNK;
        w->isa->convert(in + t * w->elem_bytes, a->in.dtype, n, x);
        if (a->dtype == KVK_I8_SCALED)
            w->isa->quantize(x, n, kvki_f32_of_bf16(bits), (int8_t *)to + t);
        else
            w->isa->e4m3(x, n, kvki_f32_of_bf16(bits), (uint8_t *)to + t);
    }
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t end = (item + 1) * w->rows_per_item;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < w->a->n && i < end; i++) {
        for (size_t head = 0; head < w->a->n_heads; head++)
            encode_head(w, kvki_row(&w->a->in, i), head,
                        (char *)w->a->out + i * w->a->out_stride_bytes);
    }
}

kvc_status kvki_fast_encode(kvk_backend *be, const kvk_encode_args *a)
{
    job w = {a, be->isa, kvk_dtype_bytes(a->in.dtype),
             1 + ITEM_ELEMS / ((size_t)a->n_heads * a->dims)};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
