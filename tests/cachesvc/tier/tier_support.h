/*
 * tier_support.h: what the tier tests share: values whose bytes follow from their key, and puts,
 * reads and releases that look the same on an addressable and on a blocking tier.
 *
 * Every rand-like choice comes from a seed, so a failure repeats. Functions assert by cmocka only
 * where said; threads must not use those.
 */
#ifndef TIER_SUPPORT_H
#define TIER_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tier.h"

typedef struct shape {
    uint32_t row_bytes, n_rows;
} shape;

typedef struct tier_under_test {
    const kvs_tier_ops *ops;
    kvs_tier *tier;
    kvs_tier_opts opts;
    char dir[64]; /* empty until first opened; removed by tut_fini */
    char fault[256];
} tier_under_test;

typedef struct put_result {
    kvs_slot slot;
    kvc_status status;
} put_result;

/* Sets names and defaults (32 MiB, short group commit); opens nothing. faults: rules or NULL. */
void tut_init(tier_under_test *t, const kvs_tier_ops *ops, const char *faults);
void tut_fini(tier_under_test *t); /* closes if open, removes the folder */
int tut_delete(void **state); /* cmocka's teardown: the same, and frees it; state may be NULL */
kvc_status tut_open(tier_under_test *t);
void tut_close(tier_under_test *t);

kvs_value_key key_of(uint64_t tenant, uint64_t block, uint32_t part);
/* Fills rows for this key and version (another version, other bytes). */
void fill_rows(const kvs_value_key *key, uint32_t version, shape s, void *rows);

/* Puts the value and waits until it is readable (or durable). Any thread. */
put_result put_value(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                     bool durable);
/* Reads rows first .. first + n - 1 and compares. OK, CORRUPT when bytes differ without an error
   having been given (never right), else the tier's status. Any thread. */
kvc_status check_rows(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                      kvs_slot slot, uint32_t first, uint32_t n, bool *equal_p);
/* Reads all rows; asserts OK and equal. Main thread only. */
void assert_value(tier_under_test *t, const kvs_value_key *key, uint32_t version, shape s,
                  kvs_slot slot);

/* What the tier takes from its medium: file sizes in its folder, or memfd lengths. */
uint64_t medium_bytes(tier_under_test *t);
uint64_t used_bytes(tier_under_test *t);
uint64_t value_count(tier_under_test *t);

/* What was logged since tut_log_clear, as text; tut_log_keep is the sink for it. */
extern char tut_log[1 << 16];
void tut_log_clear(void);
void tut_log_keep(void *arg, const char *line, size_t len_bytes);

uint64_t rng_next(uint64_t *state); /* splitmix64 */

#endif
