/*
 * segments.c: what this process has mapped of servers on the same host, and its registration with
 * devices.
 *
 * A client tells of segments on threads of its own, and outlives workers, so the list is the
 * process's. One mutex (LEAF) guards it; registration, which takes milliseconds a segment, happens
 * under it, when a worker first asks for an address. A client tells of a segment's end when no map
 * is in it any more; who reads there holds the map until the device is done (kvc_map_hold).
 */
#include <stdlib.h>

#include "base/log.h"
#include "state.h"

#define KEEP_NS     60000000000ull
#define MAX_DEVICES 16u

typedef struct segment {
    struct segment *next;
    const uint8_t *base;
    size_t len_bytes;
    const uint8_t *device[MAX_DEVICES]; /* NULL: not registered */
    bool refused[MAX_DEVICES];
} segment;

static kvc_mutex mutex = {.mutex = PTHREAD_MUTEX_INITIALIZER, .rank = KVC_RANK_LEAF};
static segment *segments;              /* guarded by mutex */
static kvk_cuda *devices[MAX_DEVICES]; /* likewise; segments outlive the workers' own */

static void remove_segment(const void *base)
{
    for (segment **at = &segments; *at != NULL; at = &(*at)->next) {
        segment *s = *at;
        if (s->base != base) {
            continue;
        }
        for (uint32_t d = 0; d < MAX_DEVICES; d++) {
            if (s->device[d] != NULL) {
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
    remove_segment(base);
    segment *s = mapped ? calloc(1, sizeof(*s)) : NULL;
    if (s != NULL) { /* else its rows go by request */
        *s = (segment){.next = segments, .base = base, .len_bytes = len_bytes};
        segments = s;
    }
    kvc_mutex_unlock(&mutex);
}

void kvwi_segments_watch(kvc_client *client)
{
    const kvc_map_opts opts = {.size_bytes = sizeof(opts),
                               .all = true,
                               .populate = true,
                               .on_segment = on_segment,
                               .keep_ns = KEEP_NS};
    kvc_status st = kvc_client_map_contexts(client, &opts);
    if (st != KVC_OK) { /* rows go by request */
        KVC_LOG_DEBUG(WORKER, "contexts are not mapped: %s", kvc_last_error());
    }
}

/* Under the mutex. */
static kvc_status register_segment(segment *s, uint32_t number)
{
    void *at = NULL;
    kvc_status st = KVC_OK;
    if (devices[number] == NULL) {
        st = kvk_cuda_open(number, &devices[number]);
    }
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
        if (p < s->base || p >= s->base + s->len_bytes) {
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
