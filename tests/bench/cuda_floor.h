/*
 * cuda_floor.h: what a scan cannot beat on this device: a kernel that only reads its bytes, and one
 * that does nothing. C at its edge; enqueues on the stream, aborts nothing, returns a CUDA result.
 */
#ifndef CUDA_FLOOR_H
#define CUDA_FLOOR_H

#include <stddef.h>

#include "kvk/cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reads len_bytes (a multiple of 16) of device memory at p. sink: 4 bytes of device memory that are
 * written only where the bytes' sum happens to be one number. 0, or a CUDA error. */
int floor_read(const void *p, size_t len_bytes, void *sink, kvk_stream *stream);
/* A cooperative launch of a block of 512 threads for each of n multiprocessors, which ends at once.
 */
int floor_launch(unsigned n, void *sink, kvk_stream *stream);

#ifdef __cplusplus
}
#endif

#endif
