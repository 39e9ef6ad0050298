/*
 * fake_cuda_internal.h: what the files of the fake device share. Ops that are in no graph run when
 * they are called.
 */
#ifndef KVASIR_TEST_FAKE_CUDA_INTERNAL_H
#define KVASIR_TEST_FAKE_CUDA_INTERNAL_H

#include <stdatomic.h>

#include "fake_cuda.h"
#include "kvk/cuda.h"

struct kvk_cuda {
    kvk_backend *be;
    const kvk_ops *ops;
};

/* Whether one more op is taken; counts it. */
bool fake_cuda_take_op(void);
/* What fake_cuda_shared set. */
uint32_t fake_cuda_shared_bytes(void);
/* Takes one of what is left (UINT32_MAX: without end); false: nothing is. */
bool fake_cuda_take(atomic_uint *counter);

/* FAKE_CUDA_OP(name) { ... } defines kvk_cuda_<name>, whose body runs at once, or with the graph
 * that it was captured into. `args` points to its arguments. */
typedef kvc_status fake_op(kvk_cuda *cuda, const void *args);

kvc_status fake_cuda_enqueue(kvk_cuda *cuda, kvk_stream *stream, fake_op *fn, const void *args,
                             size_t len_bytes);

#define FAKE_CUDA_OP(name)                                                                         \
    static kvc_status run_##name(kvk_cuda *cuda, const void *args);                                \
    kvc_status kvk_cuda_##name(kvk_cuda *cuda, const kvk_cuda_##name##_args *args,                 \
                               kvk_stream *stream)                                                 \
    {                                                                                              \
        return fake_cuda_enqueue(cuda, stream, run_##name, args, sizeof(*args));                   \
    }                                                                                              \
    static kvc_status run_##name(kvk_cuda *cuda, const void *args)

/* Whether x [n] bf16 are finite; *bad (NULL: not) is set to 1 where they are not. */
bool fake_cuda_all_finite(const void *x, size_t n, uint32_t *bad);
/* x [heads, inputs] f32 or bf16 through proj [heads, inputs, dims]. */
kvc_status fake_cuda_project(kvk_cuda *cuda, const void *x, kvk_dtype dtype, uint32_t heads,
                             uint32_t inputs, const float *proj, uint32_t dims, float *out);
/* kvk_cuda_query of one sequence, per head. */
kvc_status fake_cuda_query_heads(kvk_cuda *cuda, const kvk_cuda_query_args *a, uint32_t seq);
/* NULL: the source does not have it. */
const uint8_t *fake_cuda_source_row(const kvk_cuda_source *s, uint32_t pos, uint32_t row_bytes);
/* Calls what fake_cuda_before_launch set. */
void fake_cuda_announce(void);
/* Whether a workspace was cleared, or used for as many sequences since; its first bytes say. */
#define FAKE_CUDA_TAG_BYTES 16u
bool fake_cuda_is_clean(void *workspace, uint32_t n_seqs);
/* A row was read from a source. */
void fake_cuda_count_row(void);

#endif
