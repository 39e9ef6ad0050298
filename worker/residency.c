/*
 * residency.c: slots of fetched rows, evicted by last use; see residency.h. Owned by the
 * sequence's thread.
 *
 * Invariants: slot_of[pos[s]] == s for every slot s that holds a position; the ring holds every
 * slot once, oldest after the sentinel, youngest before it.
 */
#include "residency.h"

#include <stdlib.h>
#include <string.h>

#include "base/assert.h"

static void unlink_slot(kvwi_residency *r, uint32_t s)
{
    r->next[r->prev[s]] = r->next[s];
    r->prev[r->next[s]] = r->prev[s];
}

/* Links s after `at`. */
static void link_after(kvwi_residency *r, uint32_t at, uint32_t s)
{
    r->prev[s] = at;
    r->next[s] = r->next[at];
    r->prev[r->next[at]] = s;
    r->next[at] = s;
}

static void make_young(kvwi_residency *r, uint32_t s)
{
    unlink_slot(r, s);
    link_after(r, r->prev[r->n_slots], s);
}

kvc_status kvwi_residency_init(kvwi_residency *r, uint32_t n_slots, uint8_t *rows, size_t row_bytes)
{
    *r = (kvwi_residency){.rows = rows, .row_bytes = row_bytes, .n_slots = n_slots};
    r->pos = malloc((n_slots + 1u) * sizeof(*r->pos));
    r->next = malloc((n_slots + 1u) * sizeof(*r->next));
    r->prev = malloc((n_slots + 1u) * sizeof(*r->prev));
    if (r->pos == NULL || r->next == NULL || r->prev == NULL) {
        kvwi_residency_fini(r);
        return KVC_NO_MEMORY;
    }
    for (uint32_t s = 0; s <= n_slots; s++) {
        r->pos[s] = -1;
        r->next[s] = s == n_slots ? 0 : s + 1u;
        r->prev[s] = s == 0 ? n_slots : s - 1u;
    }
    return KVC_OK;
}

void kvwi_residency_fini(kvwi_residency *r)
{
    free(r->pos);
    free(r->next);
    free(r->prev);
    free(r->slot_of);
    *r = (kvwi_residency){0};
}

kvc_status kvwi_residency_extend(kvwi_residency *r, uint32_t n_positions)
{
    if (n_positions <= r->cap_pos || r->n_slots == 0) {
        return KVC_OK;
    }
    uint32_t cap = n_positions + n_positions / 2u + 1024u;
    int32_t *slot_of = realloc(r->slot_of, cap * sizeof(*slot_of));
    if (slot_of == NULL) {
        return KVC_NO_MEMORY;
    }
    memset(slot_of + r->cap_pos, 0xff, (cap - r->cap_pos) * sizeof(*slot_of));
    r->slot_of = slot_of;
    r->cap_pos = cap;
    return KVC_OK;
}

const uint8_t *kvwi_residency_use(kvwi_residency *r, uint32_t pos)
{
    if (pos >= r->cap_pos || r->slot_of[pos] < 0) {
        return NULL;
    }
    uint32_t s = (uint32_t)r->slot_of[pos];
    make_young(r, s);
    return r->rows + s * r->row_bytes;
}

kvc_status kvwi_residency_take(kvwi_residency *r, uint32_t pos, uint32_t *slot_p)
{
    if (r->n_slots == 0) {
        return KVC_NO_SPACE;
    }
    KVC_ASSERT(pos < r->cap_pos && r->slot_of[pos] < 0);
    uint32_t s = r->next[r->n_slots];
    if (r->pos[s] >= 0) {
        r->slot_of[r->pos[s]] = -1;
    } else {
        r->n_used++;
    }
    r->pos[s] = pos;
    r->slot_of[pos] = (int32_t)s;
    make_young(r, s);
    *slot_p = s;
    return KVC_OK;
}

void kvwi_residency_drop(kvwi_residency *r, uint32_t pos)
{
    if (pos >= r->cap_pos || r->slot_of[pos] < 0) {
        return;
    }
    uint32_t s = (uint32_t)r->slot_of[pos];
    r->slot_of[pos] = -1;
    r->pos[s] = -1;
    r->n_used--;
    unlink_slot(r, s);
    link_after(r, r->n_slots, s);
}
