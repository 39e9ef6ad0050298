/*
 * lanes.h: one test program as several processes at once, each with a daemon of its own, since a
 * life of a daemon is mostly waiting: for starts, syncs and connections.
 *
 * Main thread. A lane is the same program, started again with KVASIR_LANE set; what it is to do
 * comes by its environment. It ends when the program that started it does.
 */
#ifndef KVASIR_TEST_LANES_H
#define KVASIR_TEST_LANES_H

#include <stdbool.h>
#include <stdint.h>

/* Whether this process is a lane; from then on it ends with the one that started it. number_p (may
 * be NULL): which, from 0. */
bool lanes_is_lane(uint32_t *number_p);
/*
 * Starts n_lanes lanes and waits for them: each is to do a share of `rounds`, told by the
 * environment variable rounds_name, and has a seed of its own, made from the one given. Gives how
 * many of them failed, and how many others ended with LANES_SKIPPED, since they lacked something.
 */
#define LANES_SKIPPED 77
uint32_t lanes_run(uint32_t n_lanes, const char *rounds_name, uint64_t rounds, uint64_t seed,
                   uint32_t *n_skipped_p);
/* What the environment variable says: how much is to be done. */
uint64_t lanes_rounds(const char *rounds_name, uint64_t otherwise);
/* Makes /dev/shm the place of temporary folders where it has free_bytes for them and nothing else
 * was asked for: for those whose files need no disk. */
void lanes_use_memory(uint64_t free_bytes);

#endif
