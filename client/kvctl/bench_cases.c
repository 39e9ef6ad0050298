/*
 * bench_cases.c: putting, getting and picking, timed; see bench.h.
 *
 * Main thread. Invariant: digests [0, n_put) are what may be on the server; the last n_values of
 * them are the blocks that are read, and their bytes are those of memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/digest.h"
#include "bench.h"

#define PART    0u
#define TURN_NS 60000000000ull

struct bench {
    const kvctl_globals *globals;
    kvc_client *client;
    bench_plan plan;
    uint32_t block_tokens;
    kvc_digest schema;
    kvc_digest *digests; /* [n_values * (n_runs + 1)] */
    uint64_t n_put;      /* of them */
    uint64_t seed;
    char *memory, *out; /* [n_values * value_bytes] each */
    uint32_t *picks;    /* [n_values * block_tokens] */
    kvc_value *values;  /* [n_values] */
    int8_t *status;     /* [n_values] */
    kvc_region *in_region, *out_region;
};

/* A turn moves more than other commands' requests do. */
static uint64_t turn_deadline_ns(const bench *b)
{
    return kvc_deadline_ns(b->globals->timeout_ns > TURN_NS ? b->globals->timeout_ns : TURN_NS);
}

static uint64_t own_cpu_ns(void)
{
    struct timespec used;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used);
    return (uint64_t)used.tv_sec * 1000000000 + (uint64_t)used.tv_nsec;
}

static uint64_t next_random(bench *b)
{
    b->seed = b->seed * 6364136223846793005u + 1442695040888963407u;
    return b->seed >> 33;
}

static bool register_schema(bench *b)
{
    kvc_part part = {.part = PART,
                     .kind = KVC_PART_STATE,
                     .dtype = KVC_DTYPE_RAW,
                     .row_bytes = (uint32_t)b->plan.row_bytes};
    kvc_schema schema = {.model = "kvctl bench",
                         .revision = "",
                         .recipe = "none",
                         .tp_size = 1,
                         .block_tokens = b->block_tokens,
                         .n_parts = 1,
                         .parts = &part};
    if (kvc_schema_register(b->client, &schema, kvctl_deadline_ns(b->globals), &b->schema) ==
        KVC_OK)
        return true;
    kvctl_error("cannot register the schema: %s", kvc_last_error());
    return false;
}

static bool register_memory(bench *b)
{
    size_t len_bytes = b->plan.n_values * b->plan.value_bytes;
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .len_bytes = len_bytes, .kind = KVC_MEMORY_HOST};
    for (size_t i = 0; i + 8 <= len_bytes; i += 8) {
        uint64_t word = (i + b->seed) * 0x9e3779b97f4a7c15ull;
        memcpy(b->memory + i, &word, 8);
    }
    memset(b->out, 0, len_bytes);
    desc.base = b->memory;
    if (kvc_region_register(b->client, &desc, &b->in_region) != KVC_OK)
        return false;
    desc.base = b->out;
    return kvc_region_register(b->client, &desc, &b->out_region) == KVC_OK;
}

bench *bench_open(const kvctl_globals *globals, kvc_client *client, const bench_plan *plan)
{
    size_t n = plan->n_values, bytes = n * plan->value_bytes;
    bench *b = calloc(1, sizeof(*b));
    if (b == NULL)
        return NULL;
    b->globals = globals;
    b->client = client;
    b->plan = *plan;
    b->block_tokens = (uint32_t)(plan->value_bytes / plan->row_bytes);
    b->seed = kvc_wall_ns(); /* so that nothing is there from another time */
    b->digests = calloc(n * (plan->n_runs + 1), sizeof(*b->digests));
    b->memory = malloc(bytes);
    b->out = malloc(bytes);
    b->picks = calloc(n * b->block_tokens, sizeof(*b->picks));
    b->values = calloc(n, sizeof(*b->values));
    b->status = calloc(n, 1);
    bool fine = b->digests && b->memory && b->out && b->picks && b->values && b->status;
    if (!fine)
        kvctl_error("no memory for %zu bytes twice", bytes);
    else if (!(fine = register_memory(b)))
        kvctl_error("%s", kvc_last_error());
    if (!fine || !register_schema(b)) {
        (void)bench_close(b);
        return NULL;
    }
    return b;
}

/* ---- put ------------------------------------------------------------------------------------- */

static bool name_blocks(bench *b)
{
    for (uint64_t i = 0; i < b->plan.n_values; i++) {
        uint64_t name[2] = {b->seed, b->n_put + i};
        if (kvc_sha256(name, sizeof(name), &b->digests[b->n_put + i]) != KVC_OK)
            return false;
        b->values[i] = (kvc_value){.digest = b->digests[b->n_put + i],
                                   .part = PART,
                                   .len_bytes = (uint32_t)b->plan.value_bytes,
                                   .src_off_bytes = i * b->plan.value_bytes};
    }
    b->n_put += b->plan.n_values;
    return true;
}

static bool put_once(bench *b, bench_result *result, uint64_t *bytes_p)
{
    uint32_t n = (uint32_t)b->plan.n_values, refused = 0;
    kvc_promise promise = b->plan.durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY;
    kvc_op op;
    (void)result;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_put(b->client, &b->schema, promise, b->values, n, b->in_region,
                                b->status, turn_deadline_ns(b), &op);
    if (status == KVC_OK)
        status = kvc_op_wait(&op, 0);
    if (status != KVC_OK) {
        kvctl_error("put: %s", kvc_last_error());
        return false;
    }
    for (uint32_t i = 0; i < n; i++)
        refused += b->status[i] != KVC_OK;
    if (refused > 0)
        kvctl_error("put: %u of %u values were refused; the first: %s", refused, n,
                    kvc_status_name((kvc_status)b->status[0]));
    *bytes_p = n * b->plan.value_bytes;
    return refused == 0;
}

/* ---- get and rows ---------------------------------------------------------------------------- */

static bool right_bytes(const bench *b, uint32_t n)
{
    size_t row_bytes = b->plan.row_bytes;
    for (uint32_t i = 0; i < n; i++) {
        if (memcmp(b->out + i * row_bytes, b->memory + b->picks[i] * row_bytes, row_bytes) != 0) {
            kvctl_error("row %u is not what was put", b->picks[i]);
            return false;
        }
    }
    return true;
}

static bool fetch(bench *b, kvc_context *context, uint32_t n, bench_result *result)
{
    kvc_pick_group group = {.context = context,
                            .part = PART,
                            .row_bytes = (uint32_t)b->plan.row_bytes,
                            .n_picks = n,
                            .picks = b->picks};
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status =
        kvc_fetch(b->client, &group, 1, b->out_region, NULL, &info, turn_deadline_ns(b), &op);
    if (status == KVC_OK)
        status = kvc_op_wait(&op, 0);
    if (status != KVC_OK) {
        kvctl_error("fetch: %s", kvc_last_error());
        return false;
    }
    if (info.rows_missing > 0) {
        kvctl_error("%u of %u rows are not there any more: fewer --values fit", info.rows_missing,
                    n);
        return false;
    }
    result->rows_dram += info.rows_dram;
    result->rows_lmdb += info.rows_lmdb;
    return true;
}

/* Which rows a turn reads; how many. */
static uint32_t choose_picks(bench *b, bench_case which)
{
    uint32_t n_tokens = (uint32_t)b->plan.n_values * b->block_tokens;
    uint32_t n = which == BENCH_GET || n_tokens < BENCH_ROWS ? n_tokens : BENCH_ROWS;
    uint32_t stride = n_tokens / n;
    for (uint32_t i = 0; i < n; i++)
        b->picks[i] = i * stride + (uint32_t)(next_random(b) % stride);
    return n;
}

/* ---- turns ----------------------------------------------------------------------------------- */

static int rising(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One turn; counted unless it is the first. */
static bool turn(bench *b, bench_case which, kvc_context *context, bool counts,
                 bench_result *result)
{
    bench_result none = {0}, *where = counts ? result : &none;
    uint64_t bytes = 0;
    uint32_t n = 0;
    if (which == BENCH_PUT && !name_blocks(b))
        return false;
    if (which != BENCH_PUT)
        n = choose_picks(b, which);
    uint64_t cpu_ns = own_cpu_ns(), start_ns = kvc_now_ns();
    bool fine = which == BENCH_PUT ? put_once(b, where, &bytes) : fetch(b, context, n, where);
    uint64_t took_ns = kvc_now_ns() - start_ns;
    if (which != BENCH_PUT)
        bytes = n * b->plan.row_bytes;
    where->cpu_ns += own_cpu_ns() - cpu_ns;
    where->bytes += bytes;
    where->bytes_per_s[where->n_runs++] = (double)bytes * 1e9 / (double)(took_ns ? took_ns : 1);
    return fine && (which == BENCH_PUT || right_bytes(b, n));
}

bool bench_measure(bench *b, bench_case which, bench_result *result_p)
{
    kvc_context *context = NULL;
    bool fine = true;
    *result_p = (bench_result){0};
    if (which != BENCH_PUT && b->n_put == 0) { /* something to read */
        uint64_t bytes;
        fine = name_blocks(b) && put_once(b, result_p, &bytes);
    }
    if (fine && which != BENCH_PUT) {
        const kvc_digest *blocks = b->digests + b->n_put - b->plan.n_values;
        fine = kvc_context_open(b->client, &b->schema, blocks, (uint32_t)b->plan.n_values, 0,
                                kvctl_deadline_ns(b->globals), &context) == KVC_OK;
        if (!fine)
            kvctl_error("cannot open a context: %s", kvc_last_error());
    }
    for (uint64_t i = 0; fine && i <= b->plan.n_runs; i++)
        fine = turn(b, which, context, i > 0, result_p);
    kvc_context_close(context);
    qsort(result_p->bytes_per_s, result_p->n_runs, sizeof(result_p->bytes_per_s[0]), rising);
    return fine;
}

static bool erase_all(bench *b)
{
    kvc_op op;
    uint32_t most = kvc_client_limits(b->client)->max_digests;
    kvc_status status = KVC_OK;
    for (uint64_t at = 0; at < b->n_put && status == KVC_OK; at += most) {
        uint64_t left = b->n_put - at;
        kvc_op_init(&op, NULL, NULL);
        status =
            kvc_erase(b->client, &b->schema, b->digests + at, (uint32_t)(left < most ? left : most),
                      NULL, 0, NULL, turn_deadline_ns(b), &op);
        if (status == KVC_OK)
            status = kvc_op_wait(&op, 0);
    }
    if (status != KVC_OK)
        kvctl_error("some of the values stay on the server: %s", kvc_last_error());
    return status == KVC_OK;
}

bool bench_close(bench *b)
{
    bool fine = b->plan.keep || erase_all(b);
    /* No op is in flight any more. */
    fine &= kvc_region_deregister(b->client, b->in_region) == KVC_OK;
    fine &= kvc_region_deregister(b->client, b->out_region) == KVC_OK;
    free(b->digests);
    free(b->memory);
    free(b->out);
    free(b->picks);
    free(b->values);
    free(b->status);
    free(b);
    return fine;
}
