/*
 * residency.h: fetched rows of one layer of one sequence, by slot.
 *
 * A slot holds the row of one position. Every use of a row moves its slot to the young end of a
 * list; a miss takes the old end. The slots that a step uses are all younger than the rest, so a
 * step that needs no more rows than there are slots never evicts its own. Owned by the sequence's
 * thread.
 */
#ifndef KVWI_RESIDENCY_H
#define KVWI_RESIDENCY_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

typedef struct kvwi_residency {
    uint8_t *rows; /* [n_slots, row_bytes], borrowed */
    size_t row_bytes;
    uint32_t n_slots, n_used;
    int64_t *pos;          /* [n_slots]: position held, -1: none */
    uint32_t *next, *prev; /* [n_slots + 1]: ring through the sentinel n_slots, old to young */
    int32_t *slot_of;      /* [cap_pos]: slot of a position, -1: not here */
    uint32_t cap_pos;
} kvwi_residency;

/* n_slots 0 is allowed: nothing is ever resident. NO_MEMORY. */
kvc_status kvwi_residency_init(kvwi_residency *r, uint32_t n_slots, uint8_t *rows,
                               size_t row_bytes) KVC_MUST_CHECK;
void kvwi_residency_fini(kvwi_residency *r);
/* Positions below n_positions can be asked for from now on. */
kvc_status kvwi_residency_extend(kvwi_residency *r, uint32_t n_positions) KVC_MUST_CHECK;
/* The row of a position, made young; NULL: not here. */
const uint8_t *kvwi_residency_use(kvwi_residency *r, uint32_t pos);
/* Takes the oldest slot for pos, which is not here; *slot_p. NO_SPACE: n_slots is 0. */
kvc_status kvwi_residency_take(kvwi_residency *r, uint32_t pos, uint32_t *slot_p) KVC_MUST_CHECK;
/* Forgets pos, whose row did not arrive. */
void kvwi_residency_drop(kvwi_residency *r, uint32_t pos);

#endif
