/*
 * angles.c: cosines and sines of the first positions, kept with the backend.
 *
 * Attention numbers its keys from 0 in every layer and step, so the same angles come again and
 * again; computed in double, they cost more than reading them. A backend keeps those of the first
 * frequencies that it meets (a worker has one model), for positions below KEPT. Any thread. What
 * lies below `filled` never changes, so readers of it hold nothing; the lock guards
 * the rest.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "isa.h"

#define KEPT     8192u
#define HALF_MAX 128u /* so at most 8 MiB */

struct kvki_angles {
    pthread_mutex_t lock;
    uint32_t half;   /* 0: no frequencies met yet */
    double *freq;    /* [half] */
    float *kept;     /* [KEPT, 2, half]: cos, sin */
    uint32_t filled; /* positions */
};

kvc_status kvki_angles_create(kvki_angles **angles_p)
{
    *angles_p = calloc(1, sizeof(**angles_p));
    if (!*angles_p)
        return KVC_NO_MEMORY;
    pthread_mutex_init(&(*angles_p)->lock, NULL);
    return KVC_OK;
}

void kvki_angles_destroy(kvki_angles *angles)
{
    if (!angles)
        return;
    pthread_mutex_destroy(&angles->lock);
    free(angles->freq);
    free(angles->kept);
    free(angles);
}

/* Adopts the first frequencies; false: they are others, or memory is short. The lock is held. */
static bool adopt(kvki_angles *angles, const double *freq, uint32_t half)
{
    if (angles->half == 0) {
        angles->freq = malloc(half * sizeof(*freq));
        angles->kept = malloc((size_t)KEPT * 2 * half * sizeof(float));
        if (!angles->freq || !angles->kept) {
            free(angles->freq);
            free(angles->kept);
            angles->freq = NULL;
            angles->kept = NULL;
            return false;
        }
        memcpy(angles->freq, freq, half * sizeof(*freq));
        angles->half = half;
    }
    return angles->half == half && memcmp(angles->freq, freq, half * sizeof(*freq)) == 0;
}

const float *kvki_angles_of(kvk_backend *be, const double *freq, uint32_t half, uint32_t n)
{
    kvki_angles *angles = be->angles;
    const float *kept = NULL;

    if (n > KEPT || half > HALF_MAX)
        return NULL;
    pthread_mutex_lock(&angles->lock);
    if (adopt(angles, freq, half)) {
        for (uint32_t p = angles->filled; p < n; p++) {
            float *at = angles->kept + (size_t)p * 2 * half;
            be->isa->angles(p, freq, half, at, at + half);
            angles->filled = p + 1;
        }
        kept = angles->kept;
    }
    pthread_mutex_unlock(&angles->lock);
    return kept;
}
