/*
 * convert.h: whether a caller's numbers are finite.
 */
#ifndef KVWI_CONVERT_H
#define KVWI_CONVERT_H

#include <stdbool.h>
#include <stddef.h>

#include "kvk/compute.h"

/* Whether none of in [n] is an infinity or NaN. */
bool kvwi_all_finite(const void *in, size_t n, kvk_dtype dtype);

#endif
