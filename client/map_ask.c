/*
 * map_ask.c: MapContext, and whose turn it is to map.
 *
 * One thread of a client maps at a time (client->mapping), since what a reply calls by its id may
 * have come with the reply before. It alone touches client->epoch. An answer carries descriptors
 * that the server passes once, so it is never given up: whoever stops waiting leaves it to the
 * callback, on kvc-prog, which maps what came, gives the map back and ends the turn.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "map.h"

#define ANSWER_NS   (30ull * 1000000000) /* for what nobody waits for: the server may be full */
#define KEEP_NS     (10ull * 1000000000) /* segments without a map, where the options do not say */
#define SUSPECT_NS  (1ull * 1000000000)  /* until the link is there or is not */
#define PAUSE_NS    (10ull * 1000000000) /* memory was short: no context maps itself */
#define ERROR_BYTES 256u

/* ---- whose turn it is ------------------------------------------------------------------------ */

kvc_status kvci_mapping_begin(kvc_client *client, uint64_t deadline_ns)
{
    kvc_status status = KVC_OK;
    kvc_mutex_lock(&client->lock);
    while (client->mapping && status == KVC_OK)
        status = kvc_cond_wait_until(&client->done_cond, &client->lock, deadline_ns);
    bool mine = !client->mapping;
    if (mine) {
        client->mapping = true;
        client->n_mapping = 1;
    }
    kvc_mutex_unlock(&client->lock);
    return mine ? KVC_OK : kvci_fail(status, "map: another one took too long");
}

void kvci_mapping_end(kvc_client *client)
{
    kvc_mutex_lock(&client->lock);
    if (--client->n_mapping == 0) {
        client->mapping = false;
        kvc_cond_broadcast(&client->done_cond);
        kvc_cond_signal(&client->prog_cond); /* which may have to sweep */
    }
    kvc_mutex_unlock(&client->lock);
}

/* ---- telling --------------------------------------------------------------------------------- */

/* A request that nobody waits for. Ids that the server may not have heard of end the link. */
typedef struct telling {
    kvc_op op;
    kvc_client *client;
    bool ends_turn;
    uint32_t n_ids, ids[KVC_MAX_UNMAPPED];
} telling;

static void told(kvc_op *op, void *arg)
{
    telling *t = arg;
    if (t->n_ids > 0 && op->status != KVC_OK)
        kvci_link_end(t->client, "the server could not be told what is mapped no more");
    if (t->ends_turn)
        kvci_mapping_end(t->client);
    free(t);
}

static kvc_status tell_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    (void)msg;
    (void)reply;
    (void)why_p;
    return KVC_OK;
}

/* Not twice: later, the ids may be other segments'. */
static const kvci_kind tell_kind = {.name = "unmap", .not_twice = true, .take = tell_take};

static void not_told(telling *t)
{
    t->op.status = KVC_NO_MEMORY;
    told(&t->op, t);
}

/* Takes t, whatever comes of it. */
static void tell(telling *t, uint64_t number)
{
    kvci_call *call = kvci_call_new(t->client, &tell_kind, 1, 0, kvc_now_ns() + ANSWER_NS);
    kvc_op_init(&t->op, told, t);
    if (call == NULL) {
        not_told(t);
        return;
    }
    kvci_msg *msg = &call->msgs[0];
    msg->n_items = 1;
    msg->req.method = KVC_MAP_CONTEXT;
    msg->req.u.map_context.map = number;
    msg->req.u.map_context.release = true;
    msg->req.u.map_context.unmapped = t->ids;
    msg->req.u.map_context.n_unmapped = t->n_ids;
    if (kvci_call_start(call, &t->op) != KVC_OK)
        not_told(t);
}

/* ---- one answer ------------------------------------------------------------------------------ */

typedef struct asking {
    kvc_op op;
    kvc_client *client;
    kvci_call *call; /* while the op is in flight */
    kvci_map_answer answer;
    bool done, abandoned; /* guarded by client->lock */
    bool fresh;           /* the server was to begin a map */
    kvc_status status;
    char why[ERROR_BYTES];
    uint32_t parts[]; /* [n_parts] */
} asking;

void kvci_map_answer_fini(kvci_map_answer *a)
{
    for (uint32_t i = 0; i < a->n_fds; i++)
        if (a->fds[i] >= 0)
            (void)close(a->fds[i]);
    free(a->table);
    *a = (kvci_map_answer){0};
}

static kvc_status map_take(kvci_msg *msg, const kvc_reply *reply, const char **why_p)
{
    kvci_map_answer *a = msg->call->u.keep.info_p;
    kvci_map_answer_fini(a); /* of an attempt before */
    a->reply = *reply;
    memcpy(a->segments, reply->u.map_context.segments,
           reply->u.map_context.n_segments * sizeof(a->segments[0]));
    for (; a->n_fds < msg->xfer.n_fds; a->n_fds++) {
        a->fds[a->n_fds] = msg->xfer.fds[a->n_fds];
        msg->xfer.fds[a->n_fds] = -1;
    }
    *why_p = "no memory for the table of a map";
    a->table = malloc(reply->data_bytes + 1);
    if (a->table == NULL)
        return KVC_NO_MEMORY;
    a->table_bytes = reply->data_bytes;
    kvci_cursor cur = {.iov = reply->data};
    kvci_copy_out(&cur, a->table, reply->data_bytes);
    *why_p = "a map without its descriptors";
    uint32_t want = reply->u.map_context.lease_bytes > 0;
    for (uint32_t i = 0; i < reply->u.map_context.n_segments; i++)
        want += !a->segments[i].gpu;
    return a->n_fds == want ? KVC_OK : KVC_PROTOCOL;
}

/* Segments that came and cannot be mapped: the server is told before the turn ends. */
static void give_up(kvc_client *client, const uint32_t *ids, uint32_t n, bool pause)
{
    telling *t = calloc(1, sizeof(*t));
    kvc_mutex_lock(&client->lock);
    if (pause)
        client->maps_pause_ns = kvc_now_ns() + PAUSE_NS;
    client->n_mapping += t != NULL;
    kvci_map_left(client);
    kvc_mutex_unlock(&client->lock);
    if (t == NULL) {
        kvci_link_end(client, "no memory to tell the server what is not mapped");
        return;
    }
    t->client = client;
    t->ends_turn = true;
    t->n_ids = n;
    memcpy(t->ids, ids, n * sizeof(*ids));
    tell(t, 0);
}

/* What came once and is lost comes again by another link alone. */
static void lose(kvc_client *client, const char *why)
{
    kvc_mutex_lock(&client->lock);
    client->maps_pause_ns = kvc_now_ns() + PAUSE_NS;
    kvc_mutex_unlock(&client->lock);
    kvci_link_end(client, why);
}

static bool brings(const kvci_map_answer *a)
{
    return a->n_fds > 0 || a->reply.u.map_context.n_segments > 0 ||
           a->reply.u.map_context.lease_bytes > 0;
}

/* Who maps alone reads and changes client->epoch. */
static kvc_status take_segments(kvc_client *client, kvci_map_answer *a)
{
    uint32_t at = 0, n_lost = 0, lost[KVC_MAX_MAP_SEGMENTS];
    bool no_gpu = false, short_of_memory = false;
    if (a->reply.u.map_context.lease_bytes > 0) {
        kvci_epoch_unref(client->epoch);
        client->epoch =
            kvci_epoch_create(&client->map_opts, a->fds[0], a->reply.u.map_context.lease_bytes);
        a->fds[0] = -1;
        at = 1;
    }
    if (client->epoch == NULL) {
        lose(client, "the lease cannot be mapped");
        return kvci_fail(KVC_NO_MEMORY, "map: the server's lease cannot be mapped");
    }
    for (uint32_t i = 0; i < a->reply.u.map_context.n_segments; i++) {
        const kvc_map_segment *segment = &a->segments[i];
        kvc_status status;
        if (segment->gpu) {
            status = kvci_epoch_add_gpu(client->epoch, &client->map_opts, segment);
            no_gpu = no_gpu || status != KVC_OK;
        } else {
            status =
                kvci_epoch_add(client->epoch, segment->id, a->fds[at], (size_t)segment->len_bytes);
            a->fds[at++] = -1;
            short_of_memory = short_of_memory || status != KVC_OK;
        }
        if (status != KVC_OK)
            lost[n_lost++] = segment->id;
    }
    if (no_gpu)
        client->map_opts.gpu_open = NULL; /* whoever asks again gets places that it can open */
    if (n_lost > 0)
        give_up(client, lost, n_lost, short_of_memory);
    if (short_of_memory)
        return kvci_fail(KVC_NO_MEMORY, "map: %u of the server's segments cannot be mapped",
                         n_lost);
    if (no_gpu)
        return kvci_fail(KVC_NOT_FOUND, "map: the memory of the server's GPU cannot be opened");
    uint64_t words = client->epoch->lease_bytes / sizeof(uint64_t);
    return a->reply.u.map_context.lease_slot < words
               ? KVC_OK
               : kvci_fail(KVC_PROTOCOL, "map: the server's memory cannot be mapped");
}

/* ---- asking ---------------------------------------------------------------------------------- */

/* Nobody waits for it any more: what came is mapped, so that both ends know the same segments. */
static void adopt(asking *k)
{
    kvc_client *client = k->client;
    uint64_t number = k->answer.reply.u.map_context.map;
    KVC_COUNT(client_maps_abandoned);
    if (k->status == KVC_OK)
        (void)!take_segments(client, &k->answer);
    else if (brings(&k->answer))
        lose(client, k->why);
    if (k->fresh && number != 0)
        kvci_map_release(client, number, false);
    kvc_mutex_lock(&client->lock);
    kvci_map_left(client);
    kvc_mutex_unlock(&client->lock);
    kvci_map_answer_fini(&k->answer);
    free(k);
    kvci_mapping_end(client);
}

static void asked(kvc_op *op, void *arg)
{
    asking *k = arg;
    k->status = op->status;
    if (op->status != KVC_OK)
        (void)snprintf(k->why, sizeof(k->why), "%s", kvc_last_error());
    kvc_mutex_lock(&k->client->lock);
    bool mine = k->abandoned;
    k->done = true;
    kvc_cond_broadcast(&k->client->done_cond);
    kvc_mutex_unlock(&k->client->lock);
    if (mine)
        adopt(k);
}

static const kvci_kind map_kind = {.name = "map", .take = map_take};

static asking *create(kvc_context *context, const kvc_request *req, uint64_t deadline_ns)
{
    uint32_t n_parts = req->u.map_context.n_parts;
    asking *k = calloc(1, sizeof(*k) + n_parts * sizeof(uint32_t));
    uint64_t least_ns = kvc_now_ns() + ANSWER_NS;
    kvci_call *call = k == NULL ? NULL
                                : kvci_call_new(context->client, &map_kind, 1,
                                                kvci_carve_bytes(1, sizeof(kvci_seg)),
                                                deadline_ns > least_ns ? deadline_ns : least_ns);
    if (call == NULL) {
        free(k);
        return NULL;
    }
    kvci_msg *msg = &call->msgs[0];
    memcpy(k->parts, req->u.map_context.parts, n_parts * sizeof(uint32_t));
    k->client = context->client;
    k->call = call;
    k->fresh = req->u.map_context.map == 0;
    msg->n_items = 1;
    msg->req = *req;
    msg->req.u.map_context.parts = k->parts;
    msg->segs = kvci_carve(call, 1, sizeof(kvci_seg));
    msg->segs[0].context = context;
    msg->n_segs = 1;
    msg->handle_p = &msg->req.u.map_context.context;
    call->u.keep.info_p = &k->answer;
    kvc_op_init(&k->op, asked, k);
    return k;
}

/* Under the lock: the caller goes, and with it perhaps the context. What the server has not been
 * sent is taken back. */
static void abandon(asking *k)
{
    k->abandoned = true;
    k->client->n_mapping++;
    if (!kvci_op_in_flight(&k->op) || k->call->n_left == 0)
        return;
    kvci_msg *msg = &k->call->msgs[0];
    if (msg->state == KVCI_SENDING || msg->state == KVCI_SENT) {
        k->call->once = true;
        msg->n_segs = 0;
        msg->handle_p = NULL;
    } else {
        kvci_call_cancel(k->client, k->call);
    }
}

/* False: it is left to the callback. */
static bool await(asking *k, uint64_t deadline_ns)
{
    kvc_client *client = k->client;
    kvc_status waited = KVC_OK;
    kvc_mutex_lock(&client->lock);
    client->waiters++;
    while (!k->done && waited == KVC_OK)
        waited = kvc_cond_wait_until(&client->done_cond, &client->lock, deadline_ns);
    bool done = k->done;
    if (!done)
        abandon(k);
    if (--client->waiters == 0 && client->closing)
        kvc_cond_broadcast(&client->done_cond);
    kvc_mutex_unlock(&client->lock);
    return done;
}

kvc_status kvci_map_ask(kvc_context *context, const kvc_request *req, uint64_t deadline_ns,
                        kvci_map_answer *answer, uint64_t *number_p)
{
    asking *k = create(context, req, deadline_ns);
    if (k == NULL)
        return kvci_fail(KVC_NO_MEMORY, "map: no memory");
    kvc_status status = kvci_call_start(k->call, &k->op);
    if (status != KVC_OK) {
        free(k);
        return status;
    }
    if (!await(k, deadline_ns))
        return kvci_fail(KVC_TIMED_OUT, "map: the deadline passed before the server's answer");
    *answer = k->answer;
    status = k->status;
    if (answer->reply.u.map_context.map != 0) /* before anything of the reply can fail */
        *number_p = answer->reply.u.map_context.map;
    if (status != KVC_OK && brings(answer))
        lose(context->client, k->why);
    if (status != KVC_OK)
        (void)kvci_fail(status, "%s", k->why);
    else
        status = take_segments(context->client, answer);
    free(k);
    return status;
}

/* ---- giving back ----------------------------------------------------------------------------- */

void kvci_map_release(kvc_client *client, uint64_t number, bool wait)
{
    if (wait) {
        kvc_request req = {.method = KVC_MAP_CONTEXT};
        req.u.map_context.map = number;
        req.u.map_context.release = true;
        kvci_rpc_opts opts = {.deadline_ns = kvc_now_ns() + KVCI_CLOSE_TIMEOUT_NS};
        (void)!kvci_rpc(client, &req, &opts);
        return;
    }
    telling *t = calloc(1, sizeof(*t));
    if (t == NULL)
        return;
    t->client = client;
    tell(t, number);
}

void kvci_map_goodbye(kvc_client *client)
{
    uint64_t deadline_ns = kvc_now_ns() + KVCI_CLOSE_TIMEOUT_NS;
    uint32_t ids[KVC_MAX_UNMAPPED], n;
    kvc_mutex_lock(&client->lock);
    bool asks = client->link != NULL && !client->link_suspect && client->map_opts.gpu_close != NULL;
    kvc_mutex_unlock(&client->lock);
    if (!asks || kvci_mapping_begin(client, deadline_ns) != KVC_OK)
        return;
    do {
        kvc_request req = {.method = KVC_MAP_CONTEXT};
        kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .once = true};
        n = kvci_epoch_sweep(client->epoch, true, ids, KVC_MAX_UNMAPPED);
        req.u.map_context.release = true;
        req.u.map_context.unmapped = ids;
        req.u.map_context.n_unmapped = n;
        if (n > 0)
            (void)!kvci_rpc(client, &req, &opts);
    } while (n == KVC_MAX_UNMAPPED);
    kvci_mapping_end(client);
}

void kvci_map_left(kvc_client *client)
{
    uint64_t keep_ns = client->map_opts.keep_ns != 0 ? client->map_opts.keep_ns : KEEP_NS;
    if (client->sweep_due_ns == UINT64_MAX) {
        client->sweep_due_ns = kvc_now_ns() + keep_ns;
        kvc_cond_signal(&client->prog_cond);
    }
}

void kvci_map_sweep(kvc_client *client, uint64_t now_ns)
{
    bool connected = client->link != NULL;
    telling *t = calloc(1, sizeof(*t));
    client->sweep_due_ns = UINT64_MAX;
    if (t == NULL || client->closing || (connected && client->link_suspect)) {
        free(t);
        if (!client->closing)
            client->sweep_due_ns = now_ns + SUSPECT_NS;
        return;
    }
    client->mapping = true;
    client->n_mapping = 1;
    kvc_mutex_unlock(&client->lock);
    t->client = client;
    t->ends_turn = true;
    t->n_ids = kvci_epoch_sweep(client->epoch, false, t->ids, KVC_MAX_UNMAPPED);
    bool more = t->n_ids == KVC_MAX_UNMAPPED;
    if (!connected)
        t->n_ids = 0; /* whom they were passed by has forgotten it */
    if (t->n_ids > 0)
        tell(t, 0);
    else
        told(&t->op, t);
    kvc_mutex_lock(&client->lock);
    if (more)
        client->sweep_due_ns = now_ns;
}
