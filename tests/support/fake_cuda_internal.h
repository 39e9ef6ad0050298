/*
 * fake_cuda_internal.h: what the files of the fake device share. Ops that are in no graph run when
 * they are called.
 */
#ifndef KVASIR_TEST_FAKE_CUDA_INTERNAL_H
#define KVASIR_TEST_FAKE_CUDA_INTERNAL_H

#include "fake_cuda.h"
#include "kvk/cuda.h"

struct kvk_cuda {
    kvk_backend *be;
    const kvk_ops *ops;
};

/* Whether one more op is taken; counts it. */
bool fake_cuda_take_op(void);

#endif
