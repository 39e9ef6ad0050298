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
    const char *name = w->opts.backend[0] != '\0' ? w->opts.backend : "cpu";
    kvc_status st = kvk_backend_open(name, &opts, &w->be);
    if (st != KVC_OK) {
        return kvwi_fail(st, "backend: \"%s\" does not open", name);
    }
    w->ops = kvk_backend_ops(w->be);
    return KVC_OK;
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
