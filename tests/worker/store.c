/*
 * store.c: see store.h. The lock is a leaf: it is never held across a reply.
 */
#include "store.h"

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"

#define NS_PER_MS 1000000ull

uint32_t store_max_digests = KVC_MAX_DIGESTS;

static void reply_ok(kvt_call *call, const kvc_reply *reply)
{
    kvt_call_reply(call, KVC_OK, NULL, 0, reply, NULL, 0);
}

static void reply_error(kvt_call *call, kvc_status status, const char *why)
{
    kvt_call_reply(call, status, why, 0, NULL, NULL, 0);
}

static void answer_describe(kvt_call *call)
{
    kvc_reply reply = {.method = KVC_DESCRIBE};
    reply.u.describe.version = "test store";
    reply.u.describe.boot_id = 1;
    reply.u.describe.limits = (kvc_limits){
        .max_value_bytes = KVC_MAX_VALUE_BYTES,
        .max_message_bytes = 1u << 18,
        .max_batch_values = 16,
        .max_digests = store_max_digests,
        .max_context_blocks = KVC_MAX_CONTEXT_BLOCKS,
        .max_picks = KVC_MAX_PICKS,
        .max_groups = KVC_MAX_GROUPS,
        .max_contexts = 256,
        .max_ttl_ms = 1000000,
    };
    reply_ok(call, &reply);
}

static void answer_register(store *s, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_REGISTER_SCHEMA};
    const kvc_schema *schema = call->req.u.register_schema.schema;
    kvc_status st = kvc_schema_digest(schema, &reply.u.register_schema.digest);
    kvc_mutex_lock(&s->lock);
    free(s->schema);
    s->schema = kvc_schema_copy(schema);
    kvc_mutex_unlock(&s->lock);
    kvt_call_reply(call, st, NULL, 0, &reply, NULL, 0);
}

/* Under the lock. */
static const store_value *find(const store *s, const kvc_digest *digest, uint32_t part)
{
    for (uint32_t i = 0; i < s->n_values; i++)
        if (s->values[i].part == part && kvc_digest_equal(&s->values[i].digest, digest))
            return &s->values[i];
    return NULL;
}

/* Copies len bytes at off of the scattered payload. */
static void copy_payload(const kvc_request *req, uint64_t off, uint8_t *out, size_t len)
{
    for (uint32_t i = 0; i < req->n_data && len > 0; i++) {
        size_t n = req->data[i].iov_len;
        if (off >= n) {
            off -= n;
            continue;
        }
        size_t take = n - off < len ? n - off : len;
        memcpy(out, (const uint8_t *)req->data[i].iov_base + off, take);
        out += take;
        len -= take;
        off = 0;
    }
    KVC_ASSERT(len == 0);
}

static void keep(store *s, const kvc_request *req, const kvc_put_value *value, uint64_t off)
{
    if (s->n_values == s->cap_values) {
        s->cap_values = s->cap_values * 2 + 64;
        s->values = realloc(s->values, s->cap_values * sizeof(*s->values));
        KVC_ASSERT(s->values != NULL);
    }
    uint32_t part = 0;
    while (part < s->schema->n_parts && s->schema->parts[part].part != value->part)
        part++;
    KVC_ASSERT(part < s->schema->n_parts);
    store_value *v = &s->values[s->n_values++];
    v->digest = value->digest;
    v->part = value->part;
    v->row_bytes = s->schema->parts[part].row_bytes;
    KVC_ASSERT(value->len_bytes == v->row_bytes * s->schema->block_tokens);
    v->bytes = malloc(value->len_bytes);
    KVC_ASSERT(v->bytes != NULL);
    copy_payload(req, off, v->bytes, value->len_bytes);
}

static kvc_status judge(store *s, const kvc_put_value *value)
{
    if (s->faults.put_status != KVC_OK)
        return s->faults.put_status;
    s->n_offered++;
    if (s->faults.again_every != 0 && s->n_offered % s->faults.again_every == 0) {
        s->n_again++;
        return KVC_AGAIN;
    }
    return find(s, &value->digest, value->part) != NULL ? KVC_EXISTS : KVC_OK;
}

static void answer_put(store *s, kvt_call *call)
{
    const kvc_request *req = &call->req;
    uint32_t n = req->u.put_blocks.n_values;
    int8_t *status = kvc_arena_calloc(&call->arena, n, 1);
    KVC_ASSERT(status != NULL);
    uint64_t off = 0;
    kvc_mutex_lock(&s->lock);
    s->n_puts++;
    bool again = s->faults.again_calls > 0;
    s->faults.again_calls -= again;
    for (uint32_t i = 0; i < n && !again; i++) {
        const kvc_put_value *value = &req->u.put_blocks.values[i];
        status[i] = (int8_t)judge(s, value);
        if (status[i] == KVC_OK)
            keep(s, req, value, off);
        off += value->len_bytes;
    }
    kvc_mutex_unlock(&s->lock);
    if (again) {
        reply_error(call, KVC_AGAIN, "full");
        return;
    }
    kvc_reply reply = {.method = KVC_PUT_BLOCKS};
    reply.u.put_blocks.n_values = n;
    reply.u.put_blocks.status = status;
    reply_ok(call, &reply);
}

static void answer_match(store *s, kvt_call *call)
{
    const kvc_request *req = &call->req;
    kvc_reply reply = {.method = KVC_MATCH_PREFIX};
    kvc_mutex_lock(&s->lock);
    uint32_t hits = 0;
    for (bool all = true; all && hits < req->u.match_prefix.n_digests; hits += all)
        for (uint32_t p = 0; p < req->u.match_prefix.n_parts; p++)
            all = all &&
                  find(s, &req->u.match_prefix.digests[hits], req->u.match_prefix.parts[p]) != NULL;
    kvc_mutex_unlock(&s->lock);
    reply.u.match_prefix.hits = hits;
    reply_ok(call, &reply);
}

static void grow(store_context *c, const kvc_digest *digests, uint32_t n)
{
    if (n == 0)
        return;
    c->digests = realloc(c->digests, (c->n + n) * sizeof(*digests));
    KVC_ASSERT(c->digests != NULL);
    memcpy(c->digests + c->n, digests, n * sizeof(*digests));
    c->n += n;
}

static void answer_open(store *s, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_OPEN_CONTEXT};
    kvc_mutex_lock(&s->lock);
    KVC_ASSERT(s->n_contexts < 256);
    store_context *c = &s->contexts[s->n_contexts++];
    grow(c, call->req.u.open_context.digests, call->req.u.open_context.n_digests);
    reply.u.open_context.context = s->n_contexts;
    reply.u.open_context.ttl_ms = 1000000;
    kvc_mutex_unlock(&s->lock);
    reply_ok(call, &reply);
}

static void answer_extend(store *s, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_EXTEND_CONTEXT};
    const kvc_request *req = &call->req;
    kvc_mutex_lock(&s->lock);
    bool fail = s->faults.extend_failures > 0;
    s->faults.extend_failures -= fail;
    store_context *c = &s->contexts[req->u.extend_context.context - 1];
    bool fits = req->u.extend_context.n_blocks_before == c->n;
    if (fits && !fail)
        grow(c, req->u.extend_context.digests, req->u.extend_context.n_digests);
    kvc_mutex_unlock(&s->lock);
    if (fail)
        reply_error(call, KVC_IO, "as the test says");
    else if (!fits)
        reply_error(call, KVC_INVALID, "another length");
    else
        reply_ok(call, &reply);
}

/* Under the lock: the row, or NULL. */
static const uint8_t *find_row(const store *s, const kvc_row_group *g, uint32_t pos,
                               uint32_t *row_bytes_p)
{
    const store_context *c = &s->contexts[g->context - 1];
    uint32_t bt = s->schema->block_tokens;
    if (pos / bt >= c->n)
        return NULL;
    if (s->faults.lose_every != 0 && g->part >= s->faults.lose_from_part && g->part % 2000 < 1000 &&
        pos % s->faults.lose_every == 0)
        return NULL;
    const store_value *v = find(s, &c->digests[pos / bt], g->part);
    if (v == NULL)
        return NULL;
    *row_bytes_p = v->row_bytes;
    return v->bytes + (size_t)(pos % bt) * v->row_bytes;
}

static uint32_t count_picks(const kvc_request *req)
{
    uint32_t n = 0;
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++)
        n += req->u.fetch_rows.groups[g].n_picks;
    return n;
}

static void answer_fetch(store *s, kvt_call *call)
{
    const kvc_request *req = &call->req;
    uint32_t n = count_picks(req), n_missing = 0, index = 0;
    kvc_missing_row *missing = kvc_arena_calloc(&call->arena, n + 1, sizeof(*missing));
    uint8_t *data = malloc((size_t)n * 65536u + 1u);
    KVC_ASSERT(missing != NULL && data != NULL);
    size_t len = 0;
    kvc_mutex_lock(&s->lock);
    s->n_fetches++;
    s->n_rows += n;
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++) {
        for (uint32_t i = 0; i < req->u.fetch_rows.groups[g].n_picks; i++, index++) {
            uint32_t row_bytes = 0;
            const uint8_t *row = find_row(s, &req->u.fetch_rows.groups[g],
                                          req->u.fetch_rows.groups[g].picks[i], &row_bytes);
            if (row == NULL) {
                missing[n_missing++] = (kvc_missing_row){.index = index, .status = KVC_NOT_FOUND};
                continue;
            }
            memcpy(data + len, row, row_bytes);
            len += row_bytes;
        }
    }
    kvc_mutex_unlock(&s->lock);
    kvc_reply reply = {.method = KVC_FETCH_ROWS};
    reply.u.fetch_rows.n_missing = n_missing;
    reply.u.fetch_rows.missing = missing;
    reply.u.fetch_rows.rows_dram = n - n_missing;
    const kvt_slice slice = {.base = data, .len_bytes = len, .release = free, .arg = data};
    if (len == 0)
        free(data);
    kvt_call_reply(call, KVC_OK, NULL, 0, &reply, &slice, len == 0 ? 0 : 1);
}

/* The end of the stream. */
static void blocks_sent(kvt_call *call, bool ok)
{
    if (ok)
        reply_ok(call, &(kvc_reply){.method = KVC_FETCH_BLOCKS});
    else
        reply_error(call, KVC_CANCELLED, "nobody listens");
}

/* All values in one message; of kv parts none where rows are to be lost. */
static void answer_blocks(store *s, kvt_call *call)
{
    const kvc_request *req = &call->req;
    uint32_t n_parts = req->u.fetch_blocks.n_parts, n = req->u.fetch_blocks.n_digests * n_parts;
    kvc_block_value *values = kvc_arena_calloc(&call->arena, n, sizeof(*values));
    uint8_t *data = malloc((size_t)n * 65536u + 1u);
    kvc_reply reply = {.method = KVC_FETCH_BLOCKS};
    size_t len = 0;
    KVC_ASSERT(values != NULL && data != NULL);
    kvc_mutex_lock(&s->lock);
    s->n_fetches++;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t part = req->u.fetch_blocks.parts[i % n_parts];
        const store_value *v = find(s, &req->u.fetch_blocks.digests[i / n_parts], part);
        bool lost = s->faults.lose_every != 0 && part % 2000 < 1000;
        values[i] = (kvc_block_value){.block = i / n_parts, .part = part, .status = KVC_NOT_FOUND};
        if (v == NULL || lost)
            continue;
        values[i].status = KVC_OK;
        values[i].tier = KVC_TIER_DRAM;
        values[i].len_bytes = v->row_bytes * s->schema->block_tokens;
        memcpy(data + len, v->bytes, values[i].len_bytes);
        len += values[i].len_bytes;
        s->n_rows += s->schema->block_tokens;
    }
    kvc_mutex_unlock(&s->lock);
    reply.u.fetch_blocks.values = values;
    reply.u.fetch_blocks.n_values = n;
    call->sent = blocks_sent;
    const kvt_slice slice = {.base = data, .len_bytes = len, .release = free, .arg = data};
    if (len == 0)
        free(data);
    KVC_ASSERT(kvt_call_send(call, &reply, &slice, len == 0 ? 0 : 1) == KVC_OK);
}

/* What may come late. */
static void answer_late(store *s, kvt_call *call)
{
    if (call->req.method == KVC_OPEN_CONTEXT)
        answer_open(s, call);
    else if (call->req.method == KVC_EXTEND_CONTEXT)
        answer_extend(s, call);
    else if (call->req.method == KVC_FETCH_BLOCKS)
        answer_blocks(s, call);
    else
        answer_fetch(s, call);
}

/* Under the lock. */
static void put_off(store *s, kvt_call *call, uint32_t delay_ms)
{
    s->late_due_ns[s->n_late] = kvc_now_ns() + delay_ms * NS_PER_MS;
    s->late[s->n_late++] = call;
    kvc_cond_signal(&s->cond);
}

/* Opens and extends; an extend counts when it comes. */
static void grow_context(store *s, kvt_call *call)
{
    kvc_mutex_lock(&s->lock);
    bool late = s->faults.grow_delay_ms != 0 && s->n_late < STORE_MAX_LATE;
    bool fail = s->faults.grow_fails;
    s->n_extends += call->req.method == KVC_EXTEND_CONTEXT;
    if (late)
        put_off(s, call, s->faults.grow_delay_ms);
    kvc_mutex_unlock(&s->lock);
    if (fail && !late)
        reply_error(call, KVC_IO, "as the test says");
    else if (!late)
        answer_late(s, call);
}

static bool put_off_fetch(store *s, kvt_call *call)
{
    kvc_mutex_lock(&s->lock);
    bool late = s->faults.fetch_delay_ms != 0 && s->n_late < STORE_MAX_LATE;
    if (late) {
        put_off(s, call, s->faults.fetch_delay_ms);
        if (s->faults.delay_calls == 1)
            s->faults.fetch_delay_ms = 0;
        s->faults.delay_calls -= s->faults.delay_calls > 0;
    }
    kvc_mutex_unlock(&s->lock);
    return late;
}

static void on_call(void *arg, kvt_call *call)
{
    store *s = arg;
    switch (call->req.method) {
    case KVC_DESCRIBE:
        answer_describe(call);
        return;
    case KVC_REGISTER_SCHEMA:
        answer_register(s, call);
        return;
    case KVC_PUT_BLOCKS:
        answer_put(s, call);
        return;
    case KVC_MATCH_PREFIX:
        answer_match(s, call);
        return;
    case KVC_OPEN_CONTEXT:
    case KVC_EXTEND_CONTEXT:
        grow_context(s, call);
        return;
    case KVC_FETCH_ROWS:
    case KVC_FETCH_BLOCKS:
        if (!put_off_fetch(s, call))
            answer_late(s, call);
        return;
    case KVC_GET_SCHEMA: /* it keeps none; the client asks before it maps */
        reply_error(call, KVC_NOT_FOUND, "no schema is kept here");
        return;
    default:
        reply_ok(call, &(kvc_reply){.method = call->req.method});
    }
}

/* Under the lock. */
static kvt_call *take_due(store *s, uint64_t *next_ns_p)
{
    *next_ns_p = 0;
    for (uint32_t i = 0; i < s->n_late; i++) {
        if (s->stopping || s->late_due_ns[i] <= kvc_now_ns()) {
            kvt_call *call = s->late[i];
            s->n_late--;
            s->late[i] = s->late[s->n_late];
            s->late_due_ns[i] = s->late_due_ns[s->n_late];
            return call;
        }
        if (*next_ns_p == 0 || s->late_due_ns[i] < *next_ns_p)
            *next_ns_p = s->late_due_ns[i];
    }
    return NULL;
}

static void late_main(void *arg)
{
    store *s = arg;
    uint64_t next_ns = 0;
    kvc_mutex_lock(&s->lock);
    while (!s->stopping || s->n_late > 0) {
        kvt_call *call = take_due(s, &next_ns);
        if (call == NULL) {
            (void)kvc_cond_wait_until(&s->cond, &s->lock, next_ns);
            continue;
        }
        kvc_mutex_unlock(&s->lock);
        answer_late(s, call);
        kvc_mutex_lock(&s->lock);
    }
    kvc_mutex_unlock(&s->lock);
}

void store_start(store *s, const char *uri)
{
    *s = (store){.ops = kvt_find(uri)};
    assert_non_null(s->ops);
    kvc_mutex_init(&s->lock, KVC_RANK_LEAF);
    kvc_cond_init(&s->cond);
    const kvt_listen_opts opts = {
        .size_bytes = sizeof(opts),
        .uri = uri,
        .on_call = on_call,
        .arg = s,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .max_calls = 1024,
        .max_inflight_bytes = (uint64_t)1 << 30,
        .n_threads = 2,
    };
    assert_ok(kvc_thread_start(&s->late_thread, "store-late", late_main, s));
    assert_ok(s->ops->listen(&opts, &s->listener));
    s->ops->set_serving(s->listener, true);
}

void store_stop(store *s)
{
    kvc_mutex_lock(&s->lock);
    s->stopping = true;
    kvc_cond_signal(&s->cond);
    kvc_mutex_unlock(&s->lock);
    s->ops->drain(s->listener, kvc_now_ns() + SUPPORT_PATIENCE_NS);
    s->ops->listener_close(s->listener);
    kvc_thread_join(&s->late_thread);
    for (uint32_t i = 0; i < s->n_values; i++)
        free(s->values[i].bytes);
    for (uint32_t i = 0; i < s->n_contexts; i++)
        free(s->contexts[i].digests);
    free(s->values);
    free(s->schema);
    kvc_cond_fini(&s->cond);
    kvc_mutex_fini(&s->lock);
}

void store_set(store *s, const store_faults *faults)
{
    kvc_mutex_lock(&s->lock);
    s->faults = *faults;
    kvc_mutex_unlock(&s->lock);
}

void store_answer_late(store *s)
{
    kvc_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < s->n_late; i++)
        s->late_due_ns[i] = 1;
    kvc_cond_signal(&s->cond);
    kvc_mutex_unlock(&s->lock);
}

void store_forget(store *s, bool index_parts)
{
    kvc_mutex_lock(&s->lock);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < s->n_values; i++) {
        if ((s->values[i].part % 2000 >= 1000) == index_parts)
            free(s->values[i].bytes);
        else
            s->values[kept++] = s->values[i];
    }
    s->n_values = kept;
    kvc_mutex_unlock(&s->lock);
}

uint32_t store_count(store *s, const uint32_t *counter)
{
    kvc_mutex_lock(&s->lock);
    uint32_t n = *counter;
    kvc_mutex_unlock(&s->lock);
    return n;
}

kvc_client *store_client(const char *uri)
{
    kvc_client *client = NULL;
    const kvc_client_opts opts = {.size_bytes = sizeof(opts),
                                  .uris = uri,
                                  .n_channels = 2,
                                  .connect_timeout_ns = SUPPORT_PATIENCE_NS,
                                  .default_timeout_ns = SUPPORT_PATIENCE_NS};
    assert_ok(kvc_client_open(&opts, &client));
    return client;
}
