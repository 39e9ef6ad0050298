/* decode.c: coded slices to f32: byte times scale, exact. One item is a run of rows. */
#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define ITEM_ELEMS 16384u

kvc_status kvki_check_decode(const kvk_decode_args *a)
{
    size_t slice = kvk_slice_bytes(KVK_I8_SCALED, a->n_heads, a->dims);

    if (a->n_heads == 0 || a->dims == 0 || !kvk_is_coded(a->in.dtype) ||
        !kvki_shape_ok(a->n, a->n_heads, (size_t)a->dims + 2))
        return KVC_INVALID;
    if (a->n == 0)
        return KVC_OK;
    return a->out && a->in.data && kvki_stride_ok(a->n, a->in.stride_bytes, slice) ? KVC_OK
                                                                                   : KVC_INVALID;
}

kvc_status kvki_ref_decode(const kvk_decode_args *a)
{
    size_t width = (size_t)a->n_heads * a->dims;

    for (size_t i = 0; i < a->n * width; i++)
        a->out[i] = kvki_slice_elem(kvki_row(&a->in, i / width), a->in.dtype, a->n_heads, a->dims,
                                    i % width / a->dims, i % a->dims);
    return KVC_OK;
}

typedef struct job {
    const kvk_decode_args *a;
    const kvki_isa *isa;
    size_t rows_per_item;
} job;

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    const kvk_decode_args *a = w->a;
    size_t end = (item + 1) * w->rows_per_item, width = (size_t)a->n_heads * a->dims;

    (void)worker;
    for (size_t i = item * w->rows_per_item; i < a->n && i < end; i++) {
        const char *slice = kvki_row(&a->in, i);
        w->isa->convert(slice, a->in.dtype, width, a->out + i * width);
        for (size_t head = 0; head < a->n_heads; head++) {
            float scale = kvki_scale_at(slice + kvki_scale_off(a->n_heads, a->dims, head));
            float *x = a->out + i * width + head * a->dims;
            for (size_t t = 0; t < a->dims; t++)
                x[t] *= scale;
        }
    }
}

kvc_status kvki_fast_decode(kvk_backend *be, const kvk_decode_args *a)
{
    job w = {a, be->isa, 1 + ITEM_ELEMS / ((size_t)a->n_heads * a->dims)};

    kvki_pool_run(be->pool, (a->n + w.rows_per_item - 1) / w.rows_per_item, run_item, &w);
    return KVC_OK;
}
