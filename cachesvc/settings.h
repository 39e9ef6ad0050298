/*
 * settings.h: what an operator may choose. One table in settings.c makes the YAML file, the
 * environment, the flags and --help.
 */
#ifndef KVS_SETTINGS_H
#define KVS_SETTINGS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/config.h"

#define KVS_MAX_LISTENERS 16u

typedef struct kvs_settings {
    const char *listen;       /* URIs, separated by commas */
    const char *admin_listen; /* HOST:PORT; "": none */
    uint64_t dram_bytes, lmdb_bytes;
    uint64_t gpu_bytes, gpu_device; /* gpu_bytes 0: none */
    const char *lmdb_path;
    uint64_t max_value_bytes, max_inflight_bytes, max_calls, max_connections;
    uint64_t context_ttl_ns, max_contexts, max_open_blocks;
    uint64_t max_hold_bytes;    /* 0: half of dram_bytes */
    uint64_t max_map_pin_bytes; /* 0: half of dram_bytes */
    uint64_t max_mapped_bytes;  /* 0: three quarters of dram_bytes */
    uint64_t shm_ring_bytes;
    const char *shm_tenants; /* as tenants.h says */
    /* Numbers, separated by commas. */
    const char *shm_map_uids, *shm_map_gids, *shm_map_gpu_uids;
    uint64_t max_saved, max_saved_bytes; /* contexts saved by name */
    uint64_t max_saved_tenant_bytes;     /* 0: half of max_saved_bytes */
    uint64_t schema_grace_ns;
    uint64_t transport_threads, disk_threads;
    uint64_t attend_threads, attend_queue;
    uint64_t attend_gpu_bytes;                    /* 0: no GPU attends */
    uint64_t handshake_ns, keepalive_ns, idle_ns; /* of connections */
    uint64_t group_commit_ns, group_commit_bytes;
    uint64_t row_sums_bytes;
    uint64_t promote_percent;         /* of a value's rows read from lmdb in a minute; 0: never */
    uint32_t lmdb_admission;          /* kvs_admission_policy */
    uint64_t lmdb_write_budget_bytes; /* a day; 0: no limit */
    uint64_t lmdb_reader_ns;
    uint32_t log_level, log_format;
    uint64_t drain_ns;
    const char *ready_file; /* "": none */
    bool print_config;
    /* Not an operator's: specs of the fault tier around a tier, for tests; NULL: none. */
    const char *dram_fault, *lmdb_fault, *gpu_fault;
    /* The program that checks lmdb's files after an unclean stop: main's own. NULL: none. */
    const char *lmdb_checker;
} kvs_settings;

extern const kvc_config_program kvs_program;

/* Fills settings with the table's defaults, for tests and embedders. INVALID: a bug in the table.
 */
kvc_status kvs_settings_defaults(kvs_settings *settings, kvc_config **config_p) KVC_MUST_CHECK;
/* What the table cannot say: one setting against another. why gets a line. */
kvc_status kvs_settings_check(const kvs_settings *settings,
                              char why[KVC_CONFIG_WHY_BYTES]) KVC_MUST_CHECK;
/* Of shm_map_uids and its like. */
bool kvs_ids_are_numbers(const char *list);
bool kvs_ids_have(const char *list, uint32_t id);
/* The settings in force, with their sources, as YAML; gives malloc'd text. NULL: no memory. */
char *kvs_settings_text(const kvc_config *config);

#endif
