/*
 * bench.c: kvctl bench: how fast the running server is for this machine; arguments and the table.
 *
 * Main thread.
 */
#include "bench.h"

#include <getopt.h>
#include <stdio.h>
#include <string.h>

#include "base/text.h"

#define MIB       ((uint64_t)1 << 20)
#define MAX_BYTES ((uint64_t)4 << 30) /* of one turn */

static const char help[] =
    "NAME\n"
    "    kvctl bench - time puts and reads against the running server\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--timeout DURATION] [--json] bench [OPTION]... [put] [get] [rows]\n"
    "\n"
    "DESCRIPTION\n"
    "    Stores made-up values and reads them back, each turn once to warm up and then --runs\n"
    "    times, and prints a line for each case; without a word, all three:\n"
    "\n"
    "    put    --values new values\n"
    "    get    every row of them, in order\n"
    "    rows   2,048 rows spread over them, as one step of a selector picks\n"
    "\n"
    "    Every row is compared with what was put. The values are erased at the end; while they\n"
    "    are there, others may give way to them, so mind --values on a server in use.\n"
    "\n"
    "    The columns are those of store_bench: median and spread of GB/s, values or rows a "
    "second,\n"
    "    CPU time per KiB. There is no floor to compare with here ('-'), and the CPU is kvctl's\n"
    "    alone: the server may be on another machine.\n"
    "\n"
    "    A turn has a minute, or --timeout where that is longer.\n"
    "\n"
    "OPTIONS\n"
    "    --value-bytes SIZE   of one value; the server's limit, 1MiB by default\n"
    "    --row-bytes SIZE     of one row; a value has 64 to 1,024. Default: 4KiB\n"
    "    --values N           in a turn. Default: 64\n"
    "    --runs N             turns that count, 1 to 64. Default: 5\n"
    "    --durable            puts wait until they are on disk and synced\n"
    "    --keep               do not erase the values at the end\n"
    "    -h, --help           print this page\n"
    "\n"
    "EXIT STATUS\n"
    "    0   it worked\n"
    "    1   a request failed, a value was refused, or a row was not what was put\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl bench\n"
    "    kvctl --timeout 5m bench --durable put\n"
    "    kvctl --json bench --value-bytes 48KiB --row-bytes 768 rows | jq .cases[0].bytes_per_s\n";

static const char *const case_names[BENCH_CASES] = {"put", "get", "rows"};

static bool parse_size(const char *option, uint64_t max, uint64_t *size_p)
{
    if (kvc_bytes_parse(optarg, size_p) == KVC_OK && *size_p >= 1 && *size_p <= max)
        return true;
    kvctl_error("%s wants a size such as 64KiB, up to %llu bytes, not '%s'", option,
                (unsigned long long)max, optarg);
    return false;
}

static bool parse_option(int option, bench_plan *plan)
{
    switch (option) {
    case 'v':
        return parse_size("--value-bytes", KVC_MAX_VALUE_BYTES, &plan->value_bytes);
    case 'r':
        return parse_size("--row-bytes", KVC_MAX_VALUE_BYTES, &plan->row_bytes);
    case 'n':
        return kvctl_number_parse("--values", optarg, 1, 1000000, &plan->n_values);
    case 'R':
        return kvctl_number_parse("--runs", optarg, 1, BENCH_MAX_RUNS, &plan->n_runs);
    case 'd':
        plan->durable = true;
        return true;
    case 'k':
        plan->keep = true;
        return true;
    default:
        return false;
    }
}

/* The words left name cases; none: all. False: one is no case. */
static bool parse_words(int argc, char **argv, bool wanted[BENCH_CASES])
{
    for (int c = 0; c < BENCH_CASES; c++)
        wanted[c] = optind == argc;
    for (int i = optind; i < argc; i++) {
        int c = 0;
        while (c < BENCH_CASES && strcmp(argv[i], case_names[c]) != 0)
            c++;
        if (c == BENCH_CASES) {
            (void)kvctl_usage("bench", "'%s' is none of put, get, rows", argv[i]);
            return false;
        }
        wanted[c] = true;
    }
    return true;
}

static bool parse(int argc, char **argv, bench_plan *plan, bool wanted[BENCH_CASES])
{
    static const struct option options[] = {
        {"value-bytes", required_argument, NULL, 'v'},
        {"row-bytes", required_argument, NULL, 'r'},
        {"values", required_argument, NULL, 'n'},
        {"runs", required_argument, NULL, 'R'},
        {"durable", no_argument, NULL, 'd'},
        {"keep", no_argument, NULL, 'k'},
        {0},
    };
    int option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (!parse_option(option, plan)) {
            (void)kvctl_usage("bench", "see the message above");
            return false;
        }
    }
    uint64_t tokens = plan->value_bytes / plan->row_bytes;
    if (plan->value_bytes % plan->row_bytes != 0 || tokens < KVC_BLOCK_TOKENS_MIN ||
        tokens > KVC_BLOCK_TOKENS_MAX) {
        (void)kvctl_usage(
            "bench", "a value must be %u to %u rows; %llu bytes are not, of %llu each",
            KVC_BLOCK_TOKENS_MIN, KVC_BLOCK_TOKENS_MAX, (unsigned long long)plan->value_bytes,
            (unsigned long long)plan->row_bytes);
        return false;
    }
    if (plan->n_values > MAX_BYTES / plan->value_bytes) {
        (void)kvctl_usage("bench", "a turn may move 4GiB, not %llu values of %llu bytes",
                          (unsigned long long)plan->n_values,
                          (unsigned long long)plan->value_bytes);
        return false;
    }
    return parse_words(argc, argv, wanted);
}

static uint64_t unit_bytes(const bench_plan *plan, bench_case which)
{
    return which == BENCH_ROWS_CASE ? plan->row_bytes : plan->value_bytes;
}

static double median(const bench_result *r)
{
    uint32_t half = r->n_runs / 2;
    return r->n_runs % 2 ? r->bytes_per_s[half]
                         : (r->bytes_per_s[half - 1] + r->bytes_per_s[half]) / 2;
}

static double cpu_ns_per_kib(const bench_result *r)
{
    return (double)r->cpu_ns / ((double)r->bytes / 1024);
}

static void print_line(const bench_plan *plan, bench_case which, const bench_result *r)
{
    char size[KVC_TEXT_BYTES], title[64], rate[32];
    double units = median(r) / (double)unit_bytes(plan, which);
    (void)kvc_bytes_short(unit_bytes(plan, which), size);
    (void)snprintf(title, sizeof(title), "%s %s%s", case_names[which], size,
                   which == BENCH_PUT && plan->durable ? ", DURABLE" : "");
    (void)snprintf(rate, sizeof(rate), units >= 1e4 ? "%.0fk" : "%.1fk", units / 1e3);
    (void)printf("| %-30s | %-24s | %6.3f | %.3f-%.3f | %7s | %5s | %5.0f |\n", title, "cachesvc",
                 median(r) / 1e9, r->bytes_per_s[0] / 1e9, r->bytes_per_s[r->n_runs - 1] / 1e9,
                 rate, "-", cpu_ns_per_kib(r));
    (void)fflush(stdout);
}

static void print_json(const bench_plan *plan, bench_case which, const bench_result *r)
{
    kvctl_json_open(NULL, '{');
    kvctl_json_text("case", case_names[which]);
    kvctl_json_number("unit_bytes", unit_bytes(plan, which));
    kvctl_json_bool("durable", which == BENCH_PUT && plan->durable);
    kvctl_json_number("runs", r->n_runs);
    kvctl_json_number("bytes", r->bytes);
    kvctl_json_number("bytes_per_s", (uint64_t)median(r));
    kvctl_json_number("bytes_per_s_min", (uint64_t)r->bytes_per_s[0]);
    kvctl_json_number("bytes_per_s_max", (uint64_t)r->bytes_per_s[r->n_runs - 1]);
    kvctl_json_number("units_per_s", (uint64_t)(median(r) / (double)unit_bytes(plan, which)));
    kvctl_json_number("cpu_ns_per_kib", (uint64_t)cpu_ns_per_kib(r));
    kvctl_json_number("rows_dram", r->rows_dram);
    kvctl_json_number("rows_lmdb", r->rows_lmdb);
    kvctl_json_close();
}

static bool measure(bench *b, const kvctl_globals *globals, const bench_plan *plan,
                    const bool wanted[BENCH_CASES])
{
    bool fine = true;
    uint64_t rows_dram = 0, rows_lmdb = 0;
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_open("cases", '[');
    } else {
        (void)printf("| case | who | GB/s | min-max | a second | of the floor | CPU ns/KiB |\n"
                     "|---|---|---|---|---|---|---|\n");
    }
    for (int c = 0; c < BENCH_CASES && fine; c++) {
        bench_result result;
        if (!wanted[c])
            continue;
        fine = bench_measure(b, (bench_case)c, &result);
        if (fine)
            (globals->json ? print_json : print_line)(plan, (bench_case)c, &result);
        rows_dram += result.rows_dram;
        rows_lmdb += result.rows_lmdb;
    }
    if (globals->json) {
        kvctl_json_close();
        kvctl_json_close();
    } else if (rows_dram + rows_lmdb > 0) {
        (void)printf("\nrows read: %llu from dram, %llu from lmdb\n", (unsigned long long)rows_dram,
                     (unsigned long long)rows_lmdb);
    }
    return fine;
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    bench_plan plan = {.value_bytes = MIB, .row_bytes = 4096, .n_values = 64, .n_runs = 5};
    bool wanted[BENCH_CASES];
    kvc_client *client;
    if (!parse(argc, argv, &plan, wanted))
        return KVCTL_USAGE;
    kvctl_exit status = kvctl_connect(globals, &client);
    if (status != KVCTL_OK)
        return status;
    bench *b = bench_open(globals, client, &plan);
    bool fine = b != NULL && measure(b, globals, &plan, wanted);
    if (b != NULL)
        fine &= bench_close(b);
    kvc_client_close(client);
    return fine ? KVCTL_OK : KVCTL_FAILED;
}

const kvctl_command kvctl_bench = {
    .name = "bench",
    .brief = "time puts and reads against the server",
    .help = help,
    .run = run,
};
