/*
 * cuda_finite.c: keys, and values that are coded, which are not finite and come in the engine's
 * device memory, where the host does not look.
 *
 * Runs on the sequence's thread. The device finds them while it takes the tokens, and says so in a
 * pinned word of the layer; the host reads it behind its next wait for that layer: at
 * the end of a step, before blocks are put, or before the layer gets other tokens. Invariant: a
 * layer whose word is set is `unchecked`, and nothing of that pass has left for the store.
 */
#include "state.h"

static kvc_status not_finite(const kvw_seq *seq, uint32_t layer)
{
    bool coded = kvk_is_coded(seq->worker->row_dtype);
    return kvwi_fail(KVC_INVALID, "layer %u: a key%s is not finite", layer,
                     coded ? " or a value" : "");
}

/* The layer is as it was before the pass. */
static kvc_status take_back(kvw_seq *seq, uint32_t layer)
{
    kvwi_layer *l = &seq->layers[layer];
    kvc_status st = kvwi_cuda_layer_truncate(seq, layer, seq->pass.first);
    if (st != KVC_OK) {
        return st;
    }
    l->n_tokens = seq->pass.first;
    l->picks.cached = false;
    for (uint32_t i = 0; i < seq->worker->n_levels; i++) {
        l->level[i].n_rows = kvwi_min_u32(l->level[i].n_rows, seq->pass.first);
    }
    return not_finite(seq, layer);
}

kvc_status kvwi_cuda_finite(kvw_seq *seq, uint32_t layer)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    if (l->unchecked && *l->bad != 0) {
        return take_back(seq, layer);
    }
    l->unchecked = false;
    return KVC_OK;
}

kvc_status kvwi_cuda_finite_all(kvw_seq *seq)
{
    for (uint32_t i = 0; i < seq->worker->opts.n_layers; i++) {
        kvwi_device_layer *l = &seq->device->layers[i];
        if (l->unchecked && *l->bad != 0) { /* it may be taken back as a whole */
            return not_finite(seq, i);
        }
        l->unchecked = false;
    }
    return KVC_OK;
}

kvc_status kvwi_cuda_finite_next(kvw_seq *seq, uint32_t layer)
{
    kvwi_device_layer *l = &seq->device->layers[layer];
    kvc_status st = l->unchecked ? kvwi_cuda_sync(seq) : KVC_OK;
    if (st != KVC_OK) {
        return kvwi_cuda_fail(st, "append");
    }
    if (l->unchecked && *l->bad != 0) {
        return not_finite(seq, layer);
    }
    if (l->bad != NULL) {
        *l->bad = 0; /* an append that failed halfway may have set it */
    }
    return KVC_OK;
}

kvc_status kvwi_cuda_finite_kept(kvw_seq *seq, uint32_t n_tokens)
{
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        kvwi_device_layer *l = &seq->device->layers[i];
        st = l->unchecked ? kvwi_cuda_sync(seq) : KVC_OK;
        if (st != KVC_OK) {
            return kvwi_cuda_fail(st, "rows that are taken back");
        }
        if (l->unchecked && *l->bad != 0 && n_tokens > seq->pass.first) {
            st = not_finite(seq, i);
        }
    }
    return st;
}
