/*
 * prefill_forms.h: what tests and benchmarks ask of prefill (prefill.cu) beside its public op,
 * plain C11: the form that a device with one of its own does not take, and how its keys are shared
 * out.
 *
 * Not for other callers: hidden in a shared library, and no promise of the interface.
 */
#ifndef KVKI_CUDA_PREFILL_FORMS_H
#define KVKI_CUDA_PREFILL_FORMS_H

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* kvk_cuda_prefill in the form of all devices, also where one has a form of its own (sm_90). */
kvc_status kvki_cuda_prefill_portable(kvk_cuda *cuda, const kvk_cuda_prefill_args *args,
                                      kvk_stream *stream) KVC_MUST_CHECK;

/* Over how many blocks the keys of a block of query rows are shared out, in either form; by the
 * shape in args, as the workspace. 0: it is out of range. */
uint32_t kvki_cuda_prefill_splits(const kvk_cuda_prefill_args *args);

#ifdef __cplusplus
}
#endif
#endif
