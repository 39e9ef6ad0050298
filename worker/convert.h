/*
 * convert.h: f32 results back into the model's dtype, round to nearest even.
 */
#ifndef KVWI_CONVERT_H
#define KVWI_CONVERT_H

#include <stddef.h>

#include "kvk/compute.h"

/* out [n] in dtype = in [n]. dtype is F32, F16 or BF16. */
void kvwi_from_f32(const float *in, size_t n, kvk_dtype dtype, void *out);

#endif
