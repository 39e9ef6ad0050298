/*
 * fake_cuda.h: kvk/cuda.h without a GPU, for tests of what stands on it.
 *
 * Device memory is host memory, an op runs when it is enqueued (but see fake_cuda_late), on the
 * compute layer's CPU backend, and a graph keeps what was enqueued and runs it again. So the
 * results are those of a device, the sanitizers see every access, and nothing can be told of
 * timing. Device memory of whole KVK_CUDA_SHARE_UNITs can be opened by other processes, and by the
 * same. Links in place of kvk_cuda.
 */
#ifndef KVASIR_TEST_FAKE_CUDA_H
#define KVASIR_TEST_FAKE_CUDA_H

#include <stdbool.h>
#include <stdint.h>

#include "kvk/compute.h"

/* kvk_cuda_open answers UNSUPPORTED from now on, or no longer. */
void fake_cuda_absent(bool absent);
/* Allocations from now on: so many succeed, then NO_MEMORY; UINT32_MAX: all succeed. */
void fake_cuda_allocations(uint32_t n);
/* Copies and fills from now on: so many succeed, then DEVICE; UINT32_MAX: all succeed. */
void fake_cuda_copies(uint32_t n);
/* Waits for streams from now on: so many succeed, then DEVICE; UINT32_MAX: all succeed. */
void fake_cuda_syncs(uint32_t n);
/* kvk_cuda_share_open answers UNSUPPORTED from now on, or no longer. */
void fake_cuda_no_sharing(bool none);
/* kvk_cuda_export answers UNSUPPORTED from now on, or no longer. */
void fake_cuda_no_export(bool none);
/* How often writes of other devices were flushed. */
uint32_t fake_cuda_flushes(void);
/* Device memory that was taken and not given back. */
uint64_t fake_cuda_device_bytes(void);
/* Changes every 64th byte of it. */
void fake_cuda_damage(void);
/* Ops from now on: so many are taken, then UNSUPPORTED; UINT32_MAX: all are taken. */
void fake_cuda_ops(uint32_t n);
/* Shared memory that a block may have, 227 KiB (sm_90) at first; ops that need more are
 * UNSUPPORTED. */
void fake_cuda_shared(uint32_t bytes);
/* kvk_cuda_register answers this from now on, if it is not OK. */
void fake_cuda_registers(kvc_status status);
/* So far behind the memory it is for the device; 0: at its address. Only for who does not read it.
 */
void fake_cuda_registers_at(uint32_t off_bytes);
/* How often it was called. */
uint32_t fake_cuda_asked_to_register(void);
/* Called before each kvk_cuda_unregister; NULL: nothing. */
void fake_cuda_before_unregister(void (*fn)(void *arg), void *arg);
/* Memory that was taken and not given back; registrations likewise. */
uint32_t fake_cuda_held(void);
/* Graphs that were made and not destroyed. */
uint32_t fake_cuda_graphs(void);
/* Called before each graph that is launched, and each gather, once it is set; NULL: nothing. */
void fake_cuda_before_launch(void (*fn)(void *arg), void *arg);
/* From now on, or no longer: what a stream has to do beside another one is done only when something
 * waits for it. */
void fake_cuda_late(bool are_late);
/* A stream as an engine has one; what was enqueued on it so far, copies apart. */
kvk_stream *fake_cuda_stream(void);
uint64_t fake_cuda_enqueued(const kvk_stream *stream);
void fake_cuda_stream_free(kvk_stream *stream);
/* Rows that were read from sources so far. */
uint64_t fake_cuda_rows_read(void);

#endif
