/*
 * gpu.h: the gpu tier: copies of values that are read often, in the spare memory of a GPU.
 *
 * Every value in it is in dram or lmdb too, so a GPU that fails costs time and nothing else. Copies
 * are made and evicted by one thread, kvs-gpu-0; anybody reads them. Where gpu_bytes is 0, the
 * build has no CUDA or the machine no GPU, nothing of this happens.
 */
#ifndef KVS_GPU_H
#define KVS_GPU_H

#include "server.h"

/* Opens the tier and starts its thread, if one is wanted and possible; says so in one line if not.
   Only what has nothing to do with the GPU is an error: NO_MEMORY. */
kvc_status kvs_gpu_open(kvs_server *server) KVC_MUST_CHECK;
/* Ends the thread, once it has done what was asked for. */
void kvs_gpu_stop(kvs_server *server);

/* Whether there is a tier that works. */
bool kvs_gpu_works(const kvs_server *server);
/* Copies a value that the lookup marked for it (kvs_read.raise); takes its extra reference. Any
   thread, does not block. */
void kvs_gpu_raise(kvs_server *server, const kvs_schema *schema, uint32_t part,
                   const kvs_read *read);
/* The same on the gpu thread, of a value that kvs_gpu_want marked. AGAIN: no room; IO. */
kvc_status kvs_gpu_load(kvs_server *server, const kvs_schema *schema, uint32_t part, uint32_t value,
                        kvs_slot dram);
/* Rows of a referenced value that has a copy there. Anything but OK: they are to be read from lmdb,
   and a device that has failed is not asked again. May block. */
kvc_status kvs_gpu_read(kvs_server *server, const kvs_read *read, uint32_t row_bytes,
                        uint32_t n_rows, const kvs_row_range *ranges, uint32_t n_ranges);
/* Releases copies whose values are no more. Any thread. */
void kvs_gpu_reap(kvs_server *server);

#endif
