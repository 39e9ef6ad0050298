/*
 * lmdb_cases.h: what lmdb_bench times: writes (lmdb_writes.c) and reads of rows (lmdb_rows.c), each
 * by the bare disk, by LMDB alone and by the tier. All exit with a message where something fails.
 */
#ifndef KVASIR_BENCH_LMDB_CASES_H
#define KVASIR_BENCH_LMDB_CASES_H

#include <lmdb.h>

#include "tier.h"

#define ROW_BYTES   4096u
#define N_ROWS      256u
#define VALUE_BYTES (ROW_BYTES * N_ROWS)
#define PREFIX      4080u

typedef struct lmdb_case_setup {
    char dir[256];
    uint32_t n_values, runs;
    bool no_writes, no_rows;
    uint64_t read_ns; /* how long each read case runs */
    uint8_t *rows;    /* one value */
    uint32_t sums[N_ROWS];
} lmdb_case_setup;

extern lmdb_case_setup lmdb_case;

void case_path(char out[320], const char *name);
/* All values have the same bytes; only their keys differ. */
kvs_value_key case_key(uint32_t i);
void case_check(int rc, const char *what);
MDB_env *case_lmdb(const char *name, unsigned flags, MDB_dbi *dbi_p);
kvs_tier *case_tier(const kvs_tier_ops *ops);

/* GB/s. */
double case_write_plain(void);
/* LMDB with its own full sync, per_txn values a transaction; what it writes is left as "bare". */
double case_write_lmdb(uint32_t per_txn);
double case_write_tier(const kvs_tier_ops *ops, bool durable);

/* Rows a second, of what the writes left. rows: of each value that is read. */
double case_disk_rows(uint32_t threads);
double case_lmdb_rows(bool cold, uint32_t threads, uint32_t rows);
double case_tier_rows(const kvs_tier_ops *ops, bool cold, uint32_t threads, uint32_t rows);

#endif
