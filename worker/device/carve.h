/*
 * carve.h: cuts one memory into aligned pieces: a function that carves is called twice, without a
 * base to learn the size, then for good. Stateless but for the carver.
 */
#ifndef KVWI_DEVICE_CARVE_H
#define KVWI_DEVICE_CARVE_H

#include <stddef.h>
#include <stdint.h>

#define KVWI_CARVE_ALIGN 256u

/* A memory that is being cut into pieces. */
typedef struct kvwi_carver {
    uint8_t *base; /* NULL: only the size is wanted */
    size_t at;
} kvwi_carver;

static inline void *kvwi_carve(kvwi_carver *c, size_t len_bytes)
{
    void *p = c->base == NULL ? NULL : c->base + c->at;
    c->at += (len_bytes + KVWI_CARVE_ALIGN - 1u) / KVWI_CARVE_ALIGN * KVWI_CARVE_ALIGN;
    return p;
}

#endif
