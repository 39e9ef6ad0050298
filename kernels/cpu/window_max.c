/*
 * window_max.c: sliding maximum (ESA eq. 8). The window of 2 eps + 1 is covered by two windows of a
 * power of two, and those are built by doubling: log2(window) passes, all in vectors. One item is a
 * run of places with eps neighbours on either side. NaN counts as -INFINITY.
 */
#include "check.h"
#include "internal.h"
#include "isa.h"

#define RUN_MIN 8192u

kvc_status kvki_check_window_max(const kvk_window_max_args *a)
{
    if (a->n == 0)
        return KVC_OK;
    if (!a->in || !a->out)
        return KVC_INVALID;
    return a->out + a->n <= a->in || a->in + a->n <= a->out ? KVC_OK : KVC_INVALID;
}

kvc_status kvki_ref_window_max(const kvk_window_max_args *a)
{
    for (size_t j = 0; j < a->n; j++) {
        size_t from = j > a->eps ? j - a->eps : 0;
        size_t to = a->eps < a->n - 1 - j ? j + a->eps : a->n - 1;
        a->out[j] = -INFINITY;
        for (size_t t = from; t <= to; t++) {
            if (a->in[t] > a->out[j])
                a->out[j] = a->in[t];
        }
    }
    return KVC_OK;
}

typedef struct job {
    const kvk_window_max_args *a;
    const kvki_isa *isa;
    size_t eps, run;
    float *buf; /* [threads, run + 2 eps] */
} job;

/* buf[t] = in[from - eps + t], -INFINITY outside and for NaN. */
static void load_run(const job *w, size_t from, size_t len, float *buf)
{
    for (size_t t = 0; t < len; t++) {
        size_t at = from + t; /* of in, plus eps */
        float x = at >= w->eps && at - w->eps < w->a->n ? w->a->in[at - w->eps] : -INFINITY;
        buf[t] = x >= -INFINITY ? x : -INFINITY;
    }
}

static void run_item(void *arg, size_t item, uint32_t worker)
{
    const job *w = arg;
    size_t from = item * w->run, window = 2 * w->eps + 1, width = 1;
    size_t n = w->a->n - from < w->run ? w->a->n - from : w->run;
    size_t len = n + 2 * w->eps;
    float *buf = w->buf + worker * (w->run + 2 * w->eps);

    load_run(w, from, len, buf);
    for (; 2 * width <= window; width *= 2) /* buf[t] becomes the maximum of [t, t + 2 width) */
        w->isa->max2(buf, buf + width, len - 2 * width + 1, buf);
    w->isa->max2(buf, buf + (window - width), n, w->a->out + from);
}

kvc_status kvki_fast_window_max(kvk_backend *be, const kvk_window_max_args *a)
{
    job w = {.a = a, .isa = be->isa};

    if (a->n == 0)
        return KVC_OK;
    w.eps = a->eps < a->n ? a->eps : a->n - 1;
    w.run = 2 * w.eps > RUN_MIN ? 2 * w.eps : RUN_MIN;
    w.buf = kvki_scratch_take(be->scratch,
                              kvki_pool_threads(be->pool) * (w.run + 2 * w.eps) * sizeof(float));
    if (!w.buf)
        return KVC_NO_MEMORY;
    kvki_pool_run(be->pool, (a->n + w.run - 1) / w.run, run_item, &w);
    kvki_scratch_give(be->scratch, w.buf);
    return KVC_OK;
}
