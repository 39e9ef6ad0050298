/*
 * worker.c: opens and closes a worker. Everything here runs on the caller's thread; once kvw_open
 * has returned, the worker is immutable but for its pool and its put queue, which lock.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static kvc_status open_backend(kvw_worker *w)
{
    const kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = w->opts.n_threads};
    uint32_t number = 0;
    const kvwi_device_ops *device =
        kvwi_device_find(w->opts.backend, w->selector->fusion != 0, &number);
    bool cpu = w->opts.backend[0] == '\0' || device != NULL;
    const char *name = cpu ? "cpu" : w->opts.backend;
    kvc_status st = kvk_backend_open(name, &opts, &w->be);
    if (st != KVC_OK) {
        return kvwi_fail(st, "backend: \"%s\" does not open", name);
    }
    w->ops = kvk_backend_ops(w->be);
    w->device_ops = device;
    if (device == NULL) {
        return w->opts.device_memory == 0
                   ? KVC_OK
                   : kvwi_fail(KVC_INVALID, "device_memory: backend is not a device");
    }
    return device->open(w, number, &w->device);
}

kvc_status kvw_open(const kvw_opts *opts, kvw_worker **worker_p)
{
    if (opts == NULL || worker_p == NULL) {
        return kvwi_fail(KVC_INVALID, "opts and worker_p must not be NULL");
    }
    *worker_p = NULL;
    kvw_worker *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    kvwi_pool_init(&w->pool);
    kvc_status st = kvwi_options_fill(w, opts);
    if (st == KVC_OK) {
        st = kvwi_levels_open(w);
    }
    if (st == KVC_OK) {
        st = open_backend(w);
    }
    if (st == KVC_OK) {
        st = kvwi_schema_open(w);
    }
    if (st == KVC_OK && w->opts.client != NULL) {
        st = kvwi_putter_open(w, &w->putter);
    }
    if (st != KVC_OK) {
        kvw_close(w);
        return st;
    }
    size_t rows = (size_t)w->opts.n_layers * w->opts.block_tokens;
    w->block_kv_bytes = rows * w->row_bytes;
    w->block_bytes = w->block_kv_bytes + (w->opts.client != NULL ? rows * w->index_row_bytes : 0);
    *worker_p = w;
    return KVC_OK;
}

void kvw_close(kvw_worker *worker)
{
    if (worker == NULL) {
        return;
    }
    kvwi_putter_close(worker->putter);
    kvwi_pool_fini(worker);
    if (worker->device != NULL) {
        worker->device_ops->close(worker->device);
    }
    kvk_backend_close(worker->be);
    kvwi_levels_close(worker);
    free(worker->kv_parts);
    free(worker->index_parts);
    free(worker->group_parts);
    kvwi_options_fini(worker);
    free(worker);
}

const kvc_digest *kvw_schema_digest(const kvw_worker *worker)
{
    return &worker->schema;
}
