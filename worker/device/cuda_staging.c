/*
 * cuda_staging.c: where a fetch brings the rows that a device's steps cannot reach.
 *
 * Pinned memory of the host, which the device reads over PCIe; and, where the server is reached by
 * rdma://, as much memory of the device beside it, which the RDMA device writes to itself. Which of
 * them a fetch uses is decided before it, on the sequence's thread: the device's until the
 * transport has found that nobody can write there. copy_in and flush run on the client's threads.
 * Invariant: staged is the first position of the one in use, whose blocks every layer's table has.
 */
#include <stdlib.h>

#include "base/log.h"
#include "state.h"

/* The client's, until rows come without it, and where another transport has taken over. */
static kvc_status copy_in(void *arg, void *to, const void *from, size_t len_bytes)
{
    kvwi_gpu_staging *s = arg;
    kvc_mutex_lock(&s->mutex);
    kvc_status st = kvk_cuda_copy(s->cuda, to, from, len_bytes, s->stream);
    if (st == KVC_OK) {
        st = kvk_cuda_stream_sync(s->cuda, s->stream);
    }
    kvc_mutex_unlock(&s->mutex);
    return st;
}

static kvc_status flush(void *arg)
{
    return kvk_cuda_flush_writes(((kvwi_gpu_staging *)arg)->cuda);
}

static bool is_by_rdma(kvc_client *client)
{
    const kvc_way_ask ask = {.n_rows = 1};
    kvc_way_cost costs[KVC_WAY_COUNT];
    (void)kvc_way_costs(client, &ask, costs, NULL);
    return costs[KVC_WAY_RDMA].why_not == NULL && !kvc_client_sums(client);
}

static kvc_status register_memory(kvwi_gpu_staging *s, uint32_t device)
{
    int fd = -1;
    kvc_region_gpu gpu = {.size_bytes = sizeof(gpu), .copy_in = copy_in, .flush = flush, .arg = s};
    if (kvk_cuda_export(s->cuda, s->memory, s->len_bytes, &fd, &gpu.dmabuf_off_bytes) != KVC_OK) {
        fd = -1; /* without a dma-buf there may still be peer memory */
    }
    gpu.dmabuf_fd = fd;
    const kvc_region_desc desc = {.size_bytes = sizeof(desc),
                                  .base = s->memory,
                                  .len_bytes = s->len_bytes,
                                  .kind = KVC_MEMORY_CUDA,
                                  .device = (int)device,
                                  .gpu = &gpu};
    kvc_status st = kvc_region_register(s->client, &desc, &s->regions.of[0]);
    kvk_cuda_export_close(s->cuda, fd);
    return st;
}

static void gpu_close(kvwi_gpu_staging *s)
{
    /* Else a call that nobody waits for has it: better lost than written to by who knows whom. */
    if (s->regions.of[0] == NULL || kvc_region_deregister(s->client, s->regions.of[0]) == KVC_OK) {
        kvk_cuda_free(s->cuda, KVK_CUDA_DEVICE, s->memory);
        kvk_cuda_stream_destroy(s->cuda, s->stream);
        kvc_mutex_fini(&s->mutex);
        free(s);
    }
}

/* Not having it is no failure. */
static void gpu_open(kvw_seq *seq, size_t len_bytes)
{
    kvwi_device_seq *d = seq->device;
    kvwi_device *device = d->device;
    const kvwi_servers *servers = &seq->worker->servers;
    if (servers->n != 1 || atomic_load(&device->no_gpu_staging) ||
        !is_by_rdma(servers->all[0].client) || kvk_cuda_flush_writes(device->cuda) != KVC_OK) {
        return;
    }
    kvwi_gpu_staging *s = calloc(1, sizeof(*s));
    if (s == NULL) {
        return;
    }
    kvc_mutex_init(&s->mutex, KVC_RANK_LEAF);
    s->cuda = device->cuda;
    s->client = servers->all[0].client;
    s->len_bytes = (len_bytes + KVK_CUDA_SHARE_UNIT - 1u) / KVK_CUDA_SHARE_UNIT *
                   KVK_CUDA_SHARE_UNIT; /* an allocation of its own, which can be exported */
    if (kvk_cuda_alloc(s->cuda, KVK_CUDA_DEVICE, s->len_bytes, &s->memory) != KVC_OK ||
        kvk_cuda_stream_create(s->cuda, &s->stream) != KVC_OK ||
        register_memory(s, device->number) != KVC_OK) {
        gpu_close(s);
        return;
    }
    d->gpu_staging = s;
    d->n_staging *= 2u;
    d->device_bytes += s->len_bytes;
    kvwi_cuda_staging_place(seq);
}

kvc_status kvwi_cuda_staging_open(kvw_seq *seq)
{
    const kvw_worker *w = seq->worker;
    kvwi_device_seq *d = seq->device;
    size_t len_bytes = (size_t)d->n_staging * w->opts.block_tokens * w->row_bytes;
    void *p = NULL;
    d->n_pinned = d->n_staging;
    kvc_status st = kvk_cuda_alloc(d->device->cuda, KVK_CUDA_PINNED, len_bytes, &p);
    d->staging = p;
    if (st == KVC_OK) {
        st = kvwi_regions_open(w, p, len_bytes, &d->staging_regions);
    }
    if (st == KVC_OK) {
        gpu_open(seq, len_bytes);
    }
    return st;
}

void kvwi_cuda_staging_close(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    if (kvwi_regions_close(seq->worker, &d->staging_regions) == KVC_OK) { /* else still in use */
        kvk_cuda_free(d->device->cuda, KVK_CUDA_PINNED, d->staging);
    }
    if (d->gpu_staging != NULL) {
        gpu_close(d->gpu_staging);
    }
}

static bool by_gpu(const kvwi_device_seq *d)
{
    return d->gpu_staging != NULL && !d->gpu_staging->refused;
}

void kvwi_cuda_staging_place(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    d->staged = d->cap_tokens + (by_gpu(d) ? d->n_pinned * seq->worker->opts.block_tokens : 0);
}

const void *kvwi_cuda_staging_block(const kvwi_device_seq *d, uint32_t i, size_t block_bytes)
{
    return i < d->n_pinned ? d->staging + i * block_bytes
                           : (uint8_t *)d->gpu_staging->memory + (i - d->n_pinned) * block_bytes;
}

void kvwi_cuda_staging_choose(kvw_seq *seq)
{
    kvwi_device_seq *d = seq->device;
    const char *why = "";
    if (!by_gpu(d) || d->staged_for != NULL || /* rows on their way have positions in this one */
        kvc_region_gpu_way(d->gpu_staging->regions.of[0], &why) != KVC_REGION_COPIED) {
        return;
    }
    if (!atomic_exchange(&d->device->no_gpu_staging, true)) {
        KVC_LOG_INFO(WORKER, "rows for GPU %u go through the host's memory: %s", d->device->number,
                     why);
    }
    d->gpu_staging->refused = true;
    kvwi_cuda_staging_place(seq);
}

const kvwi_regions *kvwi_cuda_staging_regions(const kvwi_device_seq *d)
{
    return by_gpu(d) ? &d->gpu_staging->regions : &d->staging_regions;
}
