/*
 * chunk_weights.c: fusion weights of retrieved chunks, softmax over the chosen (GCA) or stick
 * breaking in descending position (HSA). Lists are short, so both forms are one loop in double in
 * the order of the list, with an exponential of our own: backends, hosts and GPUs give the same
 * bits.
 */
#include "check.h"
#include "exact_exp.h"
#include "internal.h"

/* Positions of one query's list must differ where they count. */
static bool ids_differ(const float *scores, const uint32_t *ids, size_t k)
{
    for (size_t i = 0; i < k; i++) {
        for (size_t j = 0; j < i; j++) {
            if (ids[i] == ids[j] && scores[i] != -INFINITY && scores[j] != -INFINITY)
                return false;
        }
    }
    return true;
}

kvc_status kvki_check_chunk_weights(const kvk_chunk_weights_args *a)
{
    if ((a->fusion != KVK_FUSE_SOFTMAX && a->fusion != KVK_FUSE_STICK) || !isfinite(a->scale) ||
        a->scale <= 0 || a->k > KVK_CHUNKS_MAX || !kvki_shape_ok(a->n, a->k, 1))
        return KVC_INVALID;
    if (a->n == 0 || a->k == 0)
        return KVC_OK;
    if (!a->scores || !a->weights || (a->fusion == KVK_FUSE_STICK && !a->ids))
        return KVC_INVALID;
    for (size_t i = 0; a->fusion == KVK_FUSE_STICK && i < a->n; i++) {
        if (!ids_differ(a->scores + i * a->k, a->ids + i * a->k, a->k))
            return KVC_INVALID;
    }
    return KVC_OK;
}

static void softmax(const float *scores, double scale, size_t k, float *weights)
{
    double max = -INFINITY, sum = 0;
    bool nan = false;

    for (size_t i = 0; i < k; i++) {
        double x = scale * (double)scores[i];
        max = x > max ? x : max;
        nan = nan || isnan(x);
    }
    for (size_t i = 0; i < k; i++)
        sum += max > -INFINITY ? kvki_exact_exp(scale * (double)scores[i] - max) : 0;
    for (size_t i = 0; i < k; i++) {
        double x = scale * (double)scores[i];
        weights[i] = nan ? NAN : x == -INFINITY ? 0 : (float)(kvki_exact_exp(x - max) / sum);
    }
}

static void stick(const float *scores, const uint32_t *ids, double scale, size_t k, float *weights)
{
    bool nan = false;

    for (size_t i = 0; i < k; i++) {
        double w = scores[i] == -INFINITY ? 0 : kvki_exact_sigma(scale * (double)scores[i]);
        nan = nan || isnan(scores[i]);
        for (size_t j = 0; j < k; j++) {
            if (scores[j] != -INFINITY && ids[j] > ids[i]) /* 1 - sigma(x) without cancellation */
                w *= kvki_exact_sigma(-scale * (double)scores[j]);
        }
        weights[i] = (float)w;
    }
    for (size_t i = 0; nan && i < k; i++)
        weights[i] = NAN;
}

kvc_status kvki_ref_chunk_weights(const kvk_chunk_weights_args *a)
{
    for (size_t i = 0; i < a->n; i++) {
        size_t at = i * a->k;
        if (a->fusion == KVK_FUSE_SOFTMAX)
            softmax(a->scores + at, (double)a->scale, a->k, a->weights + at);
        else
            stick(a->scores + at, a->ids + at, (double)a->scale, a->k, a->weights + at);
    }
    return KVC_OK;
}

kvc_status kvki_fast_chunk_weights(kvk_backend *be, const kvk_chunk_weights_args *a)
{
    (void)be;
    return kvki_ref_chunk_weights(a);
}
