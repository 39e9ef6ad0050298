/*
 * gpu_pins.c: see gpu_pins.h.
 *
 * Any thread. Invariants: bytes is the sum of what is claimed or registered, at most max_bytes; an
 * entry that is HERE names the segment's present memory, since the table hears of its end before it
 * is unmapped. Nothing but a call of CUDA happens under the lock that might block.
 */
#include "gpu_pins.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "base/metrics.h"

/* With the lock held. */
static void drop(kvsi_gpu_pins *pins, kvsi_gpu_pin *pin)
{
    if (pin->state == KVSI_PIN_HERE) {
        kvk_cuda_unregister(pins->cuda, (void *)(uintptr_t)pin->base);
        KVC_GAUGE_SUB(attend_gpu_pinned_bytes, pin->len_bytes);
    }
    if (pin->state == KVSI_PIN_HERE || pin->state == KVSI_PIN_CLAIMED)
        pins->bytes -= pin->len_bytes;
    *pin = (kvsi_gpu_pin){.state = KVSI_PIN_NONE};
}

static void added(kvc_lent_watch *watch, void *base, size_t len_bytes, kvc_lent_gpu *gpu)
{
    (void)watch; /* pinned once it is attended over */
    (void)base;
    (void)len_bytes;
    (void)gpu;
}

static void removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvsi_gpu_pins *pins = (kvsi_gpu_pins *)watch;
    (void)len_bytes;
    kvc_mutex_lock(&pins->lock);
    for (uint32_t i = 0; i < pins->n; i++) {
        if (pins->list[i].base != base)
            continue;
        KVC_ASSERT(pins->list[i].state != KVSI_PIN_CLAIMED);
        drop(pins, &pins->list[i]);
    }
    kvc_mutex_unlock(&pins->lock);
}

void kvsi_gpu_pins_init(kvsi_gpu_pins *pins, kvk_cuda *cuda, uint64_t max_bytes)
{
    *pins = (kvsi_gpu_pins){
        .watch = {.added = added, .removed = removed}, .cuda = cuda, .max_bytes = max_bytes};
    kvc_mutex_init(&pins->lock, KVC_RANK_LEAF);
    kvc_lent_watch_begin(&pins->watch);
}

void kvsi_gpu_pins_fini(kvsi_gpu_pins *pins)
{
    kvc_lent_watch_end(&pins->watch);
    for (uint32_t i = 0; i < pins->n; i++)
        drop(pins, &pins->list[i]);
    free(pins->list);
    kvc_mutex_fini(&pins->lock);
}

/* With the lock held. The entry of a segment; NULL: no memory. */
static kvsi_gpu_pin *entry_of(kvsi_gpu_pins *pins, uint32_t number)
{
    if (number >= pins->n) {
        uint32_t n = 2 * number + 16;
        kvsi_gpu_pin *more = realloc(pins->list, n * sizeof(*more));
        if (more == NULL)
            return NULL;
        memset(more + pins->n, 0, (n - pins->n) * sizeof(*more));
        pins->list = more;
        pins->n = n;
    }
    return &pins->list[number];
}

bool kvsi_gpu_pins_claim(kvsi_gpu_pins *pins, uint32_t number, const void *base, size_t len_bytes)
{
    kvc_mutex_lock(&pins->lock);
    kvsi_gpu_pin *pin = entry_of(pins, number);
    bool mine = pin != NULL && pin->state == KVSI_PIN_NONE && len_bytes <= pins->max_bytes &&
                pins->bytes <= pins->max_bytes - len_bytes;
    if (mine) {
        *pin = (kvsi_gpu_pin){.base = base, .len_bytes = len_bytes, .state = KVSI_PIN_CLAIMED};
        pins->bytes += len_bytes;
    }
    kvc_mutex_unlock(&pins->lock);
    return mine;
}

kvc_status kvsi_gpu_pins_settle(kvsi_gpu_pins *pins, uint32_t number, bool pin)
{
    void *device = NULL;
    kvc_status status = KVC_CANCELLED;
    kvc_mutex_lock(&pins->lock);
    KVC_ASSERT(pins->list[number].state == KVSI_PIN_CLAIMED);
    kvsi_gpu_pin claimed = pins->list[number];
    kvc_mutex_unlock(&pins->lock);
    if (pin) /* nobody touches a claimed entry */
        status = kvk_cuda_register(pins->cuda, (void *)(uintptr_t)claimed.base, claimed.len_bytes,
                                   0, &device);
    kvc_mutex_lock(&pins->lock);
    kvsi_gpu_pin *entry = &pins->list[number];
    if (status == KVC_OK) {
        entry->device = device;
        entry->state = KVSI_PIN_HERE;
        KVC_GAUGE_ADD(attend_gpu_pinned_bytes, claimed.len_bytes);
    } else {
        drop(pins, entry);
        if (pin)
            *entry = (kvsi_gpu_pin){.base = claimed.base, .state = KVSI_PIN_REFUSED};
    }
    kvc_mutex_unlock(&pins->lock);
    if (pin && status != KVC_OK)
        KVC_LOG_WARN(TIER, "gpu: segment %u of dram cannot be pinned: %s", number,
                     kvc_status_name(status));
    return status;
}

const void *kvsi_gpu_pins_find(kvsi_gpu_pins *pins, uint32_t number, const void *row)
{
    const uint8_t *at = row, *found = NULL;
    kvc_mutex_lock(&pins->lock);
    const kvsi_gpu_pin *pin = number < pins->n ? &pins->list[number] : NULL;
    if (pin != NULL && pin->state == KVSI_PIN_HERE && at >= pin->base &&
        at < pin->base + pin->len_bytes)
        found = pin->device + (at - pin->base);
    kvc_mutex_unlock(&pins->lock);
    return found;
}
