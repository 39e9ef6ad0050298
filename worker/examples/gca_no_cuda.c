/*
 * gca_no_cuda.c: the decoder's math on a GPU in a build without CUDA: it does not open. Stateless.
 */
#include "gca_internal.h"

static kvc_status open_none(gca_model *m, uint32_t number)
{
    (void)m;
    (void)number;
    return KVC_UNSUPPORTED;
}

static void close_none(gca_model *m)
{
    (void)m;
}

const gca_math gca_math_cuda = {.name = "cuda", .open = open_none, .close = close_none};
