/*
 * ways.h: how the attention of a step reaches its rows: what each way of a client's connection
 * costs, which is the cheapest, and why it is taken. A part of client.h, which includes it.
 */
#ifndef KVC_WAYS_H
#define KVC_WAYS_H

#include <stdint.h>

#include "kvc/types.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct kvc_client kvc_client;

/* A row of client/ways.def each. */
typedef enum kvc_way {
    KVC_WAY_ROWS = 0, /* kvc_fetch through messages */
    KVC_WAY_NEAR,     /* kvc_attend */
    KVC_WAY_SHM,      /* kvc_fetch on a shm:// connection */
    KVC_WAY_RDMA,     /* kvc_fetch on an rdma:// connection */
    KVC_WAY_COUNT,
} kvc_way;

/* Why it is this one; each a metric way_<way>_<why>. */
typedef enum kvc_way_why {
    KVC_WHY_CHEAPEST = 0, /* it costs least of several that are possible */
    KVC_WHY_ONLY,         /* none other is possible */
    KVC_WHY_TRIED,        /* it looks dear, and is measured again */
    KVC_WHY_ASKED,        /* the user asked for it */
    KVC_WHY_EXACT,        /* another one is possible, but it rounds, which the user refused */
    KVC_WHY_BROKEN,       /* another one failed */
    KVC_WHY_BUSY,         /* the server attends too much already */
    KVC_WHY_REST,         /* what a server that attended has left over */
    KVC_WHY_COUNT,
} kvc_way_why;

/* What a request would move; 0 for what is not known. */
typedef struct kvc_way_ask {
    uint32_t n_rows, row_bytes, n_q;
    uint64_t q_bytes, o_bytes; /* of the queries, of the results, where the server attends */
    double reuse;        /* how often a fetched row will be used again without being fetched */
    uint32_t refused;    /* bits 1 << kvc_way of ways that the caller cannot go or has tried */
    kvc_way_why because; /* of ASKED on: why it refuses them; CHEAPEST: for no such reason */
} kvc_way_ask;

typedef struct kvc_way_cost {
    const char *name;         /* "rows", "near", "shm", "rdma" */
    const char *why_not;      /* static; NULL: possible */
    double fixed_ns, byte_ns; /* of a request; of a byte of rows */
    double cost_ns; /* of what was asked, rows counted at 1 / (1 + reuse), q and o as they cross */
    uint64_t samples; /* requests that it was learnt from; 0: a guess */
} kvc_way_cost;

const char *kvc_way_name(kvc_way way); /* "rows" and so on; NULL past the last */
const char *kvc_way_why_name(kvc_way_why why);
/*
 * What each way of this client's connection would cost: costs [KVC_WAY_COUNT]. Learnt from every
 * kvc_fetch, kvc_fetch_blocks and kvc_attend that went well, newer ones counting more. Returns the
 * cheapest that is possible, or KVC_WAY_COUNT where none is. *why_p (may be NULL): the reason. Does
 * not block.
 */
kvc_way kvc_way_costs(kvc_client *client, const kvc_way_ask *ask, kvc_way_cost *costs,
                      kvc_way_why *why_p);
/* The same, as a request is about to be made: now and then a way that looks dear is tried, so that
 * what was dear once is measured again, and the choice is counted with its reason. */
kvc_way kvc_way_choose(kvc_client *client, const kvc_way_ask *ask);
/*
 * Measures the round trips of the ways that this connection has, by a few requests over part `part`
 * (dim, heads and dtype as the schema has them) of an empty context. Blocks. A way that fails is
 * not learnt; OK as long as the server answers.
 */
kvc_status kvc_way_probe(kvc_client *client, const kvc_digest *schema, const kvc_part *part,
                         uint32_t n_q_heads, uint64_t deadline_ns) KVC_MUST_CHECK;

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
