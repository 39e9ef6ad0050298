/*
 * explain.c: kvctl explain: by which way a worker would reach the rows that it misses, and why.
 *
 * Measures the round trips as a worker does when it opens, and prints what the client library would
 * choose by; rates per byte are guesses until rows have moved over this connection.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvctl.h"

static const char help[] =
    "NAME\n"
    "    kvctl explain - by which way missing rows would be reached, and why\n"
    "\n"
    "SYNOPSIS\n"
    "    kvctl [--server URI] [--json] explain --schema SCHEMA --part N --q-heads N [--rows N]\n"
    "          [--queries N] [--reuse N] [--chunks N]\n"
    "\n"
    "DESCRIPTION\n"
    "    Measures the round trip of every way that this connection has, prints what each would\n"
    "    cost for a step that misses so many rows of the part, which is the cheapest, and why the\n"
    "    others cannot be taken. The ways are rows (fetched in messages), near (the server "
    "attends\n"
    "    and sends one result), shm and rdma. Costs per byte of rows are guesses here; a worker\n"
    "    learns them as it goes, and its choices are counted in its process's metrics\n"
    "    way_WAY_requests and, by their reasons, way_WAY_REASON (kvc_process_counts): cheapest,\n"
    "    only (possible one), tried (again, though dear), asked (for), exact (another rounds),\n"
    "    broken (another did not work), busy (a server's attention), rest (of what it attended "
    "to).\n"
    "    Where rdma can be taken it says whether rows that cross it are summed (kvctl --sums).\n"
    "    Of a worker's sequence that is larger than its client may lock, the part beyond that is\n"
    "    copied once more (kvctl doctor; counts rdma_regions_too_large, rdma_regions_evicted,\n"
    "    rdma_placed_bytes), as are rows for a GPU whose memory no device takes\n"
    "    (rdma_gpu_regions_copied).\n"
    "\n"
    "OPTIONS\n"
    "    --schema SCHEMA\n"
    "        The schema: its digest (64 hex digits), or a file with its text (lines key=value).\n"
    "    --part N\n"
    "        The part whose rows are missed.\n"
    "    --q-heads N\n"
    "        Query heads that attend over it.\n"
    "    --rows N\n"
    "        Rows that are missed. Default: 2048.\n"
    "    --queries N\n"
    "        Queries of the step, 1 when decoding. Default: 1.\n"
    "    --reuse N\n"
    "        How often a fetched row is used again before it gives way. Default: 0.\n"
    "    --chunks N\n"
    "        Whole chunks of 64 tokens are missed instead of rows, and the server sends a result\n"
    "        for each (selectors gca, hsa). --reuse: the calls after a retrieval, but the first.\n"
    "    -h, --help\n"
    "        Print this page.\n"
    "\n"
    "EXIT STATUS\n"
    "    0   the server answered\n"
    "    1   it answered with an error, such as NOT_FOUND for an unknown schema or part\n"
    "    2   bad usage\n"
    "    3   no server answered\n"
    "\n"
    "EXAMPLES\n"
    "    kvctl explain --schema $SCHEMA --part 0 --q-heads 32\n"
    "    kvctl --json explain --schema $SCHEMA --part 0 --q-heads 32 --rows 40 --reuse 3\n"
    "    kvctl explain --schema $SCHEMA --part 0 --q-heads 32 --chunks 8 --reuse 63\n";

#define CHUNK_TOKENS 64u
#define DEFAULT_ROWS 2048u

typedef struct explain_args {
    kvctl_schema schema;
    uint64_t part, q_heads, rows, queries, reuse, chunks; /* rows, chunks: 0 if not given */
    bool has_schema, has_part;
} explain_args;

static void print_json(const kvc_way_cost *costs, kvc_way best, kvc_way_why why, bool sums)
{
    kvctl_json_open(NULL, '{');
    kvctl_json_text("way", best == KVC_WAY_COUNT ? "none" : costs[best].name);
    if (best != KVC_WAY_COUNT)
        kvctl_json_text("why", kvc_way_why_name(why));
    kvctl_json_open("ways", '[');
    for (int i = 0; i < KVC_WAY_COUNT; i++) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", costs[i].name);
        kvctl_json_bool("possible", costs[i].why_not == NULL);
        if (costs[i].why_not != NULL)
            kvctl_json_text("why_not", costs[i].why_not);
        kvctl_json_number("cost_ns", (uint64_t)costs[i].cost_ns);
        kvctl_json_number("fixed_ns", (uint64_t)costs[i].fixed_ns);
        kvctl_json_number("mib_ns", (uint64_t)(costs[i].byte_ns * (1 << 20)));
        kvctl_json_number("samples", costs[i].samples);
        kvctl_json_close();
    }
    kvctl_json_close();
    kvctl_json_bool("rdma_sums", sums);
    kvctl_json_close();
}

static void print_text(const kvc_way_cost *costs, kvc_way best, kvc_way_why why, bool sums)
{
    for (int i = 0; i < KVC_WAY_COUNT; i++) {
        const kvc_way_cost *cost = &costs[i];
        if (cost->why_not != NULL) {
            (void)printf("  %-6s not possible: %s\n", cost->name, cost->why_not);
            continue;
        }
        (void)printf("%s %-6s %9.0f us: %.0f us a request (%s), %.0f us a MiB of rows (a guess)\n",
                     i == (int)best ? "*" : " ", cost->name, cost->cost_ns / 1e3,
                     cost->fixed_ns / 1e3, cost->samples != 0 ? "measured" : "a guess",
                     cost->byte_ns * (1 << 20) / 1e3);
    }
    if (costs[KVC_WAY_RDMA].why_not == NULL)
        (void)printf("rows that cross rdma are %s\n",
                     sums ? "summed and verified by both ends"
                          : "verified by the fabric's CRCs alone (--sums asks for more)");
    if (best == KVC_WAY_COUNT)
        (void)printf("no way is possible\n");
    else
        (void)printf("%s: %s\n", costs[best].name,
                     why == KVC_WHY_ONLY ? "no other way is possible" : "it costs least");
}

static const kvc_part *find_part(const kvc_schema *schema, uint64_t id)
{
    for (uint32_t i = 0; i < schema->n_parts; i++)
        if (schema->parts[i].part == id)
            return &schema->parts[i];
    kvctl_error("the schema has no part %llu", (unsigned long long)id);
    return NULL;
}

static kvctl_exit explain(const kvctl_globals *globals, kvc_client *client,
                          const explain_args *args, const kvc_part *part)
{
    kvc_way_cost costs[KVC_WAY_COUNT];
    kvc_way_why why;
    uint64_t n_results = args->chunks != 0 ? args->chunks : 1, n = args->queries * args->q_heads;
    kvc_way_ask ask = {.n_rows =
                           (uint32_t)(args->chunks != 0 ? args->chunks * CHUNK_TOKENS : args->rows),
                       .row_bytes = part->row_bytes,
                       .n_q = (uint32_t)args->queries,
                       .q_bytes = n * 2 * part->q_dim,
                       .o_bytes = n_results * n * (2ull * part->v_dim + sizeof(float)),
                       .reuse = (double)args->reuse};
    kvc_status status = kvc_way_probe(client, &args->schema.digest, part, (uint32_t)args->q_heads,
                                      kvctl_deadline_ns(globals));
    if (status != KVC_OK)
        return kvctl_failed(status);
    kvc_way best = kvc_way_costs(client, &ask, costs, &why);
    if (globals->json)
        print_json(costs, best, why, kvc_client_sums(client));
    else
        print_text(costs, best, why, kvc_client_sums(client));
    return KVCTL_OK;
}

static kvctl_exit ask(const kvctl_globals *globals, const explain_args *args)
{
    kvc_client *client = NULL;
    kvc_schema *schema = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_status status =
        kvc_schema_get(client, &args->schema.digest, kvctl_deadline_ns(globals), &schema);
    if (status != KVC_OK) {
        result = kvctl_failed(status);
    } else {
        const kvc_part *part = find_part(schema, args->part);
        result = part == NULL ? KVCTL_FAILED : explain(globals, client, args, part);
    }
    free(schema);
    kvc_client_close(client);
    return result;
}

static bool take(int option, explain_args *args)
{
    switch (option) {
    case 's':
        args->has_schema = kvctl_schema_read(optarg, &args->schema);
        return args->has_schema;
    case 'p':
        args->has_part = true;
        return kvctl_number_parse("--part", optarg, 0, KVC_MAX_PART_ID, &args->part);
    case 'q':
        return kvctl_number_parse("--q-heads", optarg, 1, KVC_MAX_ATTEND_HEADS, &args->q_heads);
    case 'n':
        return kvctl_number_parse("--rows", optarg, 1, 1u << 24, &args->rows);
    case 'c':
        return kvctl_number_parse("--queries", optarg, 1, 1u << 16, &args->queries);
    case 'u':
        return kvctl_number_parse("--reuse", optarg, 0, 1000000, &args->reuse);
    case 'k':
        return kvctl_number_parse("--chunks", optarg, 1, 1u << 18, &args->chunks);
    default:
        return false;
    }
}

static kvctl_exit run(const kvctl_globals *globals, int argc, char **argv)
{
    static const struct option options[] = {
        {"schema", required_argument, NULL, 's'},  {"part", required_argument, NULL, 'p'},
        {"q-heads", required_argument, NULL, 'q'}, {"rows", required_argument, NULL, 'n'},
        {"queries", required_argument, NULL, 'c'}, {"reuse", required_argument, NULL, 'u'},
        {"chunks", required_argument, NULL, 'k'},  {0},
    };
    explain_args args = {.queries = 1};
    kvctl_exit result = KVCTL_OK;
    int option;
    while (result == KVCTL_OK && (option = getopt_long(argc, argv, "", options, NULL)) != -1)
        if (!take(option, &args))
            result = kvctl_usage("explain", "an option is wrong");
    if (result == KVCTL_OK && optind < argc)
        result = kvctl_usage("explain", "unexpected word '%s'", argv[optind]);
    if (result == KVCTL_OK && (!args.has_schema || !args.has_part || args.q_heads == 0))
        result = kvctl_usage("explain", "--schema, --part and --q-heads are needed");
    if (result == KVCTL_OK && args.rows != 0 && args.chunks != 0)
        result = kvctl_usage("explain", "--rows and --chunks exclude each other");
    if (args.rows == 0)
        args.rows = DEFAULT_ROWS;
    if (result == KVCTL_OK)
        result = ask(globals, &args);
    free(args.schema.text);
    return result;
}

const kvctl_command kvctl_explain = {
    .name = "explain",
    .brief = "by which way missing rows would be reached, and why",
    .help = help,
    .run = run,
};
