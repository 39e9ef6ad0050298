/*
 * bench.h: a misbehaving store, a client of it, and whole runs of a rig over them, for the tests
 * of the worker with a store.
 */
#ifndef TESTS_WORKER_BENCH_H
#define TESTS_WORKER_BENCH_H

#include "rig.h"
#include "store.h"

typedef struct bench {
    store store;
    kvc_client *client;
} bench;

/* cmocka's setup and teardown: *state is a bench. */
int bench_open(void **state);
int bench_close(void **state);

kvw_stats stats_of(kvw_seq *seq);
/* Long enough that most blocks leave the worker; the slots hold one step's picks and no more. */
void store_rig(rig *r, const char *selector, kvw_index_kind index, kvc_client *client);
/* Tokens up to 660 prefilled (or reused, of n_known), up to 700 decoded; outputs into record. */
void run(rig *r, rig_record *record, uint32_t n_known, uint32_t *reused_p, kvw_stats *stats);
/* Of kvw_opts.way: one more rounding of o, and that of out itself at both ends. */
double near_bound(const rig *r);

#endif
