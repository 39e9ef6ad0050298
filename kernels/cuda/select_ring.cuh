/*
 * select_ring.cuh: the way from select.cu to the scan of select_ring.cu.
 */
#ifndef KVKI_CUDA_SELECT_RING_CUH
#define KVKI_CUDA_SELECT_RING_CUH

#include "select_form.cuh"

/* Whether the scan through rings takes these on this device. */
bool kvki_select_ring_takes(const kvk_cuda *cuda, const struct select_params *p);

/* Launches it; the workspace is cut, and nothing is left to check. */
kvc_status kvki_select_ring(const kvk_cuda *cuda, const struct select_params *p,
                            kvk_stream *stream);

#endif
