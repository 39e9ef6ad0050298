/*
 * status.c: kvctl status: what the server says of itself, as tables or JSON.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/text.h"
#include "kvctl.h"

#define NS_PER_MS 1000000ull

static const char help[] =
    "NAME\n"
    "    kvctl status - version, limits, tiers and counters of the server\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] status [--all]\n"
    "\n"
    "DESCRIPTION\n"
    "    Prints who the server is, how long it has been up, and for each tier its configured "
    "bytes,\n"
    "    what is used of them, how many values it holds and what was read from and written to it\n"
    "    since the start; then the counters that are not zero.\n"
    "\n"
    "OPTIONS\n"
    "    -a, --all\n"
    "        Print the limits, the registered schemas and what each is for, and the "
    "counters\n"
    "        that are zero too. --json always prints it, of schemas the\n"
    "        digests, and those of opaque ones once more by themselves.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   the server answered\n"
    "    1   it answered with an error\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl status\n"
    "    kvctl --server grpc+unix:///run/kvasir/cachesvc.sock status --all\n"
    "    kvctl --json status | jq .counters\n";

static void print_tiers(const kvc_server_stats *stats)
{
    char cap[KVC_TEXT_BYTES], used[KVC_TEXT_BYTES], in[KVC_TEXT_BYTES], out[KVC_TEXT_BYTES];
    (void)printf("\n%-6s %11s %11s %5s %10s %12s %11s %11s %10s\n", "TIER", "CAPACITY", "USED", "%",
                 "VALUES", "ROWS READ", "READ", "WRITTEN", "EVICTED");
    for (uint32_t i = 0; i < stats->n_tiers; i++) {
        const kvc_tier_stats *tier = &stats->tiers[i];
        double share = tier->capacity_bytes == 0
                           ? 0
                           : 100.0 * (double)tier->used_bytes / (double)tier->capacity_bytes;
        (void)printf(
            "%-6s %11s %11s %5.1f %10llu %12llu %11s %11s %10llu\n", tier->name,
            kvc_bytes_short(tier->capacity_bytes, cap), kvc_bytes_short(tier->used_bytes, used),
            share, (unsigned long long)tier->values, (unsigned long long)tier->rows_read,
            kvc_bytes_short(tier->bytes_read, in), kvc_bytes_short(tier->bytes_written, out),
            (unsigned long long)tier->evictions);
    }
}

static void print_bytes(const char *what, uint64_t bytes, const char *whose)
{
    char text[KVC_TEXT_BYTES];
    (void)printf("%s%s%s\n", what, kvc_bytes_text(bytes, text), whose);
}

static void print_limits(const kvc_limits *limits)
{
    char text[KVC_TEXT_BYTES];
    (void)printf("\nLIMITS\n");
    (void)printf("  one value              %s\n", kvc_bytes_text(limits->max_value_bytes, text));
    (void)printf("  payload of a message   %s\n", kvc_bytes_text(limits->max_message_bytes, text));
    (void)printf("  values in a put        %u\n", limits->max_batch_values);
    (void)printf("  digests in a message   %u\n", limits->max_digests);
    (void)printf("  blocks of a context    %u\n", limits->max_context_blocks);
    (void)printf("  picks in a fetch       %u\n", limits->max_picks);
    (void)printf("  groups in a fetch      %u\n", limits->max_groups);
    (void)printf("  queries of an attend   %u%s\n", limits->max_attend_queries,
                 limits->max_attend_queries == 0 ? " (it does not attend)" : "");
    (void)printf("  attends at once        %u\n", limits->max_attend_calls);
    (void)printf("  one opaque value       %s%s\n",
                 kvc_bytes_text((uint64_t)limits->max_pieces * limits->max_value_bytes, text),
                 limits->max_pieces == 0 ? " (it takes none)" : "");
    (void)printf("  open contexts          %u per tenant\n", limits->max_contexts);
    (void)printf("  blocks of them all     %llu\n", (unsigned long long)limits->max_open_blocks);
    (void)printf("  longest context TTL    %s\n",
                 kvc_duration_text(limits->max_ttl_ms * NS_PER_MS, text));
    (void)printf("  schemas                %u\n", limits->max_schemas);
    (void)printf("  holds                  %u per tenant\n", limits->max_holds);
    (void)printf("  saved contexts         %u per tenant\n", limits->max_saved);
    print_bytes("  of them                ", limits->max_saved_tenant_bytes, " per tenant");
    print_bytes("  kept by holds          ", limits->max_hold_bytes, " per tenant");
    print_bytes("  pinned by maps         ", limits->max_map_pin_bytes, " per tenant");
    print_bytes("  mapped segments        ", limits->max_mapped_bytes, " per tenant");
    (void)printf("  window of a put stream %u values, %s\n", limits->max_put_window_values,
                 kvc_bytes_text(limits->max_put_window_bytes, text));
    print_bytes("  requests in flight     ", limits->max_inflight_bytes, "");
    (void)printf("  calls at once          %u per address\n", limits->max_calls);
    (void)printf("  connections            %u\n", limits->max_connections);
}

/* Whether attends run on a GPU, and over what of dram. */
static void print_attend(const kvc_server_stats *stats)
{
    char text[KVC_TEXT_BYTES];
    uint64_t on = 0, pinned_bytes = 0;
    for (uint32_t i = 0; i < stats->n_counters; i++) {
        const kvc_named_count *counter = &stats->counters[i];
        on = strcmp(counter->name, "attend_gpu") == 0 ? counter->value : on;
        pinned_bytes =
            strcmp(counter->name, "attend_gpu_pinned_bytes") == 0 ? counter->value : pinned_bytes;
    }
    if (on != 0)
        (void)printf("\nlarge attends run on a GPU, which reads %s of dram in place\n",
                     kvc_bytes_short(pinned_bytes, text));
}

static void print_counters(const kvc_server_stats *stats, bool all)
{
    (void)printf("\nCOUNTERS\n");
    for (uint32_t i = 0; i < stats->n_counters; i++)
        if (all || stats->counters[i].value != 0)
            (void)printf("  %-28s %llu\n", stats->counters[i].name,
                         (unsigned long long)stats->counters[i].value);
}

/* What a schema is; one that was dropped meanwhile is only its digest. */
static void print_schema(const kvctl_globals *globals, kvc_client *client, const kvc_digest *digest)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    kvc_schema *schema;
    kvc_digest_hex(digest, hex);
    if (kvc_schema_get(client, digest, kvctl_deadline_ns(globals), &schema) != KVC_OK)
        (void)printf("  %s\n", hex);
    else if (schema->opaque)
        (void)printf("  %s  %s, opaque values\n", hex, schema->model);
    else
        (void)printf("  %s  %s, %u parts, blocks of %u tokens\n", hex, schema->model,
                     schema->n_parts, schema->block_tokens);
    free(schema);
}

static void print_text(const kvctl_globals *globals, kvc_client *client,
                       const kvc_server_stats *stats, bool all)
{
    char text[KVC_TEXT_BYTES];
    (void)printf("server   %s\n", globals->server);
    (void)printf("version  %s\n", stats->version);
    (void)printf("boot     %016llx\n", (unsigned long long)stats->boot_id);
    (void)printf("up       %s\n", kvc_duration_short(stats->uptime_ms * NS_PER_MS, text));
    (void)printf("schemas  %u\n", stats->n_schemas);
    for (uint32_t i = 0; all && i < stats->n_schemas; i++)
        print_schema(globals, client, &stats->schemas[i]);
    print_tiers(stats);
    if (all)
        print_limits(stats->limits);
    print_attend(stats);
    print_counters(stats, all);
}

static void print_json_tiers(const kvc_server_stats *stats)
{
    kvctl_json_open("tiers", '[');
    for (uint32_t i = 0; i < stats->n_tiers; i++) {
        const kvc_tier_stats *tier = &stats->tiers[i];
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", tier->name);
        kvctl_json_number("capacity_bytes", tier->capacity_bytes);
        kvctl_json_number("used_bytes", tier->used_bytes);
        kvctl_json_number("values", tier->values);
        kvctl_json_number("rows_read", tier->rows_read);
        kvctl_json_number("bytes_read", tier->bytes_read);
        kvctl_json_number("bytes_written", tier->bytes_written);
        kvctl_json_number("evictions", tier->evictions);
        kvctl_json_close();
    }
    kvctl_json_close();
}

static void print_json_limits(const kvc_limits *limits)
{
    kvctl_json_open("limits", '{');
#define X(name) kvctl_json_number(#name, limits->name);
#include "wire/limits.def"
#undef X
    kvctl_json_close();
}

static void print_json(const kvctl_globals *globals, const kvc_server_stats *stats)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    kvctl_json_open(NULL, '{');
    kvctl_json_text("server", globals->server);
    kvctl_json_text("version", stats->version);
    (void)snprintf(hex, sizeof(hex), "%016llx", (unsigned long long)stats->boot_id);
    kvctl_json_text("boot_id", hex); /* more bits than a JSON number keeps */
    kvctl_json_number("uptime_ms", stats->uptime_ms);
    print_json_limits(stats->limits);
    print_json_tiers(stats);
    kvctl_json_open("schemas", '[');
    for (uint32_t i = 0; i < stats->n_schemas; i++) {
        kvc_digest_hex(&stats->schemas[i], hex);
        kvctl_json_text(NULL, hex);
    }
    kvctl_json_close();
    kvctl_json_open("opaque_schemas", '[');
    for (uint32_t i = 0; stats->opaque != NULL && i < stats->n_schemas; i++) {
        kvc_digest_hex(&stats->schemas[i], hex);
        if (stats->opaque[i])
            kvctl_json_text(NULL, hex);
    }
    kvctl_json_close();
    kvctl_json_open("counters", '{');
    for (uint32_t i = 0; i < stats->n_counters; i++)
        kvctl_json_number(stats->counters[i].name, stats->counters[i].value);
    kvctl_json_close();
    kvctl_json_close();
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {{"all", no_argument, NULL, 'a'}, {0}};
    bool all = false;
    int option;
    while ((option = getopt_long(argc, argv, "a", options, NULL)) != -1) {
        if (option != 'a')
            return kvctl_usage("status", "see the message above");
        all = true;
    }
    if (optind < argc)
        return kvctl_usage("status", "status takes no argument '%s'", argv[optind]);
    kvc_client *client = NULL;
    kvctl_exit reached = kvctl_connect(globals, &client);
    if (reached != KVCTL_OK)
        return reached;
    kvc_server_stats *stats = NULL;
    kvc_status status = kvc_stats(client, kvctl_deadline_ns(globals), &stats);
    kvctl_exit result = KVCTL_OK;
    if (status != KVC_OK)
        result = kvctl_failed(status);
    else if (globals->json)
        print_json(globals, stats);
    else
        print_text(globals, client, stats, all);
    kvc_stats_free(stats);
    kvc_client_close(client);
    return result;
}

const kvctl_command kvctl_status = {
    .name = "status",
    .brief = "version, limits, tiers and counters of the server",
    .help = help,
    .run = run,
};
