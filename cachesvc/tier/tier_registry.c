/*
 * tier_registry.c: the list of tiers and the check of their tables.
 *
 * Every tier appears twice: as itself and, wrapped by the fault injector, as "fault:<name>". The
 * tables are immutable once built (pthread_once), so any thread may use them. A table that lacks
 * a slot which its caps require is a bug of ours and asserts at first use.
 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/assert.h"
#include "base/log.h"
#include "tier_registry.h"

#define FAULT_PREFIX "fault:"
#define NAME_BYTES   24

static const kvs_tier_ops *const tiers[] = {
    &kvsi_dram_ops,
#ifdef KVS_WITH_LMDB
    &kvsi_lmdb_ops,
#endif
#ifdef KVS_WITH_GPU
    &kvsi_gpu_ops,
#endif
};
#define N_TIERS (sizeof(tiers) / sizeof(tiers[0]))

static kvs_tier_ops faulty[N_TIERS];
static char faulty_names[N_TIERS][NAME_BYTES];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void check_table(const kvs_tier_ops *ops)
{
    bool addressable = ops->caps & KVS_TIER_ADDRESSABLE;
    bool blocking = ops->caps & KVS_TIER_BLOCKING;
    bool persistent = ops->caps & KVS_TIER_PERSISTENT;

    KVC_ASSERT(ops->name != NULL && strlen(ops->name) + sizeof(FAULT_PREFIX) <= NAME_BYTES);
    KVC_ASSERT(ops->open && ops->close && ops->usage && ops->release);
    KVC_ASSERT(addressable != blocking);
    KVC_ASSERT(addressable == (ops->reserve && ops->commit && ops->map));
    KVC_ASSERT(addressable || !(ops->reserve || ops->commit || ops->map));
    KVC_ASSERT(addressable == (ops->segments && ops->close_segment));
    KVC_ASSERT(addressable || !(ops->segments || ops->close_segment));
    KVC_ASSERT(blocking == (ops->write && ops->read && ops->sync && ops->sync_releases));
    KVC_ASSERT(blocking || !(ops->write || ops->read || ops->sync || ops->sync_releases));
    KVC_ASSERT((ops->locate != NULL) == (ops->count_mapping != NULL));
    KVC_ASSERT(blocking || !(ops->locate || ops->device_rows));
    KVC_ASSERT(persistent == (ops->recover && ops->meta_put && ops->meta_get && ops->meta_each));
    KVC_ASSERT(persistent || !(ops->recover || ops->meta_put || ops->meta_get || ops->meta_each));
}

static void build_tables(void)
{
    for (size_t i = 0; i < N_TIERS; i++) {
        check_table(tiers[i]);
        snprintf(faulty_names[i], NAME_BYTES, FAULT_PREFIX "%s", tiers[i]->name);
        kvsi_fault_ops(faulty_names[i], tiers[i], &faulty[i]);
    }
}

#ifndef KVS_WITH_LMDB
int kvs_tier_check_main(const char *folder)
{
    KVC_LOG_ERROR(TIER, "check: %s: this build has no lmdb tier", folder);
    return 1;
}
#endif

const kvs_gpu_attend_ops *kvs_gpu_attend_find(void)
{
#ifdef KVS_WITH_GPU
    return &kvsi_gpu_attend_ops;
#else
    return NULL;
#endif
}

const kvs_tier_ops *kvs_tier_at(uint32_t i)
{
    pthread_once(&once, build_tables);
    if (i < N_TIERS)
        return tiers[i];
    return i < 2 * N_TIERS ? &faulty[i - N_TIERS] : NULL;
}

const kvs_tier_ops *kvs_tier_find(const char *name)
{
    const kvs_tier_ops *ops;

    if (name == NULL)
        return NULL;
    for (uint32_t i = 0; (ops = kvs_tier_at(i)) != NULL; i++) {
        if (strcmp(ops->name, name) == 0)
            return ops;
    }
    return NULL;
}
