/*
 * heap.h: the process's own memory, beside the tiers: what it may come to, and how it is kept
 * there.
 *
 * RssAnon + RssShmem stay within dram_bytes + row_sums_bytes + 64 B a value + 256 MiB, with up to
 * 1,000 connections (max_connections) and the settings' defaults. The 256 MiB are made of
 *
 *   what                                                     MiB   held there by
 *   the process: tables, threads' stacks, libraries           25
 *   connections over gRPC, 30 KiB each; shm: 3 KiB each       30   max_connections
 *   requests received and not worked off                      64   max_inflight_bytes
 *   requests arriving, memory waiting for them                32   KVT_GRPC_READ_BYTES
 *   answers on their way                                      64   max_inflight_bytes again
 *   pages that LMDB prepares for a commit                     32   group_commit_bytes
 *   holes and what was freed lately                            9   ARENAS, KVS_HEAP_KEEP_BYTES
 *
 * which are never at their most all together. Connections over shm have their rings within a
 * quarter of max_inflight_bytes (16 MiB, the first four; the others send through the socket): bytes
 * that lie there are no request yet, so that they come out of what waits to be one. A connection
 * that rests has no buffer.
 *
 * Whoever raises max_inflight_bytes or group_commit_bytes raises the bound by twice the first and
 * by the second once. Whatever AttendRows takes (queries, results, lists of rows, and 2 to 4 MiB a
 * thread for its arithmetic) comes out of the share of answers, but for a table of rotary angles,
 * which grows to 8 MiB at most.
 *
 * A listener on rdma:// adds up to 66 MiB for the fragments of 1,024 connections, 16 MiB for
 * answers that are copied, and a quarter of max_inflight_bytes that buffers of a request leave
 * unused; buffers that nobody uses, as many as those, go back after 10 s. All of it is locked in
 * RAM.
 *
 * malloc keeps what was freed, in arenas of its own for every few threads, and each of them keeps
 * the most that it ever needed. So there are few, and what nobody has used for a while goes back.
 */
#ifndef KVS_HEAP_H
#define KVS_HEAP_H

#include <stdint.h>

/* Free memory that malloc may keep for good. */
#define KVS_HEAP_KEEP_BYTES ((uint64_t)24 << 20)

/* Sets malloc up for this process. Main thread, after kvt_init and before the others start. */
void kvs_heap_init(void);
/* To be called every 250 ms or so, by one thread: gives the system back what malloc has kept
   without need for a while. mapped_bytes: memory in RAM that is not malloc's. May take some
   milliseconds, seldom. */
void kvs_heap_tick(uint64_t mapped_bytes);
/* What malloc has free and in RAM now, or less; 0: not known. Any thread. */
uint64_t kvs_heap_free_bytes(uint64_t mapped_bytes);

#endif
