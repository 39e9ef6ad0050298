/*
 * cuda.c: the CUDA kind of device: whether it can serve a worker, what it holds for all of a
 * worker's sequences, and its table.
 *
 * Runs inside kvw_open and kvw_close; immutable in between.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

#define SLOTS_MAX  (1u << 20) /* of kvk_cuda_resolve */
#define INPUTS_MAX 8192u      /* of kvk_cuda_frame */

static kvc_status no(const char *option, const char *rule)
{
    return kvwi_fail(KVC_UNSUPPORTED, "%s: %s where backend is cuda", option, rule);
}

static kvc_status check(const kvw_worker *w)
{
    const kvw_opts *o = &w->opts;
    const kvwi_cuda_selector *selector = kvwi_cuda_selector_of(w);
    if (selector == NULL) {
        return no("selector", "must be esa or tokenselect");
    }
    if (w->level[0].exact || w->n_levels > selector->levels ||
        w->level[kvwi_finest(w)].dims > 256) {
        return no("index", "must be COMPRESSED, or RERANKED with tokenselect, of at most 256 dims");
    }
    if (o->dtype != KVK_BF16) {
        return no("dtype", "must be bf16");
    }
    if (o->head_dim != 64 && o->head_dim != 128) {
        return no("head_dim", "must be 64 or 128");
    }
    if (o->n_q_heads / o->n_kv_heads > 8) {
        return no("n_q_heads", "must be at most 8 a kv head");
    }
    if (w->k_bytes % 16 != 0) {
        return no("n_kv_heads", "must be a multiple of 8 with row_dtype");
    }
    if (o->k > KVK_CUDA_K_MAX) {
        return no("k", "must be at most 4096");
    }
    if (o->n_sink * w->level[0].row_bytes % 16 != 0) {
        return no("n_sink", "times the bytes of an index row must be a multiple of 16");
    }
    if (o->chunk_tokens > KVK_CUDA_CHUNK_MAX) {
        return no("chunk_tokens", "must be at most 4096");
    }
    if (kvwi_slots(w) > SLOTS_MAX) {
        return no("residency_slots", "must be at most 2^20 with n_sink");
    }
    if (o->n_kv_heads * o->head_dim > INPUTS_MAX) {
        return no("n_kv_heads", "times head_dim must be at most 8192");
    }
    if (o->tp_size != 1 || o->all_reduce != NULL) {
        return no("tp_size", "must be 1");
    }
    return w->servers.n <= 1 ? selector->check(w) : no("clients", "must be one");
}

/* What depends on the GPU. */
static kvc_status check_shape(const kvw_worker *w, const kvwi_device *device)
{
    kvk_cuda_attend_args args = {
        .n_q_heads = w->opts.n_q_heads,
        .n_kv_heads = w->opts.n_kv_heads,
        .head_dim = w->opts.head_dim,
        .row_bytes = (uint32_t)w->row_bytes,
        .v_off_bytes = (uint32_t)w->k_bytes,
        .dtype = w->row_dtype,
        .near = {.n_max = kvwi_near_max(w), .inv_freq = w->inv_freq},
    };
    static const int32_t somewhere;
    if (w->selector->positions == KVW_RENUMBER) { /* keys of the list are rotated too */
        args.k_positions = &somewhere;
        args.inv_freq = w->inv_freq;
    }
    kvc_status st = kvk_cuda_attend_supports(device->cuda, &args);
    return st == KVC_OK ? kvwi_cuda_selector_of(w)->supports(w, device->cuda)
                        : no("n_kv_heads", "times head_dim: 16 rows must fit in shared memory");
}

static kvc_status upload(kvwi_device *device, const void *from, size_t len_bytes, void *memory_pp)
{
    void *p = NULL;
    kvc_status st = kvk_cuda_alloc(device->cuda, KVK_CUDA_DEVICE, len_bytes, &p);
    memcpy(memory_pp, &p, sizeof(p));
    if (st == KVC_OK) {
        st = kvk_cuda_copy(device->cuda, p, from, len_bytes, NULL);
    }
    return st == KVC_OK ? kvk_cuda_stream_sync(device->cuda, NULL) : st;
}

static kvc_status upload_all(const kvw_worker *w, kvwi_device *device)
{
    kvc_status st = KVC_OK;
    for (uint32_t i = 0; st == KVC_OK && i < w->n_levels; i++) {
        const kvwi_level *level = &w->level[i];
        size_t bytes =
            (size_t)w->opts.n_layers * level->heads * level->d_in * level->dims * sizeof(float);
        st = upload(device, level->a, bytes, &device->query_proj[i]);
        if (st == KVC_OK) {
            st = upload(device, level->b, bytes, &device->key_proj[i]);
        }
    }
    if (st == KVC_OK && w->inv_freq != NULL) {
        st = upload(device, w->inv_freq, w->opts.head_dim / 2u * sizeof(double), &device->inv_freq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "memory of a worker");
}

void kvwi_cuda_device_close(kvwi_device *device)
{
    if (device == NULL) {
        return;
    }
    for (uint32_t i = 0; i < KVWI_MAX_LEVELS; i++) {
        kvk_cuda_free(device->cuda, KVK_CUDA_DEVICE, device->query_proj[i]);
        kvk_cuda_free(device->cuda, KVK_CUDA_DEVICE, device->key_proj[i]);
    }
    kvk_cuda_free(device->cuda, KVK_CUDA_DEVICE, device->inv_freq);
    kvk_cuda_close(device->cuda);
    free(device);
}

kvc_status kvwi_cuda_device_open(const kvw_worker *worker, uint32_t number, kvwi_device **device_p)
{
    kvk_cuda_info info;
    *device_p = NULL;
    kvwi_device *device = calloc(1, sizeof(*device));
    if (device == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    kvc_status st = kvk_cuda_open(number, &device->cuda);
    if (st != KVC_OK) {
        free(device);
        return kvwi_fail(st,
                         "backend: \"%s\": no CUDA device %u here that this build can use (no "
                         "GPU, no driver, or older than sm_80)",
                         worker->opts.backend, number);
    }
    device->number = number;
    kvk_cuda_describe(device->cuda, &info);
    /* .5: counts the times that the bits of passes or steps became others */
    (void)snprintf(device->isa, sizeof(device->isa), "sm_%u.5", info.sm);
    *device_p = device;
    return KVC_OK;
}

static kvc_status cuda_open(kvw_worker *worker, uint32_t number, kvwi_device **device_p)
{
    kvwi_device *device = NULL;
    kvc_status st = check(worker);
    *device_p = NULL;
    if (st == KVC_OK) {
        st = kvwi_cuda_device_open(worker, number, &device);
    }
    if (device == NULL) {
        return st;
    }
    if (st == KVC_OK) {
        st = check_shape(worker, device);
    }
    device->selector = kvwi_cuda_selector_of(worker);
    if (st == KVC_OK) {
        st = upload_all(worker, device);
    }
    if (st != KVC_OK) {
        kvwi_cuda_device_close(device);
        return st;
    }
    if (worker->opts.client != NULL) {
        kvwi_segments_watch(worker->opts.client, number);
    }
    *device_p = device;
    return KVC_OK;
}

const char *kvwi_cuda_isa(const kvwi_device *device)
{
    return device->isa;
}

kvc_status kvwi_cuda_map(kvwi_device *device, void *base, size_t len_bytes)
{
    void *at = NULL;
    kvc_status st = kvk_cuda_register(device->cuda, base, len_bytes, 0, &at);
    if (st == KVC_OK && at != base) {
        kvk_cuda_unregister(device->cuda, base);
        st = KVC_UNSUPPORTED; /* buffers have one address here and there */
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a block buffer cannot be pinned");
}

void kvwi_cuda_unmap(kvwi_device *device, void *base)
{
    kvk_cuda_unregister(device->cuda, base);
}

kvc_status kvwi_cuda_copy(kvw_seq *seq, void *to, const void *from, size_t len_bytes)
{
    kvwi_device_seq *d = seq->device;
    kvc_status st = kvk_cuda_copy(d->device->cuda, to, from, len_bytes, d->stream);
    if (st == KVC_OK) {
        st = kvwi_cuda_sync(seq);
    }
    return st == KVC_OK ? st : kvwi_cuda_fail(st, "a copy");
}

uint64_t kvwi_cuda_bytes(const kvw_seq *seq)
{
    return seq->device->device_bytes;
}

const kvwi_device_ops kvwi_device_cuda = {
    .name = "cuda",
    .open = cuda_open,
    .close = kvwi_cuda_device_close,
    .isa = kvwi_cuda_isa,
    .map = kvwi_cuda_map,
    .unmap = kvwi_cuda_unmap,
    .seq_open = kvwi_cuda_seq_open,
    .seq_close = kvwi_cuda_seq_close,
    .takes_passes = true,
    .pass = kvwi_cuda_pass,
    .append = kvwi_cuda_append,
    .settle = kvwi_cuda_settle,
    .truncate = kvwi_cuda_truncate,
    .step_begin = kvwi_cuda_step_begin,
    .step_attend = kvwi_cuda_step_attend,
    .step_finish = kvwi_cuda_step_finish,
    .step_abandon = kvwi_cuda_step_abandon,
    .picks = kvwi_cuda_picks,
    .copy = kvwi_cuda_copy,
    .bytes = kvwi_cuda_bytes,
    .batch_open = kvwi_cuda_batch_open,
    .batch_close = kvwi_cuda_batch_close,
    .batch_join = kvwi_cuda_batch_join,
    .batch_finish = kvwi_cuda_batch_finish,
};
