/*
 * gpu_pins.h: which segments of dram a GPU reads in place. Private to gpu_attend.c.
 *
 * Any thread; one leaf lock guards the table. A segment is claimed by one caller, registered with
 * the device without the lock, and unregistered, likewise, when base/lent.h says that it goes,
 * which is not while one of its slots is held. What that table does not know is never claimed.
 */
#ifndef KVSI_GPU_PINS_H
#define KVSI_GPU_PINS_H

#include "base/lent.h"
#include "base/thread.h"
#include "kvk/cuda.h"

typedef enum kvsi_pin_state {
    KVSI_PIN_NONE = 0,
    KVSI_PIN_CLAIMED,
    KVSI_PIN_HERE,
    KVSI_PIN_LEAVING, /* being unregistered */
    KVSI_PIN_REFUSED, /* the device did not take it: not asked again */
} kvsi_pin_state;

typedef struct kvsi_gpu_pin {
    const uint8_t *base;
    uint8_t *device;
    size_t len_bytes;
    kvsi_pin_state state;
} kvsi_gpu_pin;

typedef struct kvsi_gpu_pins {
    kvc_lent_watch watch; /* first */
    kvk_cuda *cuda;
    uint64_t max_bytes, segment_bytes;
    uint64_t rest_ns; /* once memory that can be locked is out */
    kvc_mutex lock;   /* rank LEAF; guards all below */
    kvsi_gpu_pin *list;
    uint32_t n;
    uint64_t bytes;    /* claimed, here and leaving */
    const void **lent; /* [lent_room] what base/lent.h has, by its first byte */
    uint32_t n_lent, lent_room;
    uint64_t rest_until_ns; /* nothing is claimed before */
} kvsi_gpu_pins;

/* segment_bytes: of each of dram's. */
void kvsi_gpu_pins_init(kvsi_gpu_pins *pins, kvk_cuda *cuda, uint64_t max_bytes,
                        uint64_t segment_bytes);
/* Unregisters all. */
void kvsi_gpu_pins_fini(kvsi_gpu_pins *pins);
/* As the slots of kvs_gpu_attend_ops. */
bool kvsi_gpu_pins_claim(kvsi_gpu_pins *pins, uint32_t number, const void *base, size_t len_bytes);
kvc_status kvsi_gpu_pins_settle(kvsi_gpu_pins *pins, uint32_t number, bool pin) KVC_MUST_CHECK;
const void *kvsi_gpu_pins_find(kvsi_gpu_pins *pins, uint32_t number, const void *row,
                               bool *may_claim_p);

#endif
