/*
 * settings.c: the table of settings, which is also the manual page.
 *
 * Main thread, before the others start.
 */
#include "settings.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "admin.h"
#include "base/text.h"
#include "kvc/types.h"
#include "tenants.h"

#define KIB         (UINT64_C(1) << 10)
#define MIB         (UINT64_C(1) << 20)
#define TIB         (UINT64_C(1) << 40)
#define MS          UINT64_C(1000000)
#define SECOND      (1000 * MS)
#define HOUR        (3600 * SECOND)
#define FIELD(f)    offsetof(kvs_settings, f)
#define COUNT_OF(a) (sizeof(a) / sizeof((a)[0]))

static const kvc_setting table[] = {
    {"listen", KVC_CONFIG_STRING, FIELD(listen), "grpc://127.0.0.1:7811", 1, 4096, NULL,
     "The addresses to listen on, separated by commas: grpc://HOST:PORT, grpc+unix:///PATH, "
     "shm:///PATH for clients on this host, rdma://ADDRESS:PORT where it was built with RDMA (not "
     "encrypted, and whoever connects is the tenant default: for networks that say who may). Port "
     "0 lets the system choose; the line \"listening on\" says which."},
    {"admin_listen", KVC_CONFIG_STRING, FIELD(admin_listen), "", 0, 255, NULL,
     "Where /metrics (Prometheus), /healthz and /readyz are answered over HTTP: HOST:PORT with a "
     "numeric address, such as 127.0.0.1:7812. It asks nobody who they are and shows all tenants "
     "together: keep it to this machine or to the operators' network. Empty: nowhere."},
    {"dram_bytes", KVC_CONFIG_BYTES, FIELD(dram_bytes), "1GiB", 64 * KIB, 64 * TIB, NULL,
     "Host memory for values, never exceeded. When it is full, values that are safe in lmdb or may "
     "be dropped give way."},
    {"gpu_bytes", KVC_CONFIG_BYTES, FIELD(gpu_bytes), "0", 0, 64 * TIB, NULL,
     "Spare memory of a GPU for copies of values that are read often, never exceeded. dram or lmdb "
     "have all of them too, so nothing is lost with the GPU. Workers of this host read them there "
     "(shm://, CUDA IPC). 0, or where there is no such GPU: no gpu tier."},
    {"gpu_device", KVC_CONFIG_UINT, FIELD(gpu_device), "0", 0, 255, NULL,
     "The number of that GPU, as CUDA counts those that the process may see."},
    {"lmdb_path", KVC_CONFIG_STRING, FIELD(lmdb_path), "", 0, 3000, NULL,
     "The folder of the lmdb tier, created if it is missing. Empty: no lmdb tier, so DURABLE puts "
     "are refused and nothing survives a restart."},
    {"lmdb_bytes", KVC_CONFIG_BYTES, FIELD(lmdb_bytes), "10GiB", 0, 1024 * TIB, NULL,
     "Disk space for the lmdb tier, never exceeded. 0: no lmdb tier."},
    {"lmdb_admission", KVC_CONFIG_ENUM, FIELD(lmdb_admission), "all", 0, 0,
     "all|second-use|durable-only",
     "Which values of MEMORY puts reach lmdb, after they were answered: all; those that are read "
     "again, second-use; or none, durable-only. What does not is lost once dram evicts it."},
    {"lmdb_write_budget_bytes", KVC_CONFIG_BYTES, FIELD(lmdb_write_budget_bytes), "0", 0,
     1024 * TIB, NULL,
     "Bytes of values that may be written to lmdb in a day, to spare the disk. DURABLE puts count "
     "and are always written; MEMORY values stay in dram only once it is spent. The day begins "
     "with its first write and goes on over restarts; a crash costs up to a 64th of it, each "
     "further one of the day half as much. 0: no limit."},
    {"lmdb_reader", KVC_CONFIG_DURATION, FIELD(lmdb_reader_ns), "100ms", 1 * MS, 10 * SECOND, NULL,
     "The longest that a read of lmdb keeps freed space from being used again, while it waits for "
     "the disk."},
    {"group_commit", KVC_CONFIG_DURATION, FIELD(group_commit_ns), "20ms", 0, 10 * SECOND, NULL,
     "How long the lmdb writer gathers values for one commit. Longer is faster in bulk; a DURABLE "
     "put waits for it."},
    {"group_commit_bytes", KVC_CONFIG_BYTES, FIELD(group_commit_bytes), "32MiB", 1 * MIB,
     1024 * MIB, NULL, "A commit starts early once this much was gathered."},
    {"row_sums_bytes", KVC_CONFIG_BYTES, FIELD(row_sums_bytes), "64MiB", 0, 1 * TIB, NULL,
     "Memory for the row sums of lmdb values that are read often."},
    {"promote_percent", KVC_CONFIG_UINT, FIELD(promote_percent), "25", 0, 100, NULL,
     "A value is loaded from lmdb to dram once this share of its rows was read within a minute. 0: "
     "never."},
    {"max_value_bytes", KVC_CONFIG_BYTES, FIELD(max_value_bytes), "1MiB", 4 * KIB,
     KVC_MAX_VALUE_BYTES, NULL,
     "The largest value; RegisterSchema refuses parts whose blocks are larger."},
    {"max_inflight_bytes", KVC_CONFIG_BYTES, FIELD(max_inflight_bytes), "64MiB", 2 * MIB, 1 * TIB,
     NULL,
     "Request payloads held at once by all listeners; beyond it calls are answered AGAIN. Reply "
     "buffers have a cap of the same size."},
    {"max_calls", KVC_CONFIG_UINT, FIELD(max_calls), "1024", 1, 65536, NULL,
     "Calls in flight at once on one listener; beyond it they are answered AGAIN."},
    {"max_connections", KVC_CONFIG_UINT, FIELD(max_connections), "1000", 1, 65536, NULL,
     "Connections of all listeners together; one that comes beyond is closed at once, and its "
     "client "
     "tries again later. Over gRPC each takes some 30 KiB of memory, and every one a descriptor, "
     "or "
     "two where shm is served: where the hard limit on open files leaves fewer, so does this."},
    {"context_ttl", KVC_CONFIG_DURATION, FIELD(context_ttl_ns), "10m", 10 * MS, 240 * HOUR, NULL,
     "How long an open context lives after its last use, where the client does not say."},
    {"schema_grace", KVC_CONFIG_DURATION, FIELD(schema_grace_ns), "1h", 0, 240 * HOUR, NULL,
     "A schema without values and contexts is dropped once nobody asked for it for so long. 0: "
     "never."},
    {"max_contexts", KVC_CONFIG_UINT, FIELD(max_contexts), "4096", 1, 1000000, NULL,
     "Contexts that one tenant may have open."},
    {"max_open_blocks", KVC_CONFIG_UINT, FIELD(max_open_blocks), "4194304", 1, 1000000000, NULL,
     "Blocks in all open contexts together. Each takes 4 bytes, and some 70 more where no value of "
     "the block is here."},
    {"max_hold_bytes", KVC_CONFIG_BYTES, FIELD(max_hold_bytes), "0", 0, 64 * TIB, NULL,
     "Bytes of values that one tenant's holds may keep from eviction; beyond it Hold is refused, "
     "and "
     "where values that only dram has would keep more of its segments than so many bytes fill, and "
     "three. 0: half of dram_bytes. All tenants together may hold nine tenths of dram_bytes."},
    {"max_map_pin_bytes", KVC_CONFIG_BYTES, FIELD(max_map_pin_bytes), "0", 0, 64 * TIB, NULL,
     "Bytes of values that the maps of one tenant's clients (shm://) may keep where they are in "
     "dram; what is beyond it they fetch by request. 0: half of dram_bytes. All tenants together "
     "may pin nine tenths of dram_bytes."},
    {"max_mapped_bytes", KVC_CONFIG_BYTES, FIELD(max_mapped_bytes), "0", 0, 64 * TIB, NULL,
     "Bytes of dram's segments (64 MiB each, less where dram is small) that one tenant's clients "
     "may have mapped, pinned or not: no other tenant can use them. 0: three quarters of "
     "dram_bytes. All tenants together may have nine tenths of dram_bytes."},
    {"shm_ring_bytes", KVC_CONFIG_BYTES, FIELD(shm_ring_bytes), "2MiB", 64 * KIB, 1024 * MIB, NULL,
     "Shared memory through which payloads of one shm:// connection travel, in each direction. All "
     "of it together stays within a quarter of max_inflight_bytes; connections beyond that "
     "have none."},
    {"shm_tenants", KVC_CONFIG_STRING, FIELD(shm_tenants), "", 0, 4096, NULL,
     "Which tenant a client on this host (shm://) is, by its user or group id: UID:TENANT and "
     "@GID:TENANT, separated by commas, as in \"1001:alice,1002:bob,@100:team\". Who has no entry, "
     "neither its user nor its group, is the tenant \"default\". The group is the one that the "
     "process runs with: further ones of its user do not count."},
    {"shm_map_uids", KVC_CONFIG_STRING, FIELD(shm_map_uids), "", 0, 4096, NULL,
     "User ids, separated by commas, whose processes may map dram over shm://, besides the "
     "server's own user. Others read by request."},
    {"shm_map_gids", KVC_CONFIG_STRING, FIELD(shm_map_gids), "", 0, 4096, NULL,
     "Group ids whose processes may, in the same way."},
    {"shm_map_gpu_uids", KVC_CONFIG_STRING, FIELD(shm_map_gpu_uids), "", 0, 4096, NULL,
     "User ids, separated by commas, of those who may map whose processes are given places in the "
     "GPU (gpu_bytes) too, besides the server's own user. Whoever opens memory of a GPU can write "
     "there as well: name only whom you trust with what all workers of its tenant read. Others "
     "map dram."},
    {"max_saved", KVC_CONFIG_UINT, FIELD(max_saved), "1024", 1, 65536, NULL,
     "Contexts that one tenant may have saved by name, those being saved included."},
    {"max_saved_bytes", KVC_CONFIG_BYTES, FIELD(max_saved_bytes), "1GiB", 1 * MIB, 1 * TIB, NULL,
     "Bytes of all the contexts saved by name: their digests, token ids and rows of tails. They "
     "are "
     "part of lmdb_bytes. Without lmdb they are kept in memory, 64 MiB of them at most."},
    {"max_saved_tenant_bytes", KVC_CONFIG_BYTES, FIELD(max_saved_tenant_bytes), "0", 0, 1 * TIB,
     NULL,
     "What one tenant may have of max_saved_bytes, so that its contexts leave room for the "
     "others'. "
     "0: half of it."},
    {"transport_threads", KVC_CONFIG_UINT, FIELD(transport_threads), "0", 0, 64, NULL,
     "Threads for each listener. 0: as many as there are cores, 4 at most."},
    {"disk_threads", KVC_CONFIG_UINT, FIELD(disk_threads), "8", 1, 256, NULL,
     "Threads that wait for lmdb reads."},
    {"attend_threads", KVC_CONFIG_UINT, FIELD(attend_threads), "0", 0, 256, NULL,
     "Threads that attend over rows for AttendRows, each on one call. 0: half as many as there are "
     "cores, at least one."},
    {"attend_queue", KVC_CONFIG_UINT, FIELD(attend_queue), "64", 0, 2048, NULL,
     "Calls of AttendRows that may wait for such a thread; beyond it they are answered AGAIN and "
     "the rows are to be fetched. 0: AttendRows is not served."},
    {"attend_gpu_bytes", KVC_CONFIG_BYTES, FIELD(attend_gpu_bytes), "0", 0, 64 * TIB, NULL,
     "Large AttendRows are computed on the GPU gpu_device: over rows of the gpu tier, and over as "
     "many bytes of dram, whose segments (64 MiB each, less where dram is small) are pinned for "
     "the GPU as they are attended over. Less than a segment: of the gpu tier alone. Takes some "
     "170 MiB of that GPU's memory besides gpu_bytes. 0, or where there is no such GPU: the CPU "
     "attends."},
    {"handshake", KVC_CONFIG_DURATION, FIELD(handshake_ns), "10s", 100 * MS, 1 * HOUR, NULL,
     "A connection that has not begun to speak HTTP/2 by then is closed."},
    {"keepalive", KVC_CONFIG_DURATION, FIELD(keepalive_ns), "30s", 1 * SECOND, 24 * HOUR, NULL,
     "A connection that is silent for so long is asked whether its peer lives; without an answer "
     "within 10 s it is closed, and its calls are cancelled."},
    {"idle", KVC_CONFIG_DURATION, FIELD(idle_ns), "30m", 100 * MS, 240 * HOUR, NULL,
     "A connection without calls for so long is closed; clients connect again by themselves."},
    {"drain", KVC_CONFIG_DURATION, FIELD(drain_ns), "10s", 0, 1 * HOUR, NULL,
     "On SIGTERM or SIGINT: how long calls in flight may take to finish before they are "
     "cancelled."},
    {"log_level", KVC_CONFIG_ENUM, FIELD(log_level), "info", 0, 0,
     "off|error|warn|info|debug|trace", "The least important lines to log, on standard error."},
    {"log_format", KVC_CONFIG_ENUM, FIELD(log_format), "text", 0, 0, "text|json",
     "How log lines look."},
    {"ready_file", KVC_CONFIG_STRING, FIELD(ready_file), "", 0, 4000, NULL,
     "Once serving, the bound URIs are written to this file, one a line; it appears whole. Removed "
     "on a clean stop."},
    {"print_config", KVC_CONFIG_BOOL, FIELD(print_config), "no", 0, 0, NULL,
     "Print the settings in force as YAML that --config takes, with where each came from, and "
     "exit."},
};

const kvc_config_program kvs_program = {
    .name = "cachesvc",
    .version = KVASIR_VERSION,
    .brief = "tiered store for the keys and values of LLM contexts",
    .synopsis = "[--config FILE] [OPTION]...",
    .description =
        "Serves the rows of long contexts to inference workers from host memory and from LMDB on "
        "disk, over gRPC. Runs in the foreground, logs to standard error, and prints a line "
        "\"listening on URI\" to standard output for each address once it serves.\n"
        "SIGTERM or SIGINT stops it: new calls are refused, those in flight finish within the "
        "drain time, values in memory are written to lmdb. A second signal stops it at once.",
    .files = "deploy/cachesvc.yaml is a commented example of a configuration file.",
    .exit_status = " 0  clean stop, or --help, --version, --print-config\n"
                   " 1  could not start: an address in use, a broken store\n"
                   " 2  a bad setting; the message names it\n"
                   " 3  stopped at once by a second signal",
    .examples = " cachesvc --dram-bytes 2GiB\n"
                " cachesvc --config /etc/kvasir/cachesvc.yaml --log-level debug\n"
                " KVASIR_LMDB_PATH=/var/lib/kvasir cachesvc --lmdb-bytes 200GiB",
    .settings = table,
    .n_settings = COUNT_OF(table),
};

kvc_status kvs_settings_defaults(kvs_settings *settings, kvc_config **config_p)
{
    static char name[] = "cachesvc";
    char *argv[] = {name, NULL};
    char why[KVC_CONFIG_WHY_BYTES];
    memset(settings, 0, sizeof(*settings));
    return kvc_config_load(&kvs_program, 1, argv, NULL, settings, config_p, why);
}

bool kvs_ids_are_numbers(const char *list)
{
    return list[strspn(list, "0123456789, ")] == '\0';
}

bool kvs_ids_have(const char *list, uint32_t id)
{
    bool found = false;
    while (*list && !found) {
        char *end;
        unsigned long long one = strtoull(list, &end, 10);
        found = end != list && one == id;
        list = end + strcspn(end, "0123456789");
    }
    return found;
}

kvc_status kvs_settings_check(const kvs_settings *settings, char why[KVC_CONFIG_WHY_BYTES])
{
    if (settings->max_value_bytes > settings->dram_bytes) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "max_value_bytes is larger than dram_bytes: no such value would fit");
        return KVC_INVALID;
    }
    if (settings->max_hold_bytes > settings->dram_bytes / 10 * 9) {
        snprintf(why, KVC_CONFIG_WHY_BYTES, "max_hold_bytes is above nine tenths of dram_bytes");
        return KVC_INVALID;
    }
    if (settings->max_map_pin_bytes > settings->dram_bytes / 10 * 9) {
        snprintf(why, KVC_CONFIG_WHY_BYTES, "max_map_pin_bytes is above nine tenths of dram_bytes");
        return KVC_INVALID;
    }
    if (!kvs_ids_are_numbers(settings->shm_map_uids) ||
        !kvs_ids_are_numbers(settings->shm_map_gids) ||
        !kvs_ids_are_numbers(settings->shm_map_gpu_uids)) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "shm_map_uids, shm_map_gids and shm_map_gpu_uids take numbers, separated by "
                 "commas");
        return KVC_INVALID;
    }
    if (!kvs_tenants_check(settings->shm_tenants)) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "shm_tenants takes UID:TENANT and @GID:TENANT, separated by commas, no id twice");
        return KVC_INVALID;
    }
    if (settings->lmdb_path[0] && settings->lmdb_bytes && settings->lmdb_bytes < 16 * MIB) {
        snprintf(why, KVC_CONFIG_WHY_BYTES,
                 "lmdb_bytes must be 0 (no lmdb tier) or at least 16MiB");
        return KVC_INVALID;
    }
    return settings->admin_listen[0] ? kvs_admin_check(settings->admin_listen, why) : KVC_OK;
}

/* As YAML's double quotes want it. */
static void put_quoted(kvc_strbuf *text, const char *value)
{
    kvc_strbuf_put(text, "\"", 1);
    for (; *value; value++) {
        unsigned char c = (unsigned char)*value;
        if (c < ' ' || c == 0x7f)
            kvc_strbuf_putf(text, "\\x%02x", c);
        else
            kvc_strbuf_putf(text, "%s%c", c == '"' || c == '\\' ? "\\" : "", c);
    }
    kvc_strbuf_put(text, "\"", 1);
}

/* In a comment, which ends with its line. */
static void put_source(kvc_strbuf *text, const char *source)
{
    kvc_strbuf_put(text, " # ", 3);
    for (; *source; source++)
        kvc_strbuf_put(text, (unsigned char)*source < ' ' ? "?" : source, 1);
    kvc_strbuf_put(text, "\n", 1);
}

char *kvs_settings_text(const kvc_config *config)
{
    kvc_strbuf text = {0};
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        char *value = kvc_config_value_text(config, table[i].name);
        if (!value)
            text.failed = true;
        if (!value || table[i].offset == FIELD(print_config)) {
            free(value); /* fed back, it would print again and serve nobody */
            continue;
        }
        kvc_strbuf_putf(&text, "%s: ", table[i].name);
        if (table[i].type == KVC_CONFIG_STRING)
            put_quoted(&text, value);
        else
            kvc_strbuf_putf(&text, "%s", value);
        put_source(&text, kvc_config_source(config, table[i].name));
        free(value);
    }
    return kvc_strbuf_take(&text);
}
