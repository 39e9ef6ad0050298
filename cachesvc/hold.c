/*
 * hold.c: the table of holds, and Hold and Release; see hold.h.
 *
 * Any thread; the ticker sweeps. Invariants: a hold in the list keeps its blocks in the index, once
 * each as a context would and once as held; n_blocks is their sum. The list is walked, since a
 * server has few holds and looks one up only to renew or release it.
 */
#include "hold.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/metrics.h"
#include "request.h"

typedef struct hold {
    struct hold *next;
    uint64_t handle, ttl_ns, expires_ns;
    const kvs_schema *schema;
    uint32_t n_blocks;
    uint32_t blocks[];
} hold;

struct kvs_holds {
    kvs_holds_opts opts;
    kvc_mutex lock; /* rank CONTEXT; guards all below; never held with a context's */
    hold *list;
    uint32_t next_number;
    uint64_t n_blocks;
};

kvs_holds *kvs_holds_create(const kvs_holds_opts *opts)
{
    kvs_holds *holds = calloc(1, sizeof(*holds));
    if (!holds)
        return NULL;
    holds->opts = *opts;
    kvc_mutex_init(&holds->lock, KVC_RANK_CONTEXT);
    return holds;
}

/* Gives up the blocks of a hold that is in no list. */
static void let_go(kvs_holds *holds, hold *h)
{
    kvs_index_unhold(holds->opts.index, h->blocks, h->n_blocks);
    kvs_index_drop_blocks(holds->opts.index, h->blocks, h->n_blocks);
    KVC_GAUGE_SUB(holds, 1);
    kvs_schemas_put(holds->opts.schemas, h->schema);
    free(h);
}

/* Cuts the first hold that is due, or that has this handle, out of the list; NULL: there is none.
 */
static hold *cut(kvs_holds *holds, const kvc_digest *tenant, uint64_t handle, uint64_t now_ns)
{
    hold *found = NULL;
    kvc_mutex_lock(&holds->lock);
    for (hold **link = &holds->list; *link && !found; link = found ? link : &(*link)->next) {
        hold *h = *link;
        bool hit = tenant ? h->handle == handle && kvc_digest_equal(&h->schema->tenant, tenant)
                          : h->expires_ns <= now_ns;
        if (!hit)
            continue;
        found = h;
        *link = h->next;
        holds->n_blocks -= h->n_blocks;
    }
    kvc_mutex_unlock(&holds->lock);
    return found;
}

uint32_t kvs_holds_sweep(kvs_holds *holds, uint64_t now_ns)
{
    uint32_t n = 0;
    for (hold *h; (h = cut(holds, NULL, 0, now_ns)) != NULL; n++)
        let_go(holds, h);
    return n;
}

void kvs_holds_destroy(kvs_holds *holds)
{
    if (!holds)
        return;
    (void)kvs_holds_sweep(holds, UINT64_MAX);
    kvc_mutex_fini(&holds->lock);
    free(holds);
}

static uint64_t ttl_of(const kvs_holds *holds, uint64_t ttl_ns)
{
    if (ttl_ns == 0)
        ttl_ns = holds->opts.default_ttl_ns;
    return ttl_ns < holds->opts.max_ttl_ns ? ttl_ns : holds->opts.max_ttl_ns;
}

/* Numbers the hold and lists it. NO_SPACE: too many of the tenant, or too many blocks. */
static kvc_status list(kvs_holds *holds, hold *h, const char **why_p)
{
    uint32_t n = 0;
    kvc_mutex_lock(&holds->lock);
    for (const hold *other = holds->list; other; other = other->next)
        n += kvc_digest_equal(&other->schema->tenant, &h->schema->tenant);
    bool many = n >= holds->opts.max_per_tenant;
    bool large = holds->n_blocks + h->n_blocks > holds->opts.max_blocks;
    if (!many && !large) {
        h->handle = holds->opts.boot_id << 32 | ++holds->next_number;
        h->next = holds->list;
        holds->list = h;
        holds->n_blocks += h->n_blocks;
    }
    kvc_mutex_unlock(&holds->lock);
    *why_p = many ? "the tenant has max_contexts holds: release one"
                  : "all holds together have max_open_blocks blocks";
    return many || large ? KVC_NO_SPACE : KVC_OK;
}

static hold *hold_create(kvs_holds *holds, const kvs_schema *schema, uint32_t n, uint64_t ttl_ns)
{
    hold *h = malloc(sizeof(*h) + n * sizeof(uint32_t));
    if (!h)
        return NULL;
    *h = (hold){.schema = schema, .ttl_ns = ttl_of(holds, ttl_ns), .n_blocks = n};
    h->expires_ns = kvc_deadline_ns(h->ttl_ns);
    return h;
}

/* Takes a hold whose blocks the index keeps as a context's; they are held from now on, and it is
   listed, or gone. */
static kvc_status hold_begin(kvs_holds *holds, hold *h, kvs_hold_info *info_p, const char **why_p)
{
    kvc_status status =
        kvs_index_hold(holds->opts.index, h->schema, h->blocks, h->n_blocks, &info_p->tenant_bytes);
    if (status != KVC_OK) {
        *why_p = "max_hold_bytes";
        kvs_index_drop_blocks(holds->opts.index, h->blocks, h->n_blocks);
        free(h);
        return status;
    }
    KVC_GAUGE_ADD(holds, 1);
    kvs_schemas_hold(holds->opts.schemas, h->schema);
    info_p->ttl_ns = h->ttl_ns;
    info_p->n_blocks = h->n_blocks;
    status = list(holds, h, why_p);
    if (status == KVC_OK)
        info_p->hold = h->handle; /* numbered for good, though it may be gone by now */
    else
        let_go(holds, h);
    return status;
}

kvc_status kvs_hold_add(kvs_holds *holds, const kvs_context *context, uint64_t ttl_ns,
                        kvs_hold_info *info_p, const char **why_p)
{
    uint32_t n = atomic_load(&context->n_blocks);
    memset(info_p, 0, sizeof(*info_p));
    *why_p = "memory is out";
    hold *h = hold_create(holds, context->schema, n, ttl_ns);
    if (!h)
        return KVC_NO_MEMORY;
    for (uint32_t i = 0; i < n; i++)
        h->blocks[i] = kvs_context_block(context, i);
    kvs_index_share_blocks(holds->opts.index, h->blocks, n);
    return hold_begin(holds, h, info_p, why_p);
}

kvc_status kvs_hold_add_named(kvs_holds *holds, const kvs_schema *schema, const kvc_digest *digests,
                              uint32_t n, uint64_t ttl_ns, kvs_hold_info *info_p,
                              const char **why_p)
{
    memset(info_p, 0, sizeof(*info_p));
    *why_p = "memory is out";
    hold *h = hold_create(holds, schema, n, ttl_ns);
    if (!h)
        return KVC_NO_MEMORY;
    if (kvs_index_hold_blocks(holds->opts.index, schema, digests, n, h->blocks) != KVC_OK) {
        free(h);
        return KVC_NO_MEMORY;
    }
    return hold_begin(holds, h, info_p, why_p);
}

kvc_status kvs_hold_renew(kvs_holds *holds, const kvc_digest *tenant, uint64_t handle,
                          uint64_t ttl_ns, kvs_hold_info *info_p)
{
    const kvs_schema *schema = NULL;
    kvc_mutex_lock(&holds->lock);
    for (hold *h = holds->list; h && !schema; h = h->next) {
        if (h->handle != handle || !kvc_digest_equal(&h->schema->tenant, tenant))
            continue;
        schema = h->schema;
        kvs_schemas_hold(holds->opts.schemas, schema); /* the hold may go when the lock does */
        h->ttl_ns = ttl_of(holds, ttl_ns);
        h->expires_ns = kvc_deadline_ns(h->ttl_ns);
        *info_p = (kvs_hold_info){.hold = handle, .ttl_ns = h->ttl_ns, .n_blocks = h->n_blocks};
    }
    kvc_mutex_unlock(&holds->lock);
    if (schema)
        info_p->tenant_bytes = kvs_index_held(holds->opts.index, schema);
    kvs_schemas_put(holds->opts.schemas, schema);
    return schema ? KVC_OK : KVC_NOT_FOUND;
}

kvc_status kvs_hold_release(kvs_holds *holds, const kvc_digest *tenant, uint64_t handle)
{
    hold *h = cut(holds, tenant, handle, 0);
    if (h)
        let_go(holds, h);
    return h ? KVC_OK : KVC_NOT_FOUND;
}

/* ---- the calls ------------------------------------------------------------------------------- */

static void answer_hold(kvs_server *server, kvt_call *call, const kvs_hold_info *info)
{
    kvc_reply reply = {.method = KVC_HOLD};
    reply.u.hold.hold = info->hold;
    reply.u.hold.ttl_ms = info->ttl_ns / 1000000;
    reply.u.hold.n_blocks = info->n_blocks;
    reply.u.hold.tenant_bytes = info->tenant_bytes;
    reply.u.hold.max_bytes = server->index->max_held;
    kvs_answer(call, &reply, NULL, 0);
}

static void fail_unknown(kvt_call *call, uint64_t handle)
{
    kvs_fail(call, KVC_NOT_FOUND,
             "hold %016llx is not here: released, run out, or the server was restarted",
             (unsigned long long)handle);
}

/* What the call names: a context, or blocks of a schema. False after kvs_fail. */
static bool add_wanted(kvs_server *server, kvt_call *call, const kvc_digest *tenant,
                       kvs_hold_info *info_p, const char **why_p, kvc_status *status_p)
{
    uint64_t ttl_ns = kvs_ttl_ns(call->req.u.hold.ttl_ms);
    if (call->req.u.hold.n_digests) {
        const kvs_schema *schema = kvs_want_schema(server, call, tenant, &call->req.u.hold.schema);
        if (schema)
            *status_p = kvs_hold_add_named(server->holds, schema, call->req.u.hold.digests,
                                           call->req.u.hold.n_digests, ttl_ns, info_p, why_p);
        return schema != NULL;
    }
    kvs_context *context = kvs_want_context(server, call, tenant, call->req.u.hold.context);
    if (!context)
        return false;
    *status_p = kvs_hold_add(server->holds, context, ttl_ns, info_p, why_p);
    kvs_context_put(server->contexts, context);
    return true;
}

static void hold_new(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    const char *why;
    kvs_hold_info info;
    kvc_status status;
    if (!add_wanted(server, call, tenant, &info, &why, &status))
        return;
    if (status == KVC_OK)
        answer_hold(server, call, &info);
    else if (status == KVC_NO_SPACE && info.ttl_ns == 0)
        kvs_fail(call, status,
                 "the tenant holds %llu bytes; with these it would pass max_hold_bytes, %llu, or "
                 "all tenants theirs, or they need more segments of dram than that: release a hold",
                 (unsigned long long)info.tenant_bytes,
                 (unsigned long long)server->index->max_held);
    else
        kvs_fail(call, status, "%s", why);
}

void kvs_on_hold(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    uint64_t handle = call->req.u.hold.hold;
    bool named = call->req.u.hold.n_digests > 0;
    kvs_hold_info info;
    if ((handle != 0) + (call->req.u.hold.context != 0) + named > 1)
        kvs_fail(call, KVC_INVALID, "either a context or blocks to hold, or a hold to renew");
    else if (!handle)
        hold_new(server, call, tenant);
    else if (kvs_hold_renew(server->holds, tenant, handle, kvs_ttl_ns(call->req.u.hold.ttl_ms),
                            &info) == KVC_OK)
        answer_hold(server, call, &info);
    else
        fail_unknown(call, handle);
}

void kvs_on_release(kvs_server *server, kvt_call *call, const kvc_digest *tenant)
{
    kvc_reply reply = {.method = KVC_RELEASE};
    if (kvs_hold_release(server->holds, tenant, call->req.u.release.hold) == KVC_OK)
        kvs_answer(call, &reply, NULL, 0);
    else
        fail_unknown(call, call->req.u.release.hold);
}
