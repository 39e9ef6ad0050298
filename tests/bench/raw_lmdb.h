/*
 * raw_lmdb.h: what the bare library writes durably: values of 1 MiB in a fresh database, one full
 * sync for each transaction.
 */
#ifndef KVASIR_BENCH_RAW_LMDB_H
#define KVASIR_BENCH_RAW_LMDB_H

#include <stdint.h>

#define RAW_LMDB_GROUP 32u /* values for each transaction, as many as cachesvc groups */

/* Writes n values from src, which has n MiB, into a new database under folder and removes it.
   0 on success. */
int raw_lmdb_put(const char *folder, const uint8_t *src, uint32_t n);

#endif
