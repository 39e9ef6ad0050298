/*
 * attend.c: attention over a list of rows, as a partial (o, lse): the checks and the reference, two
 * passes per query head in double over the rows it sees. The fast form is in attend_fast.c.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "elem.h"
#include "internal.h"

kvc_status kvki_check_attend(const kvk_attend_args *a)
{
    uint32_t seen = 0;

    if (!kvki_heads_ok(a->n_q_heads, a->n_kv_heads) || a->head_dim == 0 ||
        (!kvki_dtype_ok(a->dtype) && !kvk_is_coded(a->dtype)) || !isfinite(a->scale) ||
        !(a->softcap >= 0) || !isfinite(a->softcap))
        return KVC_INVALID;
    if (!kvki_shape_ok(a->n_q, a->n_q_heads, (size_t)a->head_dim * 2) ||
        !kvki_shape_ok(a->n_kv, a->n_kv_heads, (size_t)a->head_dim * 4))
        return KVC_INVALID;
    if (a->inv_freq && a->k_positions && a->head_dim % 2 != 0)
        return KVC_INVALID;
    if (!kvki_pointers_ok(a->rows, a->n_kv) || (a->n_q && (!a->q || !a->o || !a->lse)))
        return KVC_INVALID;
    for (size_t i = 0; a->visible && i < a->n_q; i++) {
        if (a->visible[i] > a->n_kv || a->visible[i] < seen)
            return KVC_INVALID;
        seen = a->visible[i];
    }
    return KVC_OK;
}

/* K of row j and one head, rotated, in double. */
static void key_ref(const kvk_attend_args *a, size_t j, size_t kv_head, double *k)
{
    const char *row = (const char *)a->rows[j] + a->k_off_bytes;
    size_t d = a->head_dim, half = d / 2;

    for (size_t t = 0; t < d; t++)
        k[t] = (double)kvki_slice_elem(row, a->dtype, a->n_kv_heads, a->head_dim, kv_head, t);
    if (!a->inv_freq || !a->k_positions)
        return;
    for (size_t t = 0; t < half; t++) {
        double angle = a->k_positions[j] * a->inv_freq[t];
        double x = k[t], y = k[half + t];
        k[t] = x * cos(angle) - y * sin(angle);
        k[half + t] = y * cos(angle) + x * sin(angle);
    }
}

static double logit_ref(const kvk_attend_args *a, const float *q, const double *k)
{
    double x = 0;

    for (size_t t = 0; t < a->head_dim; t++)
        x += (double)q[t] * k[t];
    x *= (double)a->scale;
    return a->softcap > 0 ? (double)a->softcap * tanh(x / (double)a->softcap) : x;
}

/* One query head over the rows it sees; keys [n_kv, head_dim], logits [n_kv], sums [head_dim]. */
static void attend_one_ref(const kvk_attend_args *a, size_t query, size_t head, const double *keys,
                           double *logits, double *sums)
{
    size_t d = a->head_dim, n = a->visible ? a->visible[query] : a->n_kv;
    size_t out = query * a->n_q_heads + head;
    size_t kv_head = head / (a->n_q_heads / a->n_kv_heads);
    double max = -INFINITY, total = 0;
    bool nan = false;

    for (size_t j = 0; j < n; j++) {
        logits[j] = logit_ref(a, a->q + out * d, keys + j * d);
        max = logits[j] > max ? logits[j] : max;
        nan = nan || isnan(logits[j]);
    }
    memset(sums, 0, d * sizeof(*sums));
    for (size_t j = 0; j < n && max > -INFINITY; j++) {
        const char *row = (const char *)a->rows[j] + a->v_off_bytes;
        double weight = exp(logits[j] - max);
        total += weight;
        for (size_t t = 0; t < d; t++)
            sums[t] += weight * (double)kvki_slice_elem(row, a->dtype, a->n_kv_heads, a->head_dim,
                                                        kv_head, t);
    }
    for (size_t t = 0; t < d; t++)
        a->o[out * d + t] = nan ? NAN : total > 0 || isnan(total) ? (float)(sums[t] / total) : 0;
    a->lse[out] = nan ? NAN : total > 0 || isnan(total) ? (float)(max + log(total)) : -INFINITY;
}

kvc_status kvki_ref_attend(const kvk_attend_args *a)
{
    size_t d = a->head_dim, group = a->n_q_heads / a->n_kv_heads;
    double *buf = calloc(a->n_kv * (d + 1) + d, sizeof(*buf));
    double *logits = buf + a->n_kv * d;

    if (!buf)
        return KVC_NO_MEMORY;
    for (size_t kv_head = 0; kv_head < a->n_kv_heads; kv_head++) {
        for (size_t j = 0; j < a->n_kv; j++)
            key_ref(a, j, kv_head, buf + j * d);
        for (size_t r = 0; r < a->n_q * group; r++)
            attend_one_ref(a, r / group, kv_head * group + r % group, buf, logits,
                           logits + a->n_kv);
    }
    free(buf);
    return KVC_OK;
}
