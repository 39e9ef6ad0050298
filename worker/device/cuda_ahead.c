/*
 * cuda_ahead.c: rows that set off when a step begins, while the engine still makes its query: what
 * the query that began it picked, the real one or a prediction.
 *
 * Runs on the sequence's thread. Where every row has an address, a second stream brings them to
 * their slots, behind the selection, and the attention waits for that stream; where some have none,
 * the list of these comes to the host and one fetch is on its way to staging, which is one step's
 * at a time; unless their server is to attend over them, which only the query can ask for.
 * Invariants: a layer whose rows are ahead holds their map, or has the stamp with which they were
 * listed; nothing is ahead when the step ends.
 */
#include "base/clock.h"
#include "state.h"

static kvwi_device_layer *layer_of(const kvw_step *step)
{
    return &step->seq->device->layers[step->layer];
}

/* What is missing into its slots, beside what the stream does next. */
static kvc_status bring(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    kvk_cuda *cuda = d->device->cuda;
    kvc_status st = kvk_cuda_event_record(cuda, d->chosen, d->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_stream_wait(cuda, d->side, d->chosen);
    }
    if (st == KVC_OK) {
        st = kvwi_cuda_gather(step, d->side);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_event_record(cuda, l->brought, d->side);
    }
    l->ahead = st == KVC_OK ? KVWI_AHEAD_BROUGHT : KVWI_AHEAD_NONE;
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "rows that set off");
}

static kvc_status ask(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = kvwi_cuda_far_list(step);
    if (st == KVC_OK && *l->n_far != 0) {
        kvwi_cuda_far_send(step);
        d->staged_for = l;
    }
    l->stamp = d->stamp;
    l->ahead = st == KVC_OK ? KVWI_AHEAD_ASKED : KVWI_AHEAD_NONE;
    return st;
}

kvc_status kvwi_cuda_ahead(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    const kvw_worker *w = step->seq->worker;
    kvc_status st = KVC_OK;
    if (l->n_blank == 0 && kvwi_cuda_tables_take(step->seq, l)) {
        st = kvwi_cuda_graph_here(step->seq, step->layer);
        st = st == KVC_OK ? bring(step) : st;
    } else if (l->n_blank != 0 && d->staged_for == NULL && w->way != KVC_WAY_NEAR) {
        st = ask(step);
    }
    return st;
}

kvc_status kvwi_cuda_ahead_join(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    kvc_status st = KVC_OK;
    if (l->ahead == KVWI_AHEAD_BROUGHT) {
        st = kvk_cuda_stream_wait(d->device->cuda, d->stream, l->brought);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "rows that set off");
}

kvc_status kvwi_cuda_ahead_read(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < seq->worker->opts.n_layers; i++) {
        const kvwi_device_layer *l = &d->layers[i];
        if (l->ahead == KVWI_AHEAD_BROUGHT) {
            st = kvk_cuda_stream_wait(d->device->cuda, d->stream, l->brought);
        }
    }
    return st;
}

bool kvwi_cuda_ahead_failed(const kvw_step *step)
{
    const kvwi_device_layer *l = layer_of(step);
    return l->ahead == KVWI_AHEAD_LOST ||
           (l->ahead == KVWI_AHEAD_ASKED && l->stamp != step->seq->device->stamp);
}

void kvwi_cuda_ahead_yield(kvw_seq *seq)
{
    kvwi_device_layer *l = seq->device->staged_for;
    if (l != NULL) {
        kvwi_flight_cancel(&l->flight);
        l->ahead = KVWI_AHEAD_LOST;
        seq->device->staged_for = NULL;
    }
}

void kvwi_cuda_ahead_end(kvw_step *step)
{
    kvwi_device_seq *d = step->seq->device;
    kvwi_device_layer *l = layer_of(step);
    if (d->staged_for == l) {
        kvwi_flight_cancel(&l->flight);
        d->staged_for = NULL;
    }
    l->ahead = KVWI_AHEAD_NONE;
}
