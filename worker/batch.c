/*
 * batch.c: a token of several sequences in one call, for engines that decode a batch.
 *
 * Runs on the thread that has the batch and all its sequences. Every sequence appends and begins
 * before any waits. On the CPU their misses travel together; a device steps them as one, or where a
 * row of one has no address that it can read, or one attends everything, one by one. Results are
 * those of kvw_forward on each, whichever way.
 */
#include <stdlib.h>

#include "internal.h"

struct kvw_batch {
    kvw_worker *worker;
    uint32_t n_max;
    kvw_step **steps; /* [n_max] of the call */
    kvwi_device_batch *device;
};

kvc_status kvw_batch_open(kvw_worker *worker, uint32_t n_max, void *stream, kvw_batch **batch_p)
{
    if (worker == NULL || batch_p == NULL || n_max == 0 || n_max > KVW_MAX_BATCH) {
        return kvwi_fail(KVC_INVALID, "worker and batch_p must not be NULL, n_max 1 to %u",
                         KVW_MAX_BATCH);
    }
    *batch_p = NULL;
    if (worker->selector->fusion != 0 || worker->opts.tp_size != 1) {
        return kvwi_fail(KVC_UNSUPPORTED, "batches: not with selector %s or tp_size %u",
                         worker->opts.selector, worker->opts.tp_size);
    }
    kvw_batch *batch = calloc(1, sizeof(*batch));
    kvw_step **steps = (kvw_step **)calloc(n_max, sizeof(kvw_step *));
    if (batch == NULL || steps == NULL) {
        free(batch);
        free((void *)steps);
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    *batch = (kvw_batch){.worker = worker, .n_max = n_max, .steps = steps};
    kvc_status st = worker->device == NULL
                        ? KVC_OK
                        : worker->device_ops->batch_open(worker, n_max, stream, &batch->device);
    if (st != KVC_OK) {
        kvw_batch_close(batch);
        return st;
    }
    *batch_p = batch;
    return KVC_OK;
}

void kvw_batch_close(kvw_batch *batch)
{
    if (batch == NULL) {
        return;
    }
    if (batch->device != NULL) {
        batch->worker->device_ops->batch_close(batch->device);
    }
    free((void *)batch->steps);
    free(batch);
}

static kvc_status check(const kvw_batch *batch, kvw_seq *const *seqs, uint32_t n)
{
    if (n == 0 || n > batch->n_max) {
        return kvwi_fail(KVC_INVALID, "n must be 1 to %u", batch->n_max);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (seqs[i] == NULL || seqs[i]->worker != batch->worker) {
            return kvwi_fail(KVC_INVALID, "sequence %u is not one of the batch's worker", i);
        }
        for (uint32_t j = 0; j < i; j++) {
            if (seqs[i] == seqs[j]) {
                return kvwi_fail(KVC_INVALID, "sequences %u and %u are the same", j, i);
            }
        }
    }
    return KVC_OK;
}

static const void *part_of(const void *all, uint32_t i, size_t len_bytes)
{
    return (const uint8_t *)all + i * len_bytes;
}

/* The last status that is not OK; all sequences that could begin have. */
static kvc_status begin_all(kvw_batch *batch, kvw_seq *const *seqs, uint32_t n, uint32_t layer,
                            const void *q, const void *k, const void *v)
{
    const kvw_worker *w = batch->worker;
    size_t q_bytes = (size_t)w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; i < n; i++) {
        kvc_status one = kvwi_append(seqs[i], layer, part_of(k, i, w->in_bytes),
                                     part_of(v, i, w->in_bytes), 1, true);
        if (one == KVC_OK) {
            one = kvwi_begin_whole(seqs[i], layer, part_of(q, i, q_bytes), 1, &batch->steps[i]);
        }
        st = one == KVC_OK ? st : one;
    }
    return st;
}

/* The steps are given back, whatever comes. */
static kvc_status finish_all(kvw_batch *batch, kvw_seq *const *seqs, uint32_t n, const void *q,
                             void *out, float *lse)
{
    const kvw_worker *w = batch->worker;
    size_t q_bytes = (size_t)w->opts.n_q_heads * w->opts.head_dim * w->elem_bytes;
    bool on_device = batch->device != NULL;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; i < n; i++) {
        on_device = on_device && batch->steps[i]->on_device;
    }
    if (on_device) {
        st = w->device_ops->batch_finish(batch->device, seqs, batch->steps, n, q, out, lse);
        for (uint32_t i = 0; i < n; i++) {
            if (st == KVC_OK) {
                kvwi_step_give(batch->steps[i]);
            } else {
                kvw_step_abandon(batch->steps[i]);
            }
        }
        return st;
    }
    for (uint32_t i = 0; i < n; i++) {
        kvc_status one =
            kvw_step_finish(batch->steps[i], part_of(q, i, q_bytes), (uint8_t *)out + i * q_bytes,
                            lse == NULL ? NULL : lse + (size_t)i * w->opts.n_q_heads);
        st = one == KVC_OK ? st : one;
    }
    return st;
}

kvc_status kvw_batch_forward(kvw_batch *batch, kvw_seq *const *seqs, uint32_t n, uint32_t layer,
                             const void *q, const void *k, const void *v, void *out, float *lse)
{
    if (batch == NULL || seqs == NULL || q == NULL || k == NULL || v == NULL || out == NULL ||
        layer >= batch->worker->opts.n_layers) {
        return kvwi_fail(KVC_INVALID,
                         "batch, seqs, q, k, v and out must not be NULL, layer must exist");
    }
    kvc_status st = check(batch, seqs, n);
    if (st != KVC_OK) {
        return st;
    }
    for (uint32_t i = 0; i < n; i++) {
        batch->steps[i] = NULL;
    }
    if (batch->device != NULL) {
        st = batch->worker->device_ops->batch_join(batch->device, seqs, n);
    }
    if (st != KVC_OK) {
        return st;
    }
    st = begin_all(batch, seqs, n, layer, q, k, v);
    if (st == KVC_OK) {
        return finish_all(batch, seqs, n, q, out, lse);
    }
    for (uint32_t i = 0; i < n; i++) {
        kvw_step_abandon(batch->steps[i]); /* NULL is fine */
    }
    return st;
}
