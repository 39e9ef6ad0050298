/*
 * gpu_pins.c: see gpu_pins.h.
 *
 * Any thread. Invariants: bytes is the sum of what is claimed or registered, at most max_bytes; an
 * entry that is HERE names the segment's present memory, since only memory that the table of
 * base/lent.h has is claimed, and that table says so before it is unmapped. Nothing is registered
 * or unregistered under the lock, for which calls wait.
 */
#include "gpu_pins.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"

#define REST_NS UINT64_C(10000000000)

static void unregister(kvsi_gpu_pins *pins, const kvsi_gpu_pin *pin)
{
    kvk_cuda_unregister(pins->cuda, (void *)(uintptr_t)pin->base);
    KVC_GAUGE_SUB(attend_gpu_pinned_bytes, pin->len_bytes);
}

/* With the lock held. Where memory for it is out, it stays unknown, and is not pinned. */
static void note(kvsi_gpu_pins *pins, const void *base)
{
    if (pins->n_lent == pins->lent_room) {
        uint32_t room = 2 * pins->lent_room + 16;
        const void **more = realloc(pins->lent, room * sizeof(*more));
        if (more == NULL)
            return;
        pins->lent = more;
        pins->lent_room = room;
    }
    pins->lent[pins->n_lent++] = base;
}

/* With the lock held. Its place in the list; n_lent: it is not there. */
static uint32_t lent_at(const kvsi_gpu_pins *pins, const void *base)
{
    uint32_t i = 0;
    while (i < pins->n_lent && pins->lent[i] != base)
        i++;
    return i;
}

static void added(kvc_lent_watch *watch, void *base, size_t len_bytes, kvc_lent_gpu *gpu)
{
    kvsi_gpu_pins *pins = (kvsi_gpu_pins *)watch;
    (void)len_bytes;
    if (gpu != NULL)
        return;
    kvc_mutex_lock(&pins->lock);
    note(pins, base); /* pinned once it is attended over */
    kvc_mutex_unlock(&pins->lock);
}

static void removed(kvc_lent_watch *watch, void *base, size_t len_bytes)
{
    kvsi_gpu_pins *pins = (kvsi_gpu_pins *)watch;
    (void)len_bytes;
    kvc_mutex_lock(&pins->lock);
    uint32_t at = lent_at(pins, base);
    if (at < pins->n_lent)
        pins->lent[at] = pins->lent[--pins->n_lent];
    for (uint32_t i = 0; i < pins->n; i++) {
        kvsi_gpu_pin pin = pins->list[i];
        if (pin.base != base)
            continue;
        KVC_ASSERT(pin.state != KVSI_PIN_CLAIMED);
        if (pin.state == KVSI_PIN_HERE) {
            pins->list[i].state = KVSI_PIN_LEAVING; /* it is nobody else's, and not found */
            kvc_mutex_unlock(&pins->lock);
            unregister(pins, &pin);
            kvc_mutex_lock(&pins->lock);
            pins->bytes -= pin.len_bytes;
        }
        pins->list[i] = (kvsi_gpu_pin){.state = KVSI_PIN_NONE};
    }
    kvc_mutex_unlock(&pins->lock);
}

void kvsi_gpu_pins_init(kvsi_gpu_pins *pins, kvk_cuda *cuda, uint64_t max_bytes,
                        uint64_t segment_bytes)
{
    *pins = (kvsi_gpu_pins){.watch = {.added = added, .removed = removed},
                            .cuda = cuda,
                            .max_bytes = max_bytes,
                            .segment_bytes = segment_bytes,
                            .rest_ns = REST_NS};
    kvc_mutex_init(&pins->lock, KVC_RANK_LEAF);
    kvc_lent_watch_begin(&pins->watch);
}

void kvsi_gpu_pins_fini(kvsi_gpu_pins *pins)
{
    kvc_lent_watch_end(&pins->watch);
    for (uint32_t i = 0; i < pins->n; i++)
        if (pins->list[i].state == KVSI_PIN_HERE)
            unregister(pins, &pins->list[i]);
    free(pins->list);
    free(pins->lent);
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

/* With the lock held. */
static bool has_room(const kvsi_gpu_pins *pins, uint64_t len_bytes)
{
    return len_bytes <= pins->max_bytes && pins->bytes <= pins->max_bytes - len_bytes &&
           (pins->rest_until_ns == 0 || kvc_expired(pins->rest_until_ns));
}

bool kvsi_gpu_pins_claim(kvsi_gpu_pins *pins, uint32_t number, const void *base, size_t len_bytes)
{
    kvc_mutex_lock(&pins->lock);
    kvsi_gpu_pin *pin = entry_of(pins, number);
    bool mine = pin != NULL && pin->state == KVSI_PIN_NONE && has_room(pins, len_bytes);
    if (mine && lent_at(pins, base) == pins->n_lent) { /* nobody would say that it goes */
        pin->state = KVSI_PIN_REFUSED;
        mine = false;
    }
    if (mine) {
        *pin = (kvsi_gpu_pin){.base = base, .len_bytes = len_bytes, .state = KVSI_PIN_CLAIMED};
        pins->bytes += len_bytes;
    }
    kvc_mutex_unlock(&pins->lock);
    return mine;
}

/* With the lock held: a claim ends without a registration. */
static void drop(kvsi_gpu_pins *pins, kvsi_gpu_pin *pin, kvc_status status)
{
    pins->bytes -= pin->len_bytes;
    if (status == KVC_CANCELLED || status == KVC_NO_MEMORY)
        *pin = (kvsi_gpu_pin){.state = KVSI_PIN_NONE};
    else
        *pin = (kvsi_gpu_pin){.base = pin->base, .state = KVSI_PIN_REFUSED};
    if (status == KVC_NO_MEMORY)
        pins->rest_until_ns = kvc_deadline_ns(pins->rest_ns);
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
        drop(pins, entry, status);
    }
    kvc_mutex_unlock(&pins->lock);
    if (pin && status != KVC_OK)
        KVC_LOG_WARN(TIER, "gpu: segment %u of dram cannot be pinned: %s", number,
                     kvc_status_name(status));
    return status;
}

const void *kvsi_gpu_pins_find(kvsi_gpu_pins *pins, uint32_t number, const void *row,
                               bool *may_claim_p)
{
    const uint8_t *at = row, *found = NULL;
    kvc_mutex_lock(&pins->lock);
    const kvsi_gpu_pin *pin = number < pins->n ? &pins->list[number] : NULL;
    if (pin != NULL && pin->state == KVSI_PIN_HERE && at >= pin->base &&
        at < pin->base + pin->len_bytes)
        found = pin->device + (at - pin->base);
    *may_claim_p =
        (pin == NULL || pin->state == KVSI_PIN_NONE) && has_room(pins, pins->segment_bytes);
    kvc_mutex_unlock(&pins->lock);
    return found;
}
