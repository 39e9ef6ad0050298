/*
 * top.c: kvctl top: what the server does, per second, again and again.
 *
 * Main thread. Each table is the difference of two samples of its counters; a restart between them
 * begins anew.
 */
#include <getopt.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/text.h"
#include "kvctl.h"

#define NS_PER_S 1000000000ull

static const char help[] =
    "NAME\n"
    "    kvctl top - what the server does, per second\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] top [--interval DURATION] [--count N] [--once]\n"
    "\n"
    "DESCRIPTION\n"
    "    Prints requests, puts and rows per second since the last table, and how full the tiers\n"
    "    are. On a terminal each table takes the place of the one before. Ends by a signal, after\n"
    "    --count tables, or when the server does not answer within --timeout.\n"
    "\n"
    "OPTIONS\n"
    "    -i, --interval DURATION\n"
    "        Time between tables, from 100ms. Default: 1s.\n"
    "    -n, --count N\n"
    "        End after N tables. Default: never.\n"
    "    -1, --once\n"
    "        The same as --count 1, for scripts.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   it worked\n"
    "    1   the server answered with an error\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl top\n"
    "    kvctl --json top --once --interval 10s | jq .rates.rows_dram\n";

typedef struct top_args {
    uint64_t interval_ns, count; /* count 0: for ever */
} top_args;

/* Counters that are shown, by the names of Stats. */
static const struct rate {
    const char *counter, *label;
    bool is_bytes;
} rates[] = {
    {"requests", "requests", false},
    {"requests_refused", "refused (AGAIN)", false},
    {"requests_failed", "failed", false},
    {"put_values", "values put", false},
    {"put_bytes", "bytes put", true},
    {"rows_dram", "rows from dram", false},
    {"rows_lmdb", "rows from lmdb", false},
    {"rows_missing", "rows missing", false},
    {"row_bytes_sent", "bytes of rows", true},
    {"match_hits", "digests hit", false},
    {"promoted_values", "values promoted", false},
    {"written_behind_values", "written behind", false},
    {"evicted_values", "values evicted", false},
};

#define N_RATES (sizeof(rates) / sizeof(rates[0]))

static uint64_t counter(const kvc_server_stats *stats, const char *name)
{
    for (uint32_t i = 0; stats != NULL && i < stats->n_counters; i++)
        if (strcmp(stats->counters[i].name, name) == 0)
            return stats->counters[i].value;
    return 0;
}

/* Per second, rounded. A server that started in between is counted from its start. */
static uint64_t per_second(const kvc_server_stats *old, const kvc_server_stats *now,
                           const char *name, uint64_t elapsed_ns)
{
    uint64_t before = old->boot_id == now->boot_id ? counter(old, name) : 0;
    uint64_t after = counter(now, name);
    uint64_t more = after > before ? after - before : 0;
    return elapsed_ns > 0 ? (uint64_t)((double)more * (double)NS_PER_S / (double)elapsed_ns + 0.5)
                          : 0;
}

static void print_json(const kvc_server_stats *old, const kvc_server_stats *now,
                       uint64_t elapsed_ns)
{
    kvctl_json_open(NULL, '{');
    kvctl_json_number("interval_ms", elapsed_ns / 1000000);
    kvctl_json_number("uptime_ms", now->uptime_ms);
    kvctl_json_open("rates", '{');
    for (size_t i = 0; i < N_RATES; i++)
        kvctl_json_number(rates[i].counter, per_second(old, now, rates[i].counter, elapsed_ns));
    kvctl_json_close();
    kvctl_json_open("tiers", '[');
    for (uint32_t i = 0; i < now->n_tiers; i++) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", now->tiers[i].name);
        kvctl_json_number("capacity_bytes", now->tiers[i].capacity_bytes);
        kvctl_json_number("used_bytes", now->tiers[i].used_bytes);
        kvctl_json_number("values", now->tiers[i].values);
        kvctl_json_close();
    }
    kvctl_json_close();
    kvctl_json_close();
}

static void print_text(const kvctl_globals *globals, const kvc_server_stats *old,
                       const kvc_server_stats *now, uint64_t elapsed_ns)
{
    char text[KVC_TEXT_BYTES], cap[KVC_TEXT_BYTES];
    if (isatty(STDOUT_FILENO))
        (void)fputs("\033[H\033[2J", stdout);
    (void)printf("%s  up %s%s\n", globals->server,
                 kvc_duration_short(now->uptime_ms * 1000000, text),
                 old->boot_id != now->boot_id ? "  (restarted)" : "");
    (void)printf("in flight %llu, contexts %llu, holds %llu\n\n",
                 (unsigned long long)counter(now, "requests_in_flight"),
                 (unsigned long long)counter(now, "contexts_open"),
                 (unsigned long long)counter(now, "holds"));
    (void)printf("%-18s %12s\n", "PER SECOND", "");
    for (size_t i = 0; i < N_RATES; i++) {
        uint64_t rate = per_second(old, now, rates[i].counter, elapsed_ns);
        if (rates[i].is_bytes)
            (void)printf("%-18s %12s\n", rates[i].label, kvc_bytes_short(rate, text));
        else
            (void)printf("%-18s %12llu\n", rates[i].label, (unsigned long long)rate);
    }
    (void)printf("\n%-6s %11s %11s %10s\n", "TIER", "USED", "CAPACITY", "VALUES");
    for (uint32_t i = 0; i < now->n_tiers; i++)
        (void)printf("%-6s %11s %11s %10llu\n", now->tiers[i].name,
                     kvc_bytes_short(now->tiers[i].used_bytes, text),
                     kvc_bytes_short(now->tiers[i].capacity_bytes, cap),
                     (unsigned long long)now->tiers[i].values);
}

static void pause_for(uint64_t ns)
{
    struct timespec left = {.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
    while (nanosleep(&left, &left) != 0)
        ;
}

static kvctl_exit watch(const kvctl_globals *globals, const top_args *args, kvc_client *client)
{
    kvc_server_stats *old = NULL, *now = NULL;
    uint64_t old_ns = kvc_now_ns();
    kvc_status status = kvc_stats(client, kvctl_deadline_ns(globals), &old);
    for (uint64_t n = 0; status == KVC_OK && (args->count == 0 || n < args->count); n++) {
        pause_for(args->interval_ns);
        uint64_t now_ns = kvc_now_ns();
        status = kvc_stats(client, kvctl_deadline_ns(globals), &now);
        if (status != KVC_OK)
            break;
        if (globals->json)
            print_json(old, now, now_ns - old_ns);
        else
            print_text(globals, old, now, now_ns - old_ns);
        (void)fflush(stdout);
        kvc_stats_free(old);
        old = now;
        old_ns = now_ns;
    }
    kvc_stats_free(old);
    return status == KVC_OK ? KVCTL_OK : kvctl_failed(status);
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"interval", required_argument, NULL, 'i'},
        {"count", required_argument, NULL, 'n'},
        {"once", no_argument, NULL, '1'},
        {0},
    };
    top_args args = {.interval_ns = NS_PER_S};
    kvc_client *client = NULL;
    int option;
    while ((option = getopt_long(argc, argv, "i:n:1", options, NULL)) != -1) {
        if (option == '1')
            args.count = 1;
        else if (option == 'n' && kvctl_number_parse("--count", optarg, 1, UINT32_MAX, &args.count))
            continue;
        else if (option == 'i' && kvc_duration_parse(optarg, &args.interval_ns) == KVC_OK &&
                 args.interval_ns >= NS_PER_S / 10)
            continue;
        else
            return kvctl_usage("top", "--interval wants a duration from 100ms, --count a number");
    }
    if (optind < argc)
        return kvctl_usage("top", "top takes no argument '%s'", argv[optind]);
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result == KVCTL_OK)
        result = watch(globals, &args, client);
    kvc_client_close(client);
    return result;
}

const kvctl_command kvctl_top = {
    .name = "top",
    .brief = "what the server does, per second",
    .help = help,
    .run = run,
};
