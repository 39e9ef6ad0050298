/*
 * put_stream_test.c: PutBlocksStream against a whole server: bodies only where they are wanted,
 * promises that hold, TTLs, and streams torn at every message, which leave nothing.
 */
#include "harness.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "index.h"
#include "request.h"

#define ROW   1024u
#define VALUE (ROW * H_TOKENS) /* 64 KiB */
#define PIECE 30000u           /* a body comes in three */
#define MAX_N 256u

typedef struct env {
    h_server h;
    h_schema schema;
    h_peer *peer;
    char dir[256];
} env;

/* A client of one stream. Everything but done runs in its callbacks, one after the other. */
typedef struct upload {
    kvt_xfer xfer; /* first */
    h_peer *peer;
    const h_schema *schema;
    uint64_t first; /* block of offer 0 */
    uint32_t n;
    kvc_promise promise;
    uint64_t ttl_ms;
    uint32_t n_offered, n_last, n_bodies, n_messages;
    uint32_t cancel_at; /* after so many messages sent; 0: never */
    bool pushing, ended;
    uint32_t wanted[MAX_N]; /* bodies asked for, from at on */
    uint32_t n_wanted, at, off_bytes;
    kvc_put_answer last[MAX_N];
    bool has_last[MAX_N];
    kvc_put_offer offers[KVC_PUT_WINDOW_VALUES];
    char body[VALUE];
    struct iovec data;
    kvc_request req;
    kvc_mutex lock;
    kvc_cond cond;
    bool done;
} upload;

static void fill_offers(upload *up, kvc_request *req)
{
    uint32_t n = 0;
    while (up->n_offered < up->n && up->n_offered - up->n_last < KVC_PUT_WINDOW_VALUES) {
        up->offers[n++] = (kvc_put_offer){.schema = up->schema->digest,
                                          .digest = h_digest(up->first + up->n_offered++),
                                          .part = 10,
                                          .len_bytes = VALUE,
                                          .promise = up->promise,
                                          .ttl_ms = up->ttl_ms};
    }
    req->u.put_stream.n_offers = n;
    req->u.put_stream.offers = up->offers;
}

/* The next piece of the first body that is wanted. */
static void fill_piece(upload *up, kvc_request *req)
{
    uint32_t value = up->wanted[up->at], left = VALUE - up->off_bytes;
    if (up->off_bytes == 0)
        h_fill(up->first + value, 10, ROW, up->body);
    up->data = (struct iovec){up->body + up->off_bytes, left < PIECE ? left : PIECE};
    up->off_bytes += (uint32_t)up->data.iov_len;
    req->u.put_stream.value = value;
    req->data = &up->data;
    req->n_data = 1;
    req->data_bytes = up->data.iov_len;
    if (up->off_bytes < VALUE)
        return;
    up->off_bytes = 0;
    up->at++;
    up->n_bodies++;
}

/* Sends what there is to send. */
static void advance(upload *up)
{
    const kvt_ops *ops = up->peer->ops;
    if (up->pushing || up->ended)
        return;
    up->req = (kvc_request){.method = KVC_PUT_BLOCKS_STREAM};
    if (up->n_last == up->n) {
        up->ended = true;
        kvc_status ended = ops->push(up->peer->conn, &up->xfer, NULL);
        assert_true(ended == KVC_OK || ended == KVC_CLOSED);
        return;
    }
    fill_offers(up, &up->req);
    if (up->at < up->n_wanted)
        fill_piece(up, &up->req);
    else if (up->req.u.put_stream.n_offers == 0)
        return;
    up->pushing = true;
    kvc_status status = ops->push(up->peer->conn, &up->xfer, &up->req);
    assert_true(status == KVC_OK || status == KVC_CLOSED);
}

static void on_pushed(kvt_xfer *xfer, bool ok)
{
    upload *up = (upload *)xfer;
    up->pushing = false;
    up->n_messages++;
    if (up->n_messages == up->cancel_at)
        up->peer->ops->cancel(up->peer->conn, xfer);
    else if (ok)
        advance(up);
}

static void on_message(kvt_xfer *xfer)
{
    upload *up = (upload *)xfer;
    for (uint32_t i = 0; i < xfer->reply.u.put_stream.n_answers; i++) {
        const kvc_put_answer *answer = &xfer->reply.u.put_stream.answers[i];
        assert_true(answer->value < up->n_offered && !up->has_last[answer->value]);
        if (answer->send) {
            up->wanted[up->n_wanted++] = answer->value;
            continue;
        }
        up->last[answer->value] = *answer;
        up->has_last[answer->value] = true;
        up->n_last++;
    }
    advance(up);
}

static void on_done(kvt_xfer *xfer)
{
    upload *up = (upload *)xfer;
    kvc_mutex_lock(&up->lock);
    up->done = true;
    kvc_cond_signal(&up->cond);
    kvc_mutex_unlock(&up->lock);
}

static upload *upload_new(h_peer *peer, const h_schema *schema, uint64_t first, uint32_t n)
{
    upload *up = calloc(1, sizeof(*up));
    assert_non_null(up);
    up->peer = peer;
    up->schema = schema;
    up->first = first;
    up->n = n;
    up->promise = KVC_PROMISE_MEMORY;
    kvc_mutex_init(&up->lock, KVC_RANK_LEAF);
    kvc_cond_init(&up->cond);
    return up;
}

static kvc_status upload_run(upload *up)
{
    kvc_request first = {.method = KVC_PUT_BLOCKS_STREAM};
    fill_offers(up, &first);
    up->xfer.req = &first;
    up->xfer.deadline_ns = kvc_deadline_ns(60ull * 1000000000);
    up->xfer.done = on_done;
    up->xfer.message = on_message;
    up->xfer.pushed = on_pushed;
    up->pushing = true;
    assert_int_equal(up->peer->ops->submit(up->peer->conn, &up->xfer), KVC_OK);
    kvc_mutex_lock(&up->lock);
    while (!up->done)
        kvc_cond_wait(&up->cond, &up->lock);
    kvc_mutex_unlock(&up->lock);
    kvc_arena_reset(&up->xfer.arena);
    return up->xfer.status;
}

static void upload_free(upload *up)
{
    kvc_cond_fini(&up->cond);
    kvc_mutex_fini(&up->lock);
    free(up);
}

/* Puts blocks and asserts what became of all of them, and how many bodies it took. */
static void put_all(env *e, uint64_t first, uint32_t n, kvc_promise promise, kvc_status want,
                    uint32_t n_bodies)
{
    upload *up = upload_new(e->peer, &e->schema, first, n);
    up->promise = promise;
    assert_int_equal(upload_run(up), KVC_OK);
    assert_int_equal(up->n_last, n);
    assert_int_equal(up->n_bodies, n_bodies);
    for (uint32_t i = 0; i < n; i++)
        assert_int_equal(up->last[i].status, want);
    upload_free(up);
}

static void env_open(env *e, bool lmdb, uint64_t dram_bytes)
{
    memset(e, 0, sizeof(*e));
    h_server_init(&e->h);
    e->h.settings.dram_bytes = dram_bytes;
    if (lmdb) {
        h_temp_dir(e->dir);
        e->h.settings.lmdb_path = e->dir;
        e->h.settings.lmdb_bytes = 256ull << 20;
    }
    h_server_start(&e->h);
    e->peer = h_connect(e->h.listen, NULL);
    h_schema_init(&e->schema, "uploads", 2, ROW, false);
    assert_int_equal(h_register(e->peer, &e->schema), KVC_OK);
}

/* Values that are claimed or written: none once all puts are over. */
static uint32_t claimed(kvs_index *index)
{
    uint32_t n = 0;
    kvc_mutex_lock(&index->lock);
    for (uint32_t id = 1; id < index->values.next; id++) {
        const kvs_value *value = kvs_value_at(index, id);
        n += value->flags & KVS_FILLING && kvs_value_find(index, value->block, value->part) == id;
    }
    kvc_mutex_unlock(&index->lock);
    return n;
}

static void assert_nothing_kept(const env *e)
{
    kvs_server *server = e->h.server;
    for (int i = 0; i < 5000 && (atomic_load(&server->n_calls) ||
                                 atomic_load(&server->streamed_bytes) || claimed(server->index));
         i++)
        usleep(1000);
    assert_int_equal(atomic_load(&server->n_calls), 0);
    assert_int_equal(atomic_load(&server->streamed_bytes), 0);
    assert_int_equal(claimed(server->index), 0);
}

static void env_close(env *e)
{
    assert_nothing_kept(e);
    h_disconnect(e->peer);
    h_server_stop(&e->h, false);
    h_server_fini(&e->h);
    if (e->dir[0])
        h_remove_dir(e->dir);
}

static void assert_readable(env *e, uint64_t first, uint32_t n)
{
    uint64_t context;
    uint32_t picks[MAX_N];
    for (uint32_t i = 0; i < n; i++)
        picks[i] = i * H_TOKENS + i % H_TOKENS;
    assert_int_equal(h_open(e->peer, &e->schema, first, n, 0, &context), KVC_OK);
    h_fetch_equal(e->peer, &e->schema, context, first, 10, picks, n);
    assert_int_equal(h_close(e->peer, context), KVC_OK);
}

static uint32_t hits(env *e, uint64_t first, uint32_t n)
{
    static const uint32_t part = 10;
    uint32_t found;
    assert_int_equal(h_match(e->peer, &e->schema, first, n, &part, 1, &found), KVC_OK);
    return found;
}

static void bodies_where_wanted(void **state)
{
    (void)state;
    env e;
    env_open(&e, false, 64u << 20);
    put_all(&e, 0, 100, KVC_PROMISE_MEMORY, KVC_OK, 100);
    assert_readable(&e, 0, 100);
    put_all(&e, 0, 100, KVC_PROMISE_MEMORY, KVC_EXISTS, 0);
    assert_int_equal(h_put1(e.peer, &e.schema, 200, 10, KVC_PROMISE_MEMORY), KVC_OK);
    put_all(&e, 200, 1, KVC_PROMISE_MEMORY, KVC_EXISTS, 0);
    upload *none = upload_new(e.peer, &e.schema, 0, 0);
    assert_int_equal(upload_run(none), KVC_OK);
    upload_free(none);
    env_close(&e);
}

/* Whenever the client goes, what is there is whole, and the rest can be put. */
static void torn_anywhere(void **state)
{
    (void)state;
    env e;
    uint64_t first = 0;
    env_open(&e, false, 64u << 20);
    for (uint32_t at = 1; at < 30; at++, first += 4) {
        upload *up = upload_new(e.peer, &e.schema, first, 4);
        up->cancel_at = at;
        kvc_status status = upload_run(up);
        assert_true(status == KVC_CANCELLED || (status == KVC_OK && at > 12));
        assert_nothing_kept(&e);
        uint32_t n_there = 0;
        for (uint32_t i = 0; i < 4; i++)
            n_there += hits(&e, first + i, 1);
        assert_true(n_there <= up->n_bodies && n_there >= up->n_last);
        upload_free(up);
        up = upload_new(e.peer, &e.schema, first, 4);
        assert_int_equal(upload_run(up), KVC_OK);
        assert_int_equal(up->n_bodies, 4 - n_there);
        upload_free(up);
        assert_readable(&e, first, 4);
    }
    env_close(&e);
}

/* No room for bodies: to be offered again later, and nothing else suffers. */
static void no_room_for_bodies(void **state)
{
    (void)state;
    env e;
    env_open(&e, false, 64u << 20);
    uint64_t cap = e.h.server->buffers.cap_bytes;
    e.h.server->buffers.cap_bytes = 0;
    upload *up = upload_new(e.peer, &e.schema, 0, 40);
    assert_int_equal(upload_run(up), KVC_OK);
    for (uint32_t i = 0; i < 40; i++) {
        assert_int_equal(up->last[i].status, KVC_AGAIN);
        assert_int_equal(up->last[i].retry_after_ms, KVS_RETRY_MS);
    }
    assert_int_equal(up->n_bodies, 0);
    upload_free(up);
    e.h.server->buffers.cap_bytes = cap;
    put_all(&e, 0, 40, KVC_PROMISE_MEMORY, KVC_OK, 40);
    env_close(&e);
}

static void durable_refused(void **state)
{
    (void)state;
    env e;
    env_open(&e, false, 64u << 20);
    upload *up = upload_new(e.peer, &e.schema, 0, 1);
    up->promise = KVC_PROMISE_DURABLE;
    assert_int_equal(upload_run(up), KVC_UNSUPPORTED);
    assert_non_null(strstr(up->xfer.detail, "offer 0"));
    upload_free(up);
    env_close(&e);
}

/* Puts others until what is not kept has gone. */
static void churn(env *e, uint64_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(h_put1(e->peer, &e->schema, first + i, 10, KVC_PROMISE_MEMORY), KVC_OK);
        assert_readable(e, first + i, 1);
    }
}

/* dram has room for 32 values, and half of it may be held. */
static void ttl_keeps_and_ends(void **state)
{
    (void)state;
    env e;
    env_open(&e, false, 32 * VALUE);
    upload *up = upload_new(e.peer, &e.schema, 0, 20);
    up->ttl_ms = 3600000;
    assert_int_equal(upload_run(up), KVC_OK);
    uint32_t n_granted = 0;
    for (uint32_t i = 0; i < 20; i++) {
        assert_int_equal(up->last[i].status, KVC_OK);
        assert_true(up->last[i].ttl_ms == 3600000 || up->last[i].ttl_ms == 0);
        n_granted += up->last[i].ttl_ms != 0;
    }
    assert_int_equal(n_granted, 16);
    churn(&e, 1000, 100);
    for (uint32_t i = 0; i < 20; i++)
        assert_int_equal(hits(&e, i, 1), up->last[i].ttl_ms != 0);
    upload_free(up);
    kvs_ttls_sweep(e.h.server->ttls, kvc_now_ns()); /* none is due */
    assert_int_equal(e.h.server->index->held_total, 16 * VALUE);
    kvs_ttls_sweep(e.h.server->ttls, kvc_deadline_ns(3601ull * 1000000000));
    assert_int_equal(e.h.server->index->held_total, 0);
    churn(&e, 2000, 100);
    for (uint32_t i = 0; i < 20; i++)
        assert_int_equal(hits(&e, i, 1), 0);
    /* Those that are due go in their order. */
    static const uint64_t ttls_s[] = {50, 10, 40, 20, 60, 30};
    for (uint32_t i = 0; i < 6; i++) {
        up = upload_new(e.peer, &e.schema, 3000 + i, 1);
        up->ttl_ms = ttls_s[i] * 1000;
        assert_int_equal(upload_run(up), KVC_OK);
        assert_int_equal(up->last[0].ttl_ms, up->ttl_ms);
        upload_free(up);
    }
    uint64_t now_ns = kvc_now_ns();
    for (uint64_t s = 5; s <= 65; s += 10) {
        kvs_ttls_sweep(e.h.server->ttls, now_ns + s * 1000000000);
        assert_int_equal(e.h.server->index->held_total, (65 - s) / 10 * VALUE);
    }
    env_close(&e);
}

typedef struct racer {
    kvc_thread thread;
    upload *up;
    h_peer *peer;
} racer;

static void race(void *arg)
{
    racer *r = arg;
    (void)upload_run(r->up);
}

/* Several streams put the same values at the same time: each is stored once, by one of them. */
static void streams_race(void **state)
{
    (void)state;
    enum { N = 4 };
    env e;
    racer racers[N];
    uint32_t n_ok[MAX_N] = {0};
    env_open(&e, false, 64u << 20);
    for (uint32_t r = 0; r < N; r++) {
        racers[r].peer = h_connect(e.h.listen, NULL);
        racers[r].up = upload_new(racers[r].peer, &e.schema, 0, MAX_N);
        assert_int_equal(kvc_thread_start(&racers[r].thread, "racer", race, &racers[r]), KVC_OK);
    }
    for (uint32_t r = 0; r < N; r++) {
        upload *up = racers[r].up;
        kvc_thread_join(&racers[r].thread);
        assert_int_equal(up->xfer.status, KVC_OK);
        for (uint32_t i = 0; i < MAX_N; i++) {
            n_ok[i] += up->last[i].status == KVC_OK;
            assert_true(up->last[i].status == KVC_OK || up->last[i].status == KVC_EXISTS ||
                        up->last[i].status == KVC_AGAIN);
        }
        upload_free(up);
        h_disconnect(racers[r].peer);
    }
    for (uint32_t i = 0; i < MAX_N; i++)
        assert_int_equal(n_ok[i], 1);
    assert_readable(&e, 0, MAX_N);
    env_close(&e);
}

#ifdef KVASIR_LMDB
static void durable(void **state)
{
    (void)state;
    env e;
    env_open(&e, true, 64u << 20);
    put_all(&e, 0, 60, KVC_PROMISE_DURABLE, KVC_OK, 60);
    put_all(&e, 0, 60, KVC_PROMISE_DURABLE, KVC_EXISTS, 0);
    h_disconnect(e.peer);
    h_server_stop(&e.h, false);
    h_server_start(&e.h);
    e.peer = h_connect(e.h.listen, NULL);
    assert_int_equal(hits(&e, 0, 60), 60);
    put_all(&e, 0, 60, KVC_PROMISE_DURABLE, KVC_EXISTS, 0);
    assert_readable(&e, 0, 60);
    env_close(&e);
}

/* A value that is in memory only becomes durable without its body. */
static void promise_is_raised(void **state)
{
    (void)state;
    env e;
    env_open(&e, true, 64u << 20);
    e.h.server->admission.policy = KVS_ADMIT_DURABLE_ONLY;
    put_all(&e, 0, 20, KVC_PROMISE_MEMORY, KVC_OK, 20);
    put_all(&e, 0, 20, KVC_PROMISE_DURABLE, KVC_EXISTS, 0);
    h_disconnect(e.peer);
    h_server_stop(&e.h, false);
    h_server_start(&e.h);
    e.peer = h_connect(e.h.listen, NULL);
    assert_int_equal(hits(&e, 0, 20), 20);
    assert_readable(&e, 0, 20);
    env_close(&e);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bodies_where_wanted),
        cmocka_unit_test(torn_anywhere),
        cmocka_unit_test(no_room_for_bodies),
        cmocka_unit_test(durable_refused),
        cmocka_unit_test(ttl_keeps_and_ends),
        cmocka_unit_test(streams_race),
#ifdef KVASIR_LMDB
        cmocka_unit_test(durable),
        cmocka_unit_test(promise_is_raised),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
