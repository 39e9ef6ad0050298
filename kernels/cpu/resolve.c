/* resolve.c: splits picks into resident and missing ones; both lists keep the picks' order. */
#include "check.h"
#include "internal.h"

kvc_status kvki_check_resolve(const kvk_resolve_args *a)
{
    if (!a->n_hits_p || !a->n_misses_p)
        return KVC_INVALID;
    if (a->n == 0)
        return KVC_OK;
    if (!a->picks || !a->slot_of || !a->hits || !a->misses)
        return KVC_INVALID;
    for (size_t i = 0; i < a->n; i++) {
        if (a->picks[i] >= a->n_positions)
            return KVC_INVALID;
    }
    return KVC_OK;
}

kvc_status kvki_ref_resolve(const kvk_resolve_args *a)
{
    uint32_t hits = 0, misses = 0;

    for (uint32_t i = 0; i < a->n; i++) {
        if (a->slot_of[a->picks[i]] >= 0)
            a->hits[hits++] = i;
        else
            a->misses[misses++] = i;
    }
    *a->n_hits_p = hits;
    *a->n_misses_p = misses;
    return KVC_OK;
}

/* Both places are written, one is kept: no branch to mispredict. */
kvc_status kvki_fast_resolve(kvk_backend *be, const kvk_resolve_args *a)
{
    uint32_t hits = 0, misses = 0;

    (void)be;
    for (uint32_t i = 0; i < a->n; i++) {
        uint32_t miss = a->slot_of[a->picks[i]] < 0;
        a->hits[hits] = i;
        a->misses[misses] = i;
        hits += 1 - miss;
        misses += miss;
    }
    *a->n_hits_p = hits;
    *a->n_misses_p = misses;
    return KVC_OK;
}
