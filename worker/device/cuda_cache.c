/*
 * cuda_cache.c: the Selection Cache (2411.02886 alg. 1) of a layer whose steps the device takes:
 * the device compares queries, in the graph that would select; the host says which picks it may
 * keep, and learns with the step's end whether it did.
 *
 * Runs on the sequence's thread. The rules are those of select.c, and so is what a layer remembers
 * (kvwi_picks), but for picks and query: these are where the last selection was made, the
 * sequence's own lane or a batch's, and come to where the next one is.
 */
#include "state.h"

kvc_status kvwi_cuda_bring_picks(kvw_seq *seq, kvwi_device_layer *l, kvwi_lane *lane, uint32_t at)
{
    const kvw_opts *o = &seq->worker->opts;
    const kvwi_lane *from = l->picks_in;
    size_t place = l->picks_at, width = (size_t)o->n_q_heads * o->head_dim;
    kvk_cuda *cuda = seq->device->device->cuda;
    kvk_stream *stream = seq->device->stream;
    if (from == lane && place == at) {
        return KVC_OK;
    }
    kvc_status st = kvk_cuda_copy(cuda, lane->picks + (size_t)at * o->k, from->picks + place * o->k,
                                  o->k * sizeof(*lane->picks), stream);
    if (st == KVC_OK) {
        st = kvk_cuda_copy(cuda, lane->n_picks + at, from->n_picks + place, sizeof(*lane->n_picks),
                           stream);
    }
    if (st == KVC_OK && lane->last != NULL) {
        st = kvk_cuda_copy(cuda, lane->last + at * width, from->last + place * width,
                           width * sizeof(*lane->last), stream);
    }
    l->picks_in = lane;
    l->picks_at = at;
    return st;
}

static uint32_t near_begin(const kvw_step *step)
{
    return kvwi_near_begin(step->seq->worker, step->n_tokens, 1);
}

kvc_status kvwi_cuda_cache_offer(kvw_step *step, kvwi_lane *lane, uint32_t at)
{
    kvw_seq *seq = step->seq;
    kvwi_device_layer *l = &seq->device->layers[step->layer];
    const kvwi_picks *picks = &seq->layers[step->layer].picks;
    bool may_keep = picks->cached &&
                    near_begin(step) - picks->near_begin <= seq->worker->opts.n_recent &&
                    l->near_from <= picks->near_begin;
    lane->kept_first[at] = may_keep ? picks->near_begin : UINT32_MAX;
    kvc_status st = may_keep ? kvwi_cuda_bring_picks(seq, l, lane, at) : KVC_OK;
    l->picks_in = lane;
    l->picks_at = at;
    return st;
}

kvc_status kvwi_cuda_cache_apart(kvw_step *step, kvwi_lane *lane, uint32_t at)
{
    kvwi_device_layer *l = &step->seq->device->layers[step->layer];
    lane->kept_first[at] = UINT32_MAX;
    return kvwi_cuda_bring_picks(step->seq, l, &l->lane, 0);
}

void kvwi_cuda_cache_decided(kvw_step *step, kvwi_lane *lane, uint32_t at)
{
    kvwi_picks *picks = &step->seq->layers[step->layer].picks;
    if (lane->last != NULL && lane->kept[at] != 0) {
        return;
    }
    step->seq->device->layers[step->layer].reselected = true;
    picks->cached = lane->last != NULL;
    picks->near_begin = near_begin(step);
}

void kvwi_cuda_cache_lose(kvw_step *step)
{
    step->seq->layers[step->layer].picks.cached = false;
}
