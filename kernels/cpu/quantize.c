/*
 * quantize.c: f32 vectors to int8 index rows with one bf16 scale per head. Both forms follow the
 * contract to the bit: scale is max|x| / 127 rounded up to bf16 (so |x / scale| <= 127), the
 * quotient is taken in f32 and rounded half to even.
 */
#include <string.h>

#include "check.h"
#include "codec.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

static bool all_finite(const float *x, size_t n)
{
    uint32_t bad = 0;

    for (size_t i = 0; i < n; i++)
        bad |= (kvki_bits_of_f32(x[i]) & 0x7f800000u) == 0x7f800000u;
    return bad == 0;
}

kvc_status kvki_check_quantize(const kvk_quantize_args *a)
{
    size_t row = kvk_index_row_bytes(a->n_heads, a->dims);

    if (a->n_heads == 0 || a->dims == 0 || a->dims > UINT32_MAX - 2 ||
        !kvki_shape_ok(a->n, a->n_heads, a->dims))
        return KVC_INVALID;
    if (a->n == 0)
        return KVC_OK;
    if (!a->in || !a->out || !kvki_stride_ok(a->n, a->out_stride_bytes, row))
        return KVC_INVALID;
    return all_finite(a->in, (size_t)a->n * a->n_heads * a->dims) ? KVC_OK : KVC_INVALID;
}

static float abs_max(const float *x, size_t n)
{
    float max = 0;

    for (size_t i = 0; i < n; i++)
        max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    return max;
}

/* Writes the scale of one head and gives it as a float; 0 for a zero head. */
static float put_scale(const kvk_quantize_args *a, const float *x, char *row, size_t head)
{
    float max = abs_max(x, a->dims);
    uint16_t bits = max > 0 ? kvki_scale_bits(max, 127.0) : 0;

    memcpy(row + (size_t)a->n_heads * a->dims + 2 * head, &bits, sizeof(bits));
    return kvki_f32_of_bf16(bits);
}

kvc_status kvki_ref_quantize(const kvk_quantize_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        char *row = (char *)a->out + i * a->out_stride_bytes;
        for (size_t head = 0; head < a->n_heads; head++) {
            const float *x = a->in + (i * a->n_heads + head) * a->dims;
            float scale = put_scale(a, x, row, head);
            for (size_t j = 0; j < a->dims; j++) {
                int8_t v = scale > 0 ? (int8_t)rintf(x[j] / scale) : 0;
                memcpy(row + head * a->dims + j, &v, sizeof(v));
            }
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_quantize_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_quantize_args *a = w->a;
    size_t end = (item + 1) * w->rows_per_item;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < a->n && i < end; i++) {
        char *row = (char *)a->out + i * a->out_stride_bytes;
        for (size_t head = 0; head < a->n_heads; head++) {
            const float *x = a->in + (i * a->n_heads + head) * a->dims;
            float scale = put_scale(a, x, row, head);
            if (scale > 0)
                w->isa->quantize(x, a->dims, scale, (int8_t *)row + head * a->dims);
            else
                memset(row + head * a->dims, 0, a->dims);
        }
    }
}

kvc_status kvki_fast_quantize(kvk_backend *be, const kvk_quantize_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / ((size_t)a->n_heads * a->dims)};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
