/*
 * registry.c: the kinds of devices, and what is the same for all of them. A new kind is one table
 * and one line here.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const kvwi_device_ops *const registered[] = {&kvwi_device_cuda, &kvwi_device_cuda_chunks};

const kvwi_device_ops *kvwi_device_find(const char *backend, bool chunks, uint32_t *number_p)
{
    for (size_t i = 0; i < sizeof(registered) / sizeof(registered[0]); i++) {
        size_t n = strlen(registered[i]->name);
        const char *rest = backend + n;
        if (strncmp(backend, registered[i]->name, n) != 0 || registered[i]->chunks != chunks) {
            continue;
        }
        *number_p = 0;
        if (*rest == '\0') {
            return registered[i];
        }
        if (rest[0] == ':' && rest[1] >= '0' && rest[1] <= '9' && strlen(rest) <= 4) {
            char *end = NULL;
            *number_p = (uint32_t)strtoul(rest + 1, &end, 10);
            return *end == '\0' ? registered[i] : NULL;
        }
    }
    return NULL;
}

bool kvwi_device_takes(const kvw_step *step)
{
    const kvw_worker *w = step->seq->worker;
    return w->device != NULL &&
           (w->device_ops->takes_passes ||
            (step->n_q == 1 && !kvwi_is_full(w, kvwi_near_begin(w, step->n_tokens, 1))));
}

bool kvwi_device_takes_pass(const kvw_worker *worker, uint32_t n)
{
    return worker->device != NULL && (n == 1 || worker->device_ops->takes_passes);
}

const void *kvwi_device_to_host(kvw_seq *seq, const void *p, size_t len_bytes, kvwi_buf *buf)
{
    const kvw_worker *w = seq->worker;
    if (w->device == NULL || !w->opts.device_memory) {
        return p;
    }
    kvc_status st = kvwi_buf_need(buf, len_bytes);
    if (st != KVC_OK) {
        (void)kvwi_fail(st, "out of memory");
        return NULL;
    }
    return w->device_ops->copy(seq, buf->p, p, len_bytes) == KVC_OK ? buf->p : NULL;
}
