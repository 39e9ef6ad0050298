/*
 * fake_server.c: see fake_server.h.
 *
 * The lock is a leaf: it is never held across kvt_call_reply.
 */
#include "fake_server.h"

#include "support.h"

#include "base/assert.h"
#include "base/clock.h"
#include "base/digest.h"

#define NS_PER_MS   1000000ull
/* Slices of odd lengths, so that rows lie across the pieces that arrive. */
#define SLICE_BYTES 5003u

static void count_call(fake_server *fake, const kvt_call *call)
{
    fake->calls[call->req.method]++;
    fake->in_flight++;
    if (fake->in_flight > fake->max_in_flight)
        fake->max_in_flight = fake->in_flight;
    if (call->req.data_bytes > fake->max_payload_bytes)
        fake->max_payload_bytes = call->req.data_bytes;
}

static void answer(fake_server *fake, kvt_call *call, kvc_status status, const char *detail,
                   uint32_t retry_after_ms, const kvc_reply *reply, const kvt_slice *slices,
                   uint32_t n_slices)
{
    kvc_mutex_lock(&fake->lock);
    fake->in_flight--;
    kvc_mutex_unlock(&fake->lock);
    kvt_call_reply(call, status, detail, retry_after_ms, reply, slices, n_slices);
}

static void answer_describe(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_DESCRIBE};
    kvc_mutex_lock(&fake->lock);
    reply.u.describe.version = "fake";
    reply.u.describe.boot_id = fake->boot_id;
    reply.u.describe.limits = fake->limits;
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

static void answer_register(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_REGISTER_SCHEMA};
    kvc_status status =
        kvc_schema_digest(call->req.u.register_schema.schema, &reply.u.register_schema.digest);
    kvc_mutex_lock(&fake->lock);
    fake->schema_known = true;
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call, status, NULL, 0, &reply, NULL, 0);
}

/* Values whose bytes are not those of the formula. */
static uint32_t count_bad(const kvc_request *req)
{
    uint32_t bad = 0, piece = 0;
    size_t off = 0;
    for (uint32_t v = 0; v < req->u.put_blocks.n_values; v++) {
        const kvc_put_value *value = &req->u.put_blocks.values[v];
        bool good = true;
        for (uint32_t b = 0; b < value->len_bytes; b++) {
            while (piece < req->n_data && off == req->data[piece].iov_len) {
                piece++;
                off = 0;
            }
            if (piece == req->n_data)
                return bad + 1;
            uint8_t byte = ((const uint8_t *)req->data[piece].iov_base)[off++];
            good = good && byte == fake_value_byte(&value->digest, value->part, b);
        }
        bad += !good;
    }
    return bad;
}

static void answer_put(fake_server *fake, kvt_call *call, bool few)
{
    const kvc_request *req = &call->req;
    uint32_t n = req->u.put_blocks.n_values, bad = count_bad(req);
    int8_t *status = kvc_arena_calloc(&call->arena, n, 1);
    KVC_ASSERT(status != NULL);
    for (uint32_t i = 0; i < n; i++)
        status[i] = req->u.put_blocks.values[i].digest.bytes[1] == 99 ? KVC_EXISTS : KVC_OK;
    kvc_mutex_lock(&fake->lock);
    fake->n_values += n;
    fake->bad_values += bad;
    fake->max_values = n > fake->max_values ? n : fake->max_values;
    kvc_mutex_unlock(&fake->lock);
    kvc_reply reply = {.method = KVC_PUT_BLOCKS};
    reply.u.put_blocks.n_values = few ? n - 1 : n;
    reply.u.put_blocks.status = status;
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

static void answer_match(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_MATCH_PREFIX};
    const kvc_request *req = &call->req;
    uint32_t hits = 0;
    while (hits < req->u.match_prefix.n_digests && req->u.match_prefix.digests[hits].bytes[0] == 1)
        hits++;
    reply.u.match_prefix.hits = hits;
    if (req->u.match_prefix.want_tiers && !fake->no_tiers) {
        uint8_t *tiers = kvc_arena_alloc(&call->arena, hits + 1);
        KVC_ASSERT(tiers != NULL);
        for (uint32_t i = 0; i < hits; i++)
            tiers[i] = req->u.match_prefix.digests[i].bytes[1] % 2 ? KVC_TIER_LMDB : KVC_TIER_DRAM;
        reply.u.match_prefix.tiers = tiers;
        reply.u.match_prefix.n_tiers = hits;
    }
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

static void answer_open(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_OPEN_CONTEXT};
    kvc_mutex_lock(&fake->lock);
    reply.u.open_context.context = fake->next_context++;
    fake->n_blocks_last_open = call->req.u.open_context.n_digests;
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

static void answer_extend(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_EXTEND_CONTEXT};
    const kvc_request *req = &call->req;
    kvc_mutex_lock(&fake->lock);
    bool stale = req->u.extend_context.context < fake->stale_below;
    bool fits = req->u.extend_context.n_blocks_before == fake->n_blocks_last_open;
    if (!stale && fits)
        fake->n_blocks_last_open += req->u.extend_context.n_digests;
    fake->n_extends++;
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call,
           stale  ? KVC_STALE_HANDLE
           : fits ? KVC_OK
                  : KVC_INVALID,
           "extend", 0, &reply, NULL, 0);
}

static void answer_truncate(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_TRUNCATE_CONTEXT};
    const kvc_request *req = &call->req;
    kvc_mutex_lock(&fake->lock);
    bool stale = req->u.truncate_context.context < fake->stale_below;
    if (!stale)
        fake->n_blocks_last_open = req->u.truncate_context.n_blocks;
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call, stale ? KVC_STALE_HANDLE : KVC_OK, "truncate", 0, &reply, NULL, 0);
}

static void answer_fork(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_FORK_CONTEXT};
    const kvc_request *req = &call->req;
    kvc_mutex_lock(&fake->lock);
    bool stale = req->u.fork_context.context < fake->stale_below;
    if (!stale) {
        reply.u.fork_context.context = fake->next_context++;
        fake->n_blocks_last_open = req->u.fork_context.n_blocks;
    }
    kvc_mutex_unlock(&fake->lock);
    answer(fake, call, stale ? KVC_STALE_HANDLE : KVC_OK, "fork", 0, &reply, NULL, 0);
}

static void answer_erase(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = KVC_ERASE};
    reply.u.erase.values = call->req.u.erase.n_digests;
    reply.u.erase.bytes = 10ull * call->req.u.erase.n_digests;
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

/* Hold and prefetch: what they echo says which handle came. */
static void answer_keep(fake_server *fake, kvt_call *call)
{
    kvc_reply reply = {.method = call->req.method};
    const kvc_request *req = &call->req;
    uint64_t context = req->method == KVC_HOLD ? req->u.hold.context : req->u.prefetch.context;
    kvc_mutex_lock(&fake->lock);
    bool stale = req->method != KVC_RELEASE && context != 0 && context < fake->stale_below;
    kvc_mutex_unlock(&fake->lock);
    if (req->method == KVC_HOLD) {
        reply.u.hold.hold = req->u.hold.hold != 0 ? req->u.hold.hold : 1000 + context;
        reply.u.hold.ttl_ms = req->u.hold.ttl_ms;
        reply.u.hold.n_blocks = 12;
        reply.u.hold.tenant_bytes = 13;
        reply.u.hold.max_bytes = 14;
    } else if (req->method == KVC_PREFETCH) {
        reply.u.prefetch.there = req->u.prefetch.first_block;
        reply.u.prefetch.moved = req->u.prefetch.n_blocks;
        reply.u.prefetch.missing = req->u.prefetch.n_parts;
        reply.u.prefetch.left = (uint64_t)req->u.prefetch.tier;
        reply.u.prefetch.moved_bytes = req->u.prefetch.parts[1];
    }
    answer(fake, call, stale ? KVC_STALE_HANDLE : KVC_OK, "keep", 0, &reply, NULL, 0);
}

static uint32_t count_picks(const kvc_request *req)
{
    uint32_t n = 0;
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++)
        n += req->u.fetch_rows.groups[g].n_picks;
    return n;
}

/* Writes the rows by the formula; returns their bytes. */
static size_t make_rows(fake_server *fake, kvt_call *call, uint8_t *rows, kvc_missing_row *missing,
                        uint32_t *n_missing_p)
{
    size_t at = 0;
    uint32_t index = 0;
    for (uint32_t g = 0; g < call->req.u.fetch_rows.n_groups; g++) {
        const kvc_row_group *group = &call->req.u.fetch_rows.groups[g];
        for (uint32_t i = 0; i < group->n_picks; i++, index++) {
            uint32_t token = group->picks[i];
            if (fake->missing_every != 0 && token % fake->missing_every == 0) {
                missing[(*n_missing_p)++] =
                    (kvc_missing_row){.index = index, .status = KVC_NOT_FOUND};
                continue;
            }
            for (uint32_t b = 0; b < fake->row_bytes[group->part]; b++)
                rows[at++] = fake_byte(group->part, token, b);
        }
    }
    return at;
}

static void answer_fetch(fake_server *fake, kvt_call *call, fake_action action)
{
    const kvc_request *req = &call->req;
    uint32_t n = count_picks(req), n_missing = 0, n_slices = 0;
    size_t room = 1;
    bool stale = false;
    kvc_mutex_lock(&fake->lock);
    for (uint32_t g = 0; g < req->u.fetch_rows.n_groups; g++) {
        const kvc_row_group *group = &req->u.fetch_rows.groups[g];
        stale = stale || group->context < fake->stale_below;
        room += (size_t)group->n_picks * fake->row_bytes[group->part];
    }
    fake->n_rows += n;
    if (req->u.fetch_rows.n_groups > fake->max_groups)
        fake->max_groups = req->u.fetch_rows.n_groups;
    fake->max_picks = n > fake->max_picks ? n : fake->max_picks;
    if (room - 1 > fake->max_payload_bytes)
        fake->max_payload_bytes = room - 1;
    kvc_mutex_unlock(&fake->lock);
    if (stale) {
        answer(fake, call, KVC_STALE_HANDLE, "no such handle", 0, NULL, NULL, 0);
        return;
    }
    uint8_t *rows = malloc(room);
    kvc_missing_row *missing = kvc_arena_calloc(&call->arena, n + 1, sizeof(*missing));
    kvt_slice *slices = kvc_arena_calloc(&call->arena, KVT_MAX_SLICES, sizeof(*slices));
    KVC_ASSERT(rows != NULL && missing != NULL && slices != NULL);
    size_t len = make_rows(fake, call, rows, missing, &n_missing);
    if (action == FAKE_SHORT && len > 0)
        len--;
    if (action == FAKE_LONG)
        rows[len++] = 0;
    if (action == FAKE_WILD_MISSING)
        missing[n_missing++] = (kvc_missing_row){.index = n, .status = KVC_NOT_FOUND};
    for (size_t off = 0; off < len; n_slices++) {
        size_t step = len - off < SLICE_BYTES ? len - off : SLICE_BYTES;
        slices[n_slices] = (kvt_slice){.base = rows + off, .len_bytes = step};
        off += step;
        if (off == len)
            slices[n_slices] = (kvt_slice){
                .base = rows + off - step, .len_bytes = step, .release = free, .arg = rows};
    }
    if (len == 0)
        free(rows);
    kvc_reply reply = {.method = KVC_FETCH_ROWS};
    reply.u.fetch_rows.n_missing = n_missing;
    reply.u.fetch_rows.missing = missing;
    reply.u.fetch_rows.rows_dram = n - n_missing;
    answer(fake, call, KVC_OK, NULL, 0, &reply, slices, n_slices);
}

static void answer_stats(fake_server *fake, kvt_call *call)
{
    static const kvc_tier_stats tiers[] = {{.name = "dram", .capacity_bytes = 1000, .values = 3}};
    static const kvc_counter counters[] = {{.name = "one", .value = 1},
                                           {.name = "two", .value = 2}};
    kvc_reply reply = {.method = KVC_STATS};
    reply.u.stats.uptime_ms = 1234;
    reply.u.stats.n_tiers = 1;
    reply.u.stats.tiers = tiers;
    reply.u.stats.n_counters = 2;
    reply.u.stats.counters = counters;
    answer(fake, call, KVC_OK, NULL, 0, &reply, NULL, 0);
}

static void end_stream(fake_server *fake, kvt_call *call, kvc_status status)
{
    answer(fake, call, status, "at the end of the stream", 1, NULL, NULL, 0);
}

static void answer_well(fake_server *fake, kvt_call *call, fake_action action)
{
    kvc_mutex_lock(&fake->lock);
    bool known = fake->schema_known;
    kvc_mutex_unlock(&fake->lock);
    kvc_method method = call->req.method;
    bool needs =
        method == KVC_PUT_BLOCKS || method == KVC_MATCH_PREFIX || method == KVC_OPEN_CONTEXT;
    if (needs && !known) {
        answer(fake, call, KVC_NOT_FOUND, "unknown schema", 0, NULL, NULL, 0);
        return;
    }
    switch (method) {
    case KVC_DESCRIBE:
        answer_describe(fake, call);
        return;
    case KVC_REGISTER_SCHEMA:
        answer_register(fake, call);
        return;
    case KVC_PUT_BLOCKS:
        answer_put(fake, call, action == FAKE_FEW_STATUS);
        return;
    case KVC_MATCH_PREFIX:
        answer_match(fake, call);
        return;
    case KVC_OPEN_CONTEXT:
        answer_open(fake, call);
        return;
    case KVC_EXTEND_CONTEXT:
        answer_extend(fake, call);
        return;
    case KVC_TRUNCATE_CONTEXT:
        answer_truncate(fake, call);
        return;
    case KVC_FORK_CONTEXT:
        answer_fork(fake, call);
        return;
    case KVC_ERASE:
        answer_erase(fake, call);
        return;
    case KVC_HOLD:
    case KVC_RELEASE:
    case KVC_PREFETCH:
        answer_keep(fake, call);
        return;
    case KVC_FETCH_ROWS:
        answer_fetch(fake, call, action);
        return;
    case KVC_STATS:
        answer_stats(fake, call);
        return;
    case KVC_FETCH_ROWS_STREAM:
    case KVC_FETCH_BLOCKS:
        fake_stream_answer(fake, call, action, end_stream);
        return;
    default:
        answer(fake, call, KVC_OK, NULL, 0, &(kvc_reply){.method = method}, NULL, 0);
    }
}

/* Under the lock: the rule for this call, used up by it; or NULL. */
static const fake_rule *take_rule(fake_server *fake, kvc_method method)
{
    for (uint32_t i = 0; i < fake->n_rules; i++) {
        fake_rule *rule = &fake->rules[i];
        if (rule->method != method || rule->times == 0)
            continue;
        if (rule->skip > 0) {
            rule->skip--;
            continue;
        }
        rule->times--;
        return rule;
    }
    return NULL;
}

static void on_call(void *arg, kvt_call *call)
{
    fake_server *fake = arg;
    kvc_mutex_lock(&fake->lock);
    count_call(fake, call);
    const fake_rule *found = take_rule(fake, call->req.method);
    fake_rule rule = found != NULL ? *found : (fake_rule){0};
    bool late = rule.action == FAKE_LATE || rule.action == FAKE_LATE_STATUS;
    if (late && !fake->stopping) { /* else the thread for it may have ended */
        KVC_ASSERT(fake->n_late < FAKE_MAX_LATE);
        fake->late[fake->n_late++] = (fake_late){
            .call = call,
            .due_ns = kvc_now_ns() + rule.delay_ms * NS_PER_MS,
            .status = rule.action == FAKE_LATE_STATUS ? rule.status : KVC_OK,
        };
        kvc_cond_signal(&fake->cond);
        kvc_mutex_unlock(&fake->lock);
        return;
    }
    kvc_mutex_unlock(&fake->lock);
    if (rule.action == FAKE_STATUS || rule.action == FAKE_LATE_STATUS)
        answer(fake, call, rule.status, "as the rule says", rule.retry_after_ms, NULL, NULL, 0);
    else
        answer_well(fake, call, rule.action);
}

/* Under the lock: a call that is due, or NULL and when the next one is. */
static kvt_call *take_due(fake_server *fake, uint64_t *next_ns_p, kvc_status *status_p)
{
    *next_ns_p = 0;
    for (uint32_t i = 0; i < fake->n_late; i++) {
        fake_late *late = &fake->late[i];
        if (fake->stopping || late->due_ns <= kvc_now_ns()) {
            kvt_call *call = late->call;
            *status_p = late->status;
            *late = fake->late[--fake->n_late];
            return call;
        }
        if (*next_ns_p == 0 || late->due_ns < *next_ns_p)
            *next_ns_p = late->due_ns;
    }
    return NULL;
}

static void late_main(void *arg)
{
    fake_server *fake = arg;
    uint64_t next_ns;
    kvc_mutex_lock(&fake->lock);
    while (!fake->stopping || fake->n_late > 0) {
        kvc_status status = KVC_OK;
        kvt_call *call = take_due(fake, &next_ns, &status);
        if (call == NULL) {
            (void)kvc_cond_wait_until(&fake->cond, &fake->lock, next_ns);
            continue;
        }
        kvc_mutex_unlock(&fake->lock);
        if (status != KVC_OK)
            answer(fake, call, status, "as the rule says", 0, NULL, NULL, 0);
        else
            answer_well(fake, call, 0);
        kvc_mutex_lock(&fake->lock);
    }
    kvc_mutex_unlock(&fake->lock);
}

void fake_init(fake_server *fake)
{
    *fake = (fake_server){.next_context = 1, .schema_known = true};
    kvc_mutex_init(&fake->lock, KVC_RANK_LEAF);
    kvc_cond_init(&fake->cond);
    fake->limits = (kvc_limits){
        .max_value_bytes = KVC_MAX_VALUE_BYTES,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .max_batch_values = KVC_MAX_BATCH_VALUES,
        .max_digests = KVC_MAX_DIGESTS,
        .max_context_blocks = KVC_MAX_CONTEXT_BLOCKS,
        .max_picks = KVC_MAX_PICKS,
        .max_groups = KVC_MAX_GROUPS,
        .max_contexts = 100,
        .max_ttl_ms = 1000000,
    };
    for (uint32_t i = 0; i < FAKE_MAX_PARTS; i++)
        fake->row_bytes[i] = 4096u >> i;
}

void fake_listen(fake_server *fake, const char *uri)
{
    fake->ops = kvt_find(uri);
    assert_non_null(fake->ops);
    kvc_mutex_lock(&fake->lock);
    fake->boot_id++;
    fake->stopping = false;
    fake->stale_below = fake->next_context;
    kvc_mutex_unlock(&fake->lock);
    kvt_listen_opts opts = {
        .size_bytes = sizeof(opts),
        .uri = uri,
        .on_call = on_call,
        .arg = fake,
        .max_message_bytes = KVC_MAX_VALUE_BYTES,
        .max_calls = 1024,
        .max_inflight_bytes = (uint64_t)1 << 30,
        .n_threads = 2,
    };
    assert_ok(kvc_thread_start(&fake->late_thread, "fake-late", late_main, fake));
    assert_ok(fake->ops->listen(&opts, &fake->listener));
    fake->ops->set_serving(fake->listener, true);
}

void fake_stop(fake_server *fake)
{
    kvc_mutex_lock(&fake->lock);
    fake->stopping = true;
    kvc_cond_signal(&fake->cond);
    kvc_mutex_unlock(&fake->lock);
    fake->ops->drain(fake->listener, kvc_now_ns() + 1000 * NS_PER_MS);
    fake->ops->listener_close(fake->listener);
    fake->listener = NULL;
    kvc_thread_join(&fake->late_thread);
}

void fake_fini(fake_server *fake)
{
    if (fake->listener != NULL)
        fake_stop(fake);
    kvc_cond_fini(&fake->cond);
    kvc_mutex_fini(&fake->lock);
}

void fake_add_rule(fake_server *fake, const fake_rule *rule)
{
    kvc_mutex_lock(&fake->lock);
    KVC_ASSERT(fake->n_rules < FAKE_MAX_RULES);
    fake->rules[fake->n_rules++] = *rule;
    kvc_mutex_unlock(&fake->lock);
}

void fake_make_stale(fake_server *fake)
{
    kvc_mutex_lock(&fake->lock);
    fake->stale_below = fake->next_context;
    kvc_mutex_unlock(&fake->lock);
}

uint32_t fake_calls(fake_server *fake, kvc_method method)
{
    kvc_mutex_lock(&fake->lock);
    uint32_t n = fake->calls[method];
    kvc_mutex_unlock(&fake->lock);
    return n;
}

void fake_wait_calls(fake_server *fake, kvc_method method, uint32_t n)
{
    support_wait_for(fake_calls(fake, method) >= n);
}

static bool has_calls(fake_server *fake)
{
    kvc_mutex_lock(&fake->lock);
    bool has = fake->in_flight > 0;
    kvc_mutex_unlock(&fake->lock);
    return has;
}

void fake_let_go(fake_server *fake)
{
    kvc_mutex_lock(&fake->lock);
    for (uint32_t i = 0; i < fake->n_late; i++)
        fake->late[i].due_ns = 0;
    kvc_cond_signal(&fake->cond);
    kvc_mutex_unlock(&fake->lock);
    support_wait_for(!has_calls(fake));
}
