/*
 * context.c: the table of open contexts; see context.h.
 *
 * Any thread; the ticker sweeps. Invariants: a slot's generation changes whenever its context
 * leaves the table, so an old handle never finds a new context; the blocks of a context are held
 * in the index from open until the last reference goes.
 */
#include "context.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/fault.h"
#include "base/metrics.h"

#define PAUSE_NS        50000000 /* of a fault point */
#define SLOT_BITS       20u
#define GENERATION_BITS 20u
#define SLOT_MASK       ((1u << SLOT_BITS) - 1)
#define GENERATION_MASK ((1u << GENERATION_BITS) - 1)

static const char why_length[] = "the context would have more than max_context_blocks blocks";
static const char why_total[] = "all open contexts together have max_open_blocks blocks";
static const char why_tenant[] = "the tenant has max_contexts contexts open: close one";
static const char why_short[] = "the context has fewer blocks than n_blocks";
static const char why_closed[] = "the context was closed meanwhile";
static const char why_memory[] = "memory is out";
static const char why_before[] = "n_blocks_before is not the context's length, and the digests are "
                                 "not those that are there";

typedef struct slot_rec {
    kvs_context *context; /* NULL: free */
    uint32_t generation;  /* never 0 in use */
    uint32_t next_free;
} slot_rec;

typedef struct tenant_count {
    kvc_digest tenant;
    uint32_t n;
} tenant_count;

struct kvs_contexts {
    kvs_contexts_opts opts;
    kvc_mutex lock;                /* rank CONTEXT; guards all below and refs of every context */
    slot_rec *slots;               /* [KVS_CONTEXT_SLOTS], touched as needed */
    uint32_t n_slots, n_open;      /* slot numbers from 1 */
    uint32_t free_head, free_tail; /* the longest free slot goes first: its handles are oldest */
    tenant_count *tenants;
    uint32_t n_tenants;
    atomic_uint_least64_t n_blocks; /* in all contexts, by their n_counted */
};

kvs_contexts *kvs_contexts_create(const kvs_contexts_opts *opts)
{
    kvs_contexts *contexts = calloc(1, sizeof(*contexts));
    if (!contexts)
        return NULL;
    contexts->slots = calloc(KVS_CONTEXT_SLOTS, sizeof(*contexts->slots));
    if (!contexts->slots) {
        free(contexts);
        return NULL;
    }
    contexts->opts = *opts;
    contexts->n_slots = 1;
    kvc_mutex_init(&contexts->lock, KVC_RANK_CONTEXT);
    return contexts;
}

static uint32_t chunk_of(uint32_t i)
{
    return 25u - (uint32_t)__builtin_clz(i + KVS_CONTEXT_FIRST_BLOCKS);
}

static uint32_t chunk_first(uint32_t chunk)
{
    return (KVS_CONTEXT_FIRST_BLOCKS << chunk) - KVS_CONTEXT_FIRST_BLOCKS;
}

/* Counts n more blocks of the context. False: all together would have too many. */
static bool count_blocks(kvs_contexts *contexts, kvs_context *context, uint32_t n)
{
    if (atomic_fetch_add(&contexts->n_blocks, n) + n > contexts->opts.max_blocks) {
        atomic_fetch_sub(&contexts->n_blocks, n);
        return false;
    }
    context->n_counted += n;
    return true;
}

static void uncount_blocks(kvs_contexts *contexts, kvs_context *context, uint32_t n)
{
    context->n_counted -= n;
    atomic_fetch_sub(&contexts->n_blocks, n);
}

/* Gives the blocks back and frees; nobody references it any more. */
static void context_free(kvs_contexts *contexts, kvs_context *context)
{
    uint32_t n = atomic_load(&context->n_blocks);
    for (uint32_t c = 0; c < KVS_CONTEXT_CHUNKS && context->chunks[c]; c++) {
        uint32_t first = chunk_first(c), size = KVS_CONTEXT_FIRST_BLOCKS << c;
        if (first < n)
            kvs_index_drop_blocks(contexts->opts.index, context->chunks[c],
                                  n - first < size ? n - first : size);
        free(context->chunks[c]);
    }
    uncount_blocks(contexts, context, context->n_counted);
    kvs_schemas_put(contexts->opts.schemas, context->schema);
    kvc_mutex_fini(&context->grow_lock);
    free(context);
}

static tenant_count *tenant_locked(kvs_contexts *contexts, const kvc_digest *tenant)
{
    for (uint32_t i = 0; i < contexts->n_tenants; i++)
        if (kvc_digest_equal(&contexts->tenants[i].tenant, tenant))
            return &contexts->tenants[i];
    tenant_count *more =
        realloc(contexts->tenants, (contexts->n_tenants + 1) * sizeof(*contexts->tenants));
    if (!more)
        return NULL;
    contexts->tenants = more;
    more[contexts->n_tenants] = (tenant_count){.tenant = *tenant, .n = 0};
    return &more[contexts->n_tenants++];
}

/* Takes the context out of its slot, if it is still there. The caller drops the table's reference.
 */
static bool remove_locked(kvs_contexts *contexts, kvs_context *context)
{
    uint32_t number = (uint32_t)context->handle & SLOT_MASK;
    slot_rec *slot = &contexts->slots[number];
    if (slot->context != context)
        return false;
    slot->context = NULL;
    slot->generation = (slot->generation + 1) & GENERATION_MASK;
    if (slot->generation == 0)
        slot->generation = 1;
    slot->next_free = 0;
    if (contexts->free_head)
        contexts->slots[contexts->free_tail].next_free = number;
    else
        contexts->free_head = number;
    contexts->free_tail = number;
    contexts->n_open--;
    tenant_locked(contexts, &context->tenant)->n--;
    KVC_GAUGE_SUB(contexts_open, 1);
    return true;
}

void kvs_contexts_destroy(kvs_contexts *contexts)
{
    if (!contexts)
        return;
    kvs_contexts_sweep(contexts, UINT64_MAX);
    kvc_mutex_fini(&contexts->lock);
    free(contexts->tenants);
    free(contexts->slots);
    free(contexts);
}

/* Finds a slot and puts the context in; the handle follows from the slot. */
static kvc_status insert(kvs_contexts *contexts, kvs_context *context, const char **why_p)
{
    kvc_status status = KVC_NO_SPACE;
    *why_p = why_tenant;
    kvc_mutex_lock(&contexts->lock);
    tenant_count *tenant = tenant_locked(contexts, &context->tenant);
    if (!tenant) {
        status = KVC_NO_MEMORY;
        *why_p = why_memory;
    } else if (tenant->n < contexts->opts.max_per_tenant &&
               (contexts->free_head || contexts->n_slots < KVS_CONTEXT_SLOTS)) {
        uint32_t number = contexts->free_head;
        if (number)
            contexts->free_head = contexts->slots[number].next_free;
        else
            contexts->slots[number = contexts->n_slots++].generation = 1;
        slot_rec *slot = &contexts->slots[number];
        slot->context = context;
        context->handle = contexts->opts.boot_id << (SLOT_BITS + GENERATION_BITS) |
                          (uint64_t)slot->generation << SLOT_BITS | number;
        context->refs = 2;
        tenant->n++;
        contexts->n_open++;
        KVC_GAUGE_ADD(contexts_open, 1);
        status = KVC_OK;
    }
    kvc_mutex_unlock(&contexts->lock);
    return status;
}

/* Appends digests [n] behind the last block; the caller is the only one who does so. */
static kvc_status append(kvs_contexts *contexts, kvs_context *context, const kvc_digest *digests,
                         uint32_t n, const char **why_p)
{
    uint32_t have = atomic_load(&context->n_blocks);
    if (n > contexts->opts.max_context_blocks - have) {
        *why_p = why_length;
        return KVC_INVALID;
    }
    if (!count_blocks(contexts, context, n)) {
        *why_p = why_total;
        return KVC_NO_SPACE;
    }
    uint32_t done = 0;
    while (done < n) {
        uint32_t c = chunk_of(have + done), at = have + done - chunk_first(c);
        uint32_t room = (KVS_CONTEXT_FIRST_BLOCKS << c) - at;
        uint32_t step = n - done < room ? n - done : room;
        if (!context->chunks[c])
            context->chunks[c] = malloc((KVS_CONTEXT_FIRST_BLOCKS << c) * sizeof(uint32_t));
        if (!context->chunks[c] ||
            kvs_index_hold_blocks(contexts->opts.index, context->schema, digests + done, step,
                                  context->chunks[c] + at) != KVC_OK)
            goto err_blocks;
        done += step;
    }
    atomic_store(&context->n_blocks, have + n);
    return KVC_OK;
err_blocks:
    for (uint32_t i = have; i < have + done; i++) {
        uint32_t block = kvs_context_block(context, i);
        kvs_index_drop_blocks(contexts->opts.index, &block, 1);
    }
    uncount_blocks(contexts, context, n);
    *why_p = why_memory;
    return KVC_NO_MEMORY;
}

/* Shares the first n blocks of from, which its referencer keeps, with a context that has none; who
   counts them is the caller's affair. */
static bool share(kvs_contexts *contexts, kvs_context *context, const kvs_context *from, uint32_t n)
{
    for (uint32_t c = 0; c < KVS_CONTEXT_CHUNKS && chunk_first(c) < n; c++) {
        uint32_t size = KVS_CONTEXT_FIRST_BLOCKS << c, left = n - chunk_first(c);
        uint32_t step = left < size ? left : size;
        context->chunks[c] = malloc(size * sizeof(uint32_t));
        if (!context->chunks[c])
            return false;
        memcpy(context->chunks[c], from->chunks[c], step * sizeof(uint32_t));
        kvs_index_share_blocks(contexts->opts.index, context->chunks[c], step);
        atomic_store(&context->n_blocks, chunk_first(c) + step);
    }
    return true;
}

static kvc_status share_counted(kvs_contexts *contexts, kvs_context *context,
                                const kvs_context *from, uint32_t n, const char **why_p)
{
    *why_p = why_total;
    if (!count_blocks(contexts, context, n))
        return KVC_NO_SPACE;
    *why_p = why_memory;
    return share(contexts, context, from, n) ? KVC_OK : KVC_NO_MEMORY;
}

/* An object in no slot, without blocks; NULL: no memory. */
static kvs_context *create(const kvs_contexts *contexts, const kvs_schema *schema, uint64_t ttl_ns)
{
    kvs_context *context = calloc(1, sizeof(*context));
    if (!context)
        return NULL;
    context->schema = schema;
    kvs_schemas_hold(contexts->opts.schemas, schema);
    context->tenant = schema->tenant;
    context->ttl_ns = ttl_ns == 0 ? contexts->opts.default_ttl_ns : ttl_ns;
    if (context->ttl_ns > contexts->opts.max_ttl_ns)
        context->ttl_ns = contexts->opts.max_ttl_ns;
    atomic_store(&context->expires_ns, kvc_deadline_ns(context->ttl_ns));
    kvc_mutex_init(&context->grow_lock, KVC_RANK_GROW);
    return context;
}

/* Digests [n] or, where from is not NULL, its first n blocks. */
static kvc_status open_with(kvs_contexts *contexts, const kvs_schema *schema,
                            const kvc_digest *digests, const kvs_context *from, uint32_t n,
                            uint64_t ttl_ns, kvs_context **context_p, const char **why_p)
{
    *context_p = NULL;
    *why_p = why_memory;
    kvs_context *context = create(contexts, schema, ttl_ns);
    if (!context)
        return KVC_NO_MEMORY;
    kvc_status status = from ? share_counted(contexts, context, from, n, why_p)
                             : append(contexts, context, digests, n, why_p);
    if (status == KVC_OK)
        status = insert(contexts, context, why_p);
    if (status != KVC_OK) {
        context_free(contexts, context);
        return status;
    }
    *context_p = context;
    return KVC_OK;
}

kvc_status kvs_context_open(kvs_contexts *contexts, const kvs_schema *schema,
                            const kvc_digest *digests, uint32_t n, uint64_t ttl_ns,
                            kvs_context **context_p, const char **why_p)
{
    return open_with(contexts, schema, digests, NULL, n, ttl_ns, context_p, why_p);
}

kvc_status kvs_context_fork(kvs_contexts *contexts, const kvs_context *from, uint32_t n,
                            uint64_t ttl_ns, kvs_context **context_p, const char **why_p)
{
    uint32_t have = atomic_load(&from->n_blocks);
    *context_p = NULL;
    *why_p = why_short;
    if (n > have)
        return KVC_INVALID;
    return open_with(contexts, from->schema, NULL, from, n ? n : have, ttl_ns, context_p, why_p);
}

/* Puts context where old stands, under the same handle. False: old stands there no more. */
static bool replace(kvs_contexts *contexts, kvs_context *old, kvs_context *context)
{
    kvc_mutex_lock(&contexts->lock);
    slot_rec *slot = &contexts->slots[(uint32_t)old->handle & SLOT_MASK];
    bool there = slot->context == old;
    if (there) {
        KVC_ASSERT(old->refs > 1);
        old->refs--;
        context->handle = old->handle;
        context->refs = 1;
        slot->context = context;
        /* A cut needs no room: the count of what stays goes along. The old object's blocks last no
           longer than the calls that have it. */
        context->n_counted = atomic_load(&context->n_blocks);
        old->n_counted -= context->n_counted;
        uncount_blocks(contexts, old, old->n_counted);
    }
    kvc_mutex_unlock(&contexts->lock);
    return there;
}

static kvc_status truncate_locked(kvs_contexts *contexts, kvs_context *old, uint32_t n,
                                  const char **why_p)
{
    uint32_t have = atomic_load(&old->n_blocks);
    *why_p = why_short;
    if (n >= have)
        return n == have ? KVC_OK : KVC_INVALID;
    *why_p = why_memory;
    kvs_context *context = create(contexts, old->schema, old->ttl_ns);
    if (!context)
        return KVC_NO_MEMORY;
    kvc_status status = share(contexts, context, old, n) ? KVC_OK : KVC_NO_MEMORY;
    if (status == KVC_OK && !replace(contexts, old, context)) {
        *why_p = why_closed;
        status = KVC_STALE_HANDLE;
    }
    if (status == KVC_OK)
        old->replaced = true;
    else
        context_free(contexts, context);
    return status;
}

kvc_status kvs_context_truncate(kvs_contexts *contexts, kvs_context *context, uint32_t n,
                                const char **why_p)
{
    kvc_mutex_lock(&context->grow_lock);
    kvc_status status =
        context->replaced ? KVC_AGAIN : truncate_locked(contexts, context, n, why_p);
    kvc_mutex_unlock(&context->grow_lock);
    return status;
}

kvc_status kvs_context_get(kvs_contexts *contexts, const kvc_digest *tenant, uint64_t handle,
                           kvs_context **context_p)
{
    uint32_t number = (uint32_t)handle & SLOT_MASK;
    uint64_t now_ns = kvc_now_ns();
    *context_p = NULL;
    kvc_mutex_lock(&contexts->lock);
    kvs_context *context = number < contexts->n_slots ? contexts->slots[number].context : NULL;
    if (context && context->handle == handle && kvc_digest_equal(&context->tenant, tenant) &&
        atomic_load(&context->expires_ns) > now_ns) {
        context->refs++;
        atomic_store(&context->expires_ns, kvc_deadline_ns(context->ttl_ns));
        *context_p = context;
    }
    kvc_mutex_unlock(&contexts->lock);
    if (!*context_p)
        KVC_COUNT(handles_stale);
    return *context_p ? KVC_OK : KVC_STALE_HANDLE;
}

void kvs_context_put(kvs_contexts *contexts, kvs_context *context)
{
    kvc_mutex_lock(&contexts->lock);
    KVC_ASSERT(context->refs > 0);
    bool last = --context->refs == 0;
    kvc_mutex_unlock(&contexts->lock);
    if (last)
        context_free(contexts, context);
}

kvc_status kvs_context_extend(kvs_contexts *contexts, kvs_context *context, uint32_t n_before,
                              const kvc_digest *digests, uint32_t n, const char **why_p)
{
    kvc_status status;
    kvc_mutex_lock(&context->grow_lock);
    uint32_t have = atomic_load(&context->n_blocks);
    if (context->replaced) {
        status = KVC_AGAIN;
    } else if (n_before == have) {
        status = append(contexts, context, digests, n, why_p);
    } else {
        bool same = n_before < have && n <= have - n_before;
        for (uint32_t i = 0; same && i < n; i++)
            same = kvs_index_block_is(contexts->opts.index,
                                      kvs_context_block(context, n_before + i), &digests[i]);
        status = same ? KVC_OK : KVC_INVALID;
        *why_p = why_before;
    }
    kvc_mutex_unlock(&context->grow_lock);
    return status;
}

void kvs_context_close(kvs_contexts *contexts, kvs_context *context)
{
    kvs_context *there = NULL;
    if (KVC_FAULT("context.close"))
        nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
    kvc_mutex_lock(&contexts->lock);
    kvs_context *now = contexts->slots[(uint32_t)context->handle & SLOT_MASK].context;
    /* A truncate may have put another object under the handle since it was looked up. */
    if (now && now->handle == context->handle && remove_locked(contexts, now))
        there = now;
    kvc_mutex_unlock(&contexts->lock);
    if (there)
        kvs_context_put(contexts, there);
}

uint32_t kvs_contexts_sweep(kvs_contexts *contexts, uint64_t now_ns)
{
    uint32_t n = 0;
    for (uint32_t number = 1;; number++) {
        kvs_context *gone = NULL;
        kvc_mutex_lock(&contexts->lock);
        bool end = number >= contexts->n_slots;
        if (!end) {
            gone = contexts->slots[number].context;
            if (gone && atomic_load(&gone->expires_ns) > now_ns)
                gone = NULL;
            if (gone)
                remove_locked(contexts, gone);
        }
        kvc_mutex_unlock(&contexts->lock);
        if (end)
            return n;
        if (gone) {
            kvs_context_put(contexts, gone);
            n++;
        }
    }
}
