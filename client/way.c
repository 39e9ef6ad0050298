/*
 * way.c: what each way to a row costs over the current connection, and which is the cheapest.
 *
 * A request costs fixed_ns + bytes * byte_ns, where bytes are those of the rows it is about,
 * whether they travel or are attended where they lie; queries and results cross like rows. Both
 * numbers are moving averages, under the client's lock: small requests teach the first, large ones
 * the second. Until a way was used its
 * numbers are guesses, and a choice in a while goes to another way than the cheapest, so that what
 * was dear once is looked at again.
 */
#include <stdlib.h>
#include <string.h>

#include "base/metrics.h"
#include "internal.h"

#define LEARN_PART  8.0         /* of a moving average's distance: one such part a sample */
#define LARGE_BYTES (64u << 10) /* from here on a request teaches byte_ns */
#define TRY_EVERY   64u         /* choices */
#define TRY_WITHIN  8.0         /* times the cheapest cost: what is dearer is not tried */
#define N_PROBES    3u

typedef struct way_row {
    const char *name, *scheme;
    bool near;
    kvc_metric metric, why; /* why: the first of its reasons' */
} way_row;

static const way_row rows[KVC_WAY_COUNT] = {
#define KVC_WAY(upper, lower, uri_scheme, attends)                                                 \
    [KVC_WAY_##upper] = {.name = #lower,                                                           \
                         .scheme = uri_scheme,                                                     \
                         .near = attends,                                                          \
                         .metric = KVC_M_way_##lower##_requests,                                   \
                         .why = KVC_M_way_##lower##_cheapest},
#include "ways.def"
#undef KVC_WAY
};

/* In the order of the metrics. */
static const char *const whys[KVC_WHY_COUNT] = {
    [KVC_WHY_CHEAPEST] = "cheapest", [KVC_WHY_ONLY] = "only",   [KVC_WHY_TRIED] = "tried",
    [KVC_WHY_ASKED] = "asked",       [KVC_WHY_EXACT] = "exact", [KVC_WHY_BROKEN] = "broken",
    [KVC_WHY_BUSY] = "busy",         [KVC_WHY_REST] = "rest",
};
_Static_assert((int)KVC_M_way_rows_rest - (int)KVC_M_way_rows_cheapest == (int)KVC_WHY_REST,
               "metrics.def has the reasons in the order of kvc_way_why");

/* Guesses for a way that was never used: a loopback's. */
#define GUESS_FIXED_NS 100000.0
#define GUESS_ROWS_NS  0.5  /* a byte: 2 GB/s */
#define GUESS_NEAR_NS  0.25 /* 4 GB/s */

const char *kvc_way_name(kvc_way way)
{
    return (unsigned)way < KVC_WAY_COUNT ? rows[way].name : NULL;
}

const char *kvc_way_why_name(kvc_way_why why)
{
    return (unsigned)why < KVC_WHY_COUNT ? whys[why] : NULL;
}

static bool has_scheme(const char *uri, const char *scheme)
{
    size_t len = strlen(scheme);
    return uri != NULL && strncmp(uri, scheme, len) == 0 && strncmp(uri + len, "://", 3) == 0;
}

/* The way of rows over the current link. Under the lock. */
static kvc_way rows_way(const kvc_client *client)
{
    for (int way = 0; way < KVC_WAY_COUNT; way++)
        if (rows[way].scheme != NULL && client->link != NULL &&
            has_scheme(client->link->uri, rows[way].scheme))
            return (kvc_way)way;
    return KVC_WAY_ROWS;
}

static void average(double *value_p, double sample, bool first)
{
    *value_p = first ? sample : *value_p + (sample - *value_p) / LEARN_PART;
}

void kvci_way_learn(kvc_client *client, bool near, uint64_t bytes, uint64_t qo_bytes,
                    uint64_t took_ns)
{
    kvc_way link = rows_way(client);
    kvci_way_state *way = &client->ways[near ? KVC_WAY_NEAR : link];
    double ns = (double)took_ns - (double)qo_bytes * client->ways[link].byte_ns;
    if (bytes >= LARGE_BYTES) {
        double rest = ns > way->fixed_ns ? ns - way->fixed_ns : 0;
        average(&way->byte_ns, rest / (double)bytes, way->n_large == 0);
        way->n_large++;
    } else {
        double rest = ns - (double)bytes * way->byte_ns;
        average(&way->fixed_ns, rest > 0 ? rest : 0, way->n_small == 0);
        way->n_small++;
    }
}

void kvci_ways_init(kvc_client *client)
{
    for (int way = 0; way < KVC_WAY_COUNT; way++)
        client->ways[way] = (kvci_way_state){
            .fixed_ns = GUESS_FIXED_NS, .byte_ns = rows[way].near ? GUESS_NEAR_NS : GUESS_ROWS_NS};
}

/* Under the lock. */
static const char *why_not(const kvc_client *client, kvc_way way, const kvc_way_ask *ask)
{
    const kvc_limits *limits = &client->limits;
    if (ask->refused & 1u << way)
        return "the caller cannot, or has tried it";
    if (!rows[way].near)
        return way == rows_way(client) ? NULL : "the connection is of another kind";
    if (limits->max_attend_queries == 0)
        return "the server does not attend";
    if (ask->n_q > limits->max_attend_queries)
        return "more queries than the server takes at once";
    if (ask->n_rows > limits->max_picks)
        return "more rows than one request names";
    return ask->q_bytes > limits->max_message_bytes || ask->o_bytes > limits->max_message_bytes
               ? "queries or results fill a message"
               : NULL;
}

static uint32_t n_possible(const kvc_client *client, const kvc_way_ask *ask)
{
    uint32_t n = 0;
    for (int way = 0; way < KVC_WAY_COUNT; way++)
        n += why_not(client, (kvc_way)way, ask) == NULL;
    return n;
}

/* Why the cheapest is taken. Under the lock. */
static kvc_way_why why_this(const kvc_client *client, const kvc_way_ask *ask)
{
    kvc_way_ask any = *ask;
    any.refused = 0;
    uint32_t n = n_possible(client, ask);
    if (ask->because == KVC_WHY_EXACT && n_possible(client, &any) > n)
        return KVC_WHY_EXACT;
    if (ask->because != KVC_WHY_CHEAPEST && ask->because != KVC_WHY_EXACT)
        return ask->because;
    return n == 1 ? KVC_WHY_ONLY : KVC_WHY_CHEAPEST;
}

/* Under the lock. */
static kvc_way cheapest(const kvc_client *client, const kvc_way_ask *ask, kvc_way_cost *costs)
{
    kvc_way best = KVC_WAY_COUNT;
    double bytes = (double)ask->n_rows * ask->row_bytes;
    double qo_ns = (double)(ask->q_bytes + ask->o_bytes) * client->ways[rows_way(client)].byte_ns;
    for (int i = 0; i < KVC_WAY_COUNT; i++) {
        const kvci_way_state *way = &client->ways[i];
        double cost_ns = way->fixed_ns + bytes * way->byte_ns;
        costs[i] = (kvc_way_cost){
            .name = rows[i].name,
            .why_not = why_not(client, (kvc_way)i, ask),
            .fixed_ns = way->fixed_ns,
            .byte_ns = way->byte_ns,
            .cost_ns = rows[i].near ? cost_ns + qo_ns : cost_ns / (1 + ask->reuse),
            .samples = way->n_small + way->n_large,
        };
        if (costs[i].why_not == NULL &&
            (best == KVC_WAY_COUNT || costs[i].cost_ns < costs[best].cost_ns))
            best = (kvc_way)i;
    }
    return best;
}

kvc_way kvc_way_costs(kvc_client *client, const kvc_way_ask *ask, kvc_way_cost *costs,
                      kvc_way_why *why_p)
{
    kvc_mutex_lock(&client->lock);
    kvc_way best = cheapest(client, ask, costs);
    if (why_p != NULL)
        *why_p = why_this(client, ask);
    kvc_mutex_unlock(&client->lock);
    return best;
}

/* The way to measure again instead of best, or best. */
static kvc_way retry_dear(const kvc_way_cost *costs, kvc_way best)
{
    for (int i = 0; i < KVC_WAY_COUNT; i++)
        if (i != (int)best && costs[i].why_not == NULL &&
            costs[i].cost_ns < TRY_WITHIN * costs[best].cost_ns)
            return (kvc_way)i;
    return best;
}

kvc_way kvc_way_choose(kvc_client *client, const kvc_way_ask *ask)
{
    kvc_way_cost costs[KVC_WAY_COUNT];
    kvc_mutex_lock(&client->lock);
    kvc_way best = cheapest(client, ask, costs), way = best;
    kvc_way_why why = why_this(client, ask);
    if (best != KVC_WAY_COUNT && ++client->n_choices % TRY_EVERY == 0)
        way = retry_dear(costs, best);
    kvc_mutex_unlock(&client->lock);
    if (way == KVC_WAY_COUNT)
        return way;
    kvc_metric_add(rows[way].metric, 1);
    kvc_metric_add((kvc_metric)((int)rows[way].why + (int)(way == best ? why : KVC_WHY_TRIED)), 1);
    return way;
}

/* ---- round trips, measured at connect ----------------------------------------------------------
 */

typedef struct probe {
    kvc_context *context;
    const kvc_part *part;
    uint32_t n_q_heads;
    void *scratch; /* a row; q, o and lse of one query, all zeros to begin with */
    size_t scratch_bytes;
    kvc_region *region;
    uint64_t deadline_ns;
} probe;

/* One row that is not there: a round trip with nothing in it. */
static kvc_status probe_rows(kvc_client *client, const probe *p)
{
    static const uint32_t pick = 0;
    const kvc_pick_group group = {.context = p->context,
                                  .part = p->part->part,
                                  .row_bytes = p->part->row_bytes,
                                  .n_picks = 1,
                                  .picks = &pick};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_fetch(client, &group, 1, p->region, NULL, NULL, p->deadline_ns, &op);
    return status == KVC_OK ? kvc_op_wait(&op, 0) : status;
}

/* A query over no rows. */
static kvc_status probe_near(kvc_client *client, const probe *p)
{
    size_t n = (size_t)p->n_q_heads * p->part->q_dim * sizeof(float);
    uint8_t *at = p->scratch;
    const kvc_attend_group group = {.context = p->context,
                                    .part = p->part->part,
                                    .n_q = 1,
                                    .n_q_heads = p->n_q_heads,
                                    .dim = p->part->q_dim,
                                    .q_dtype = p->part->dtype,
                                    .o_dtype = p->part->dtype,
                                    .q = at,
                                    .o = at + n,
                                    .lse = (float *)(void *)(at + 2 * n)};
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_attend(client, &group, 1, NULL, NULL, p->deadline_ns, &op);
    return status == KVC_OK ? kvc_op_wait(&op, 0) : status;
}

static kvc_status run_probes(kvc_client *client, const probe *p)
{
    for (uint32_t i = 0; i < N_PROBES; i++) {
        kvc_status status = probe_rows(client, p);
        if (status != KVC_OK)
            return status;
    }
    for (uint32_t i = 0; i < N_PROBES; i++)
        if (probe_near(client, p) != KVC_OK)
            break; /* what it cannot do is asked again at each choice */
    return KVC_OK;
}

kvc_status kvc_way_probe(kvc_client *client, const kvc_digest *schema, const kvc_part *part,
                         uint32_t n_q_heads, uint64_t deadline_ns)
{
    size_t n = (size_t)n_q_heads * part->q_dim * sizeof(float);
    probe p = {.part = part, .n_q_heads = n_q_heads, .deadline_ns = deadline_ns};
    p.scratch_bytes = part->row_bytes + 2 * n + n_q_heads * sizeof(float);
    p.scratch = calloc(1, p.scratch_bytes);
    if (p.scratch == NULL)
        return kvci_fail(KVC_NO_MEMORY, "ways: no memory");
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = p.scratch,
                            .len_bytes = p.scratch_bytes,
                            .kind = KVC_MEMORY_HOST};
    kvc_status status = kvc_region_register(client, &desc, &p.region);
    if (status == KVC_OK)
        status = kvc_context_open(client, schema, NULL, 0, 0, deadline_ns, &p.context);
    if (status == KVC_OK)
        status = run_probes(client, &p);
    kvc_context_close(p.context);
    (void)kvc_region_deregister(client, p.region);
    free(p.scratch);
    return status;
}
