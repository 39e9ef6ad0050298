/*
 * segments.c: what this process has mapped of servers on the same host, and its registration with
 * devices; and what it has opened of their GPUs' memory.
 *
 * A client tells of segments on threads of its own, and outlives workers, so the list is the
 * process's. One mutex (LEAF) guards it; registration, which takes milliseconds a segment, happens
 * under it, when a worker first asks for an address. A client tells of a segment's end when no map
 * is in it any more; who reads there holds the map until the device is done (kvc_map_hold).
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "state.h"

#define KEEP_NS     60000000000ull
#define MAX_DEVICES 16u

typedef struct segment {
    struct segment *next;
    const uint8_t *base; /* of a GPU's: its address on the device that opened it */
    size_t len_bytes;
    bool opened;                        /* a GPU's */
    const uint8_t *device[MAX_DEVICES]; /* NULL: not registered */
    bool refused[MAX_DEVICES];
} segment;

static kvc_mutex mutex = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rank = KVC_RANK_LEAF};
static segment *segments;              /* guarded by mutex */
static kvk_cuda *devices[MAX_DEVICES]; /* likewise; segments outlive the workers' own */

static void remove_segment(const void *base, bool opened)
{
    for (segment **at = &segments; *at != NULL; at = &(*at)->next) {
        segment *s = *at;
        if (s->base != base || s->opened != opened) {
            continue;
        }
        for (uint32_t d = 0; d < MAX_DEVICES; d++) {
            if (s->device[d] == NULL) {
                continue;
            }
            if (opened) {
                kvk_cuda_share_close(devices[d], (void *)(uintptr_t)s->base);
            } else {
                kvk_cuda_unregister(devices[d], (void *)(uintptr_t)s->base);
            }
        }
        *at = s->next;
        free(s);
        return;
    }
}

static void on_segment(void *arg, const void *base, size_t len_bytes, bool mapped)
{
    (void)arg;
    kvc_mutex_lock(&mutex);
    remove_segment(base, false);
    segment *s = mapped ? calloc(1, sizeof(*s)) : NULL;
    if (s != NULL) { /* else its rows go by request */
        *s = (segment){.next = segments, .base = base, .len_bytes = len_bytes};
        segments = s;
    }
    kvc_mutex_unlock(&mutex);
}

/* Under the mutex. */
static kvc_status open_device(uint32_t number)
{
    return devices[number] != NULL ? KVC_OK : kvk_cuda_open(number, &devices[number]);
}

static kvc_status on_gpu_open(void *arg, const kvc_gpu_handle *handle, size_t len_bytes,
                              void **base_p)
{
    uint32_t number = (uint32_t)(uintptr_t)arg;
    kvk_cuda_shared shared;
    memcpy(shared.bytes, handle->share, sizeof(shared.bytes));
    segment *s = calloc(1, sizeof(*s));
    kvc_status st = s != NULL && number < MAX_DEVICES ? KVC_OK : KVC_NO_MEMORY;
    kvc_mutex_lock(&mutex);
    if (st == KVC_OK) {
        st = open_device(number);
    }
    if (st == KVC_OK) {
        st = kvk_cuda_share_open(devices[number], &shared, base_p);
    }
    if (st == KVC_OK) {
        *s = (segment){.next = segments, .base = *base_p, .len_bytes = len_bytes, .opened = true};
        s->device[number] = *base_p;
        segments = s;
    }
    kvc_mutex_unlock(&mutex);
    if (st != KVC_OK) {
        free(s);
        KVC_LOG_INFO(WORKER,
                     "device %u cannot open the server's GPU memory (%s): rows come from "
                     "its dram",
                     number, kvc_status_name(st));
    }
    return st;
}

static void on_gpu_close(void *arg, void *base)
{
    (void)arg;
    kvc_mutex_lock(&mutex);
    remove_segment(base, true);
    kvc_mutex_unlock(&mutex);
}

void kvwi_segments_watch(kvc_client *client, uint32_t number)
{
    const kvc_map_opts opts = {.size_bytes = sizeof(opts),
                               .all = true,
                               .populate = true,
                               .on_segment = on_segment,
                               .arg = (void *)(uintptr_t)number,
                               .keep_ns = KEEP_NS,
                               .gpu_open = on_gpu_open,
                               .gpu_close = on_gpu_close};
    kvc_status st = kvc_client_map_contexts(client, &opts);
    if (st != KVC_OK) { /* rows go by request */
        KVC_LOG_DEBUG(WORKER, "contexts are not mapped: %s", kvc_last_error());
    }
}

bool kvwi_segments_on_device(uint32_t number, const void *address)
{
    const uint8_t *p = address;
    bool found = false;
    kvc_mutex_lock(&mutex);
    for (const segment *s = segments; s != NULL && number < MAX_DEVICES && !found; s = s->next) {
        found =
            s->opened && s->device[number] != NULL && p >= s->base && p < s->base + s->len_bytes;
    }
    kvc_mutex_unlock(&mutex);
    return found;
}

/* Under the mutex. */
static kvc_status register_segment(segment *s, uint32_t number)
{
    void *at = NULL;
    kvc_status st = open_device(number);
    if (st == KVC_OK) {
        st = kvk_cuda_register(devices[number], (void *)(uintptr_t)s->base, s->len_bytes, 1, &at);
    }
    s->device[number] = at;
    s->refused[number] = st != KVC_OK;
    return st;
}

const void *kvwi_segments_find(uint32_t number, const void *host)
{
    const uint8_t *p = host, *found = NULL;
    kvc_status st = KVC_OK;
    kvc_mutex_lock(&mutex);
    for (segment *s = segments; s != NULL && number < MAX_DEVICES; s = s->next) {
        if (s->opened || p < s->base || p >= s->base + s->len_bytes) {
            continue;
        }
        if (s->device[number] == NULL && !s->refused[number]) {
            st = register_segment(s, number);
        }
        found = s->device[number] == NULL ? NULL : s->device[number] + (p - s->base);
        break;
    }
    kvc_mutex_unlock(&mutex);
    if (st != KVC_OK) {
        KVC_LOG_WARN(WORKER, "a mapped segment cannot be registered with device %u: %s", number,
                     kvc_status_name(st));
    }
    return found;
}
