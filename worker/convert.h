/*
 * convert.h: f32 results back into the model's dtype, round to nearest even; and whether a caller's
 * numbers are finite.
 */
#ifndef KVWI_CONVERT_H
#define KVWI_CONVERT_H

#include <stdbool.h>
#include <stddef.h>

#include "kvk/compute.h"

/* out [n] in dtype = in [n]. dtype is F32, F16 or BF16. */
void kvwi_from_f32(const float *in, size_t n, kvk_dtype dtype, void *out);
/* Whether none of in [n] is an infinity or NaN. */
bool kvwi_all_finite(const void *in, size_t n, kvk_dtype dtype);

#endif
