/*
 * attend_gpu_rig.h: what the tests of AttendRows on the server's GPU share: picks and a shape that
 * are worth one, calls that count what it attended over, and a server whose dram is pinned.
 *
 * The test's thread. Over a fake of kvk/cuda.h; with KVS_TEST_DEVICE on a GPU.
 */
#ifndef KVS_TEST_ATTEND_GPU_RIG_H
#define KVS_TEST_ATTEND_GPU_RIG_H

#include <stdlib.h>
#include <unistd.h>

#include "attend_rig.h"
#include "base/metrics.h"
#include "kvk/cuda.h"
#ifndef KVS_TEST_DEVICE
#include "fake_cuda.h"
#endif

extern uint32_t picks[MAX_PICKS], ranks[MAX_PICKS];
extern a_partial got, want, other;

/* Llama-3-8B's heads: 300 rows of 4 KiB are worth a GPU. */
extern const a_shape large;

uint64_t metric(kvc_metric m);
/* Until it has that value, 60 s at most. */
void wait_metric(kvc_metric m, uint64_t want_value);
uint64_t rows_read(void);
/* How often memory was to be pinned. 0 on a GPU. */
uint32_t asked_to_pin(void);
/* Asks once; gives how many rows the GPU attended over. */
uint64_t ask(a_server *f, const a_shape *s, const char *what);
/* A server whose dram is all pinned, by a call that the CPU attends, or begins to. */
void start_pinned(a_server *f, const a_shape *s);
/* Every value of the context gets a copy in the gpu tier. */
void prefetch(a_server *f);
/* Of each case; nothing of the device's may be left. */
int gpu_setup(void **state);
int gpu_teardown(void **state);

#endif
