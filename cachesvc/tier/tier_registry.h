/*
 * tier_registry.h: what the registry and the tiers share. A new tier is one file that defines its
 * table, one declaration here and one line in the list of tier_registry.c.
 */
#ifndef KVSI_TIER_REGISTRY_H
#define KVSI_TIER_REGISTRY_H

#include "gpu_attend.h"
#include "tier.h"

extern const kvs_tier_ops kvsi_dram_ops;
extern const kvs_tier_ops kvsi_lmdb_ops;
extern const kvs_tier_ops kvsi_gpu_ops;
extern const kvs_gpu_attend_ops kvsi_gpu_attend_ops;

/*
 * Fills ops_p with the fault tier's table for one inner tier: the same caps and slots, each slot
 * going through the injector. name is borrowed for ever (static storage).
 */
void kvsi_fault_ops(const char *name, const kvs_tier_ops *inner, kvs_tier_ops *ops_p);

#endif
