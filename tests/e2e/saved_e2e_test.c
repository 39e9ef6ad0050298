/*
 * saved_e2e_test.c: the C library's contexts by name against a real cachesvc: pieces over several
 * messages, kill -9, a reader beside a writer that replaces, and a schema by its digest.
 */
#include "store.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "base/clock.h"
#include "base/digest.h"
#include "base/thread.h"

#define N_BLOCKS 20000u
#define N_TAIL   5u
#define N_IDS    (N_BLOCKS * STORE_BLOCK_TOKENS + N_TAIL)

typedef struct content {
    kvc_saved_context context;
    kvc_digest *digests;
    uint32_t *ids;
    uint8_t *tail;
    size_t tail_bytes;
} content;

static const uint32_t parts[] = {0, 1};

/* What generation number g of a name holds. */
static void fill(content *c, const store *s, const char *name, uint32_t g)
{
    c->tail_bytes = (size_t)N_TAIL * (store_row_bytes[0] + store_row_bytes[1]);
    c->digests = malloc(N_BLOCKS * sizeof(*c->digests));
    c->ids = malloc(N_IDS * sizeof(*c->ids));
    c->tail = malloc(c->tail_bytes);
    assert_true(c->digests != NULL && c->ids != NULL && c->tail != NULL);
    for (uint32_t i = 0; i < N_BLOCKS; i++)
        memset(&c->digests[i], (int)(i * 7 + g), sizeof(c->digests[i]));
    for (uint32_t i = 0; i < N_IDS; i++)
        c->ids[i] = i * 2654435761u + g;
    memset(c->tail, (int)g, c->tail_bytes);
    c->context = (kvc_saved_context){.name = name,
                                     .schema = s->schema,
                                     .promise = KVC_PROMISE_DURABLE,
                                     .n_blocks = N_BLOCKS,
                                     .n_ids = N_IDS,
                                     .n_tail = N_TAIL,
                                     .n_tail_parts = 2,
                                     .tail_parts = parts};
}

static void content_free(content *c)
{
    free(c->digests);
    free(c->ids);
    free(c->tail);
}

static kvc_status put(const store *s, const content *c, kvc_saved_when when, uint64_t *g_p)
{
    return kvc_saved_put(s->client, &c->context, c->digests, c->ids, c->tail, c->tail_bytes, &when,
                         0, g_p);
}

static bool same(const kvc_saved *saved, const content *c)
{
    return saved->context.n_blocks == N_BLOCKS && saved->context.n_ids == N_IDS &&
           saved->context.n_tail == N_TAIL && saved->context.n_tail_parts == 2 &&
           saved->context.tail_parts[1] == parts[1] && saved->tail_bytes == c->tail_bytes &&
           memcmp(saved->digests, c->digests, N_BLOCKS * sizeof(kvc_digest)) == 0 &&
           memcmp(saved->ids, c->ids, N_IDS * sizeof(uint32_t)) == 0 &&
           memcmp(saved->tail, c->tail, c->tail_bytes) == 0;
}

static bool count_one(void *arg, const kvc_saved_context *context)
{
    assert_true(context->body_bytes > 0);
    return ++*(uint32_t *)arg < 3;
}

static void test_put_get_kill(void **state)
{
    (void)state;
    store s;
    content one, two;
    kvc_saved *saved;
    uint64_t g1, g2;
    uint32_t n = 0;
    store_open(&s, "16MiB", true);
    fill(&one, &s, "a", 1);
    fill(&two, &s, "a", 2);
    assert_int_equal(kvc_saved_get(s.client, "a", 0, &saved), KVC_NOT_FOUND);
    assert_null(saved);
    assert_ok(put(&s, &one, (kvc_saved_when){0}, &g1));
    assert_int_equal(put(&s, &two, (kvc_saved_when){0}, &g2), KVC_EXISTS);
    assert_int_equal(g2, 0);
    store_end(&s, SIGKILL);
    store_start(&s);
    assert_ok(kvc_saved_get(s.client, "a", 0, &saved));
    assert_true(same(saved, &one));
    assert_int_equal(saved->context.generation, g1);
    kvc_saved_free(saved);
    assert_ok(put(&s, &two, (kvc_saved_when){.if_generation = g1}, &g2));
    assert_true(g2 > g1);
    assert_ok(kvc_saved_get(s.client, "a", 0, &saved));
    assert_true(same(saved, &two));
    kvc_saved_free(saved);
    for (uint32_t i = 0; i < 4; i++) {
        char name[8];
        (void)snprintf(name, sizeof(name), "b%u", i);
        kvc_saved_context small = {
            .name = name, .schema = s.schema, .promise = KVC_PROMISE_MEMORY, .n_blocks = 1};
        assert_ok(kvc_saved_put(s.client, &small, one.digests, NULL, NULL, 0, &(kvc_saved_when){0},
                                0, NULL));
    }
    assert_ok(kvc_saved_list(s.client, 0, count_one, &n));
    assert_int_equal(n, 3);
    assert_int_equal(kvc_saved_delete(s.client, "a", g1, 0), KVC_EXISTS);
    assert_ok(kvc_saved_delete(s.client, "a", g2, 0));
    assert_int_equal(kvc_saved_delete(s.client, "a", 0, 0), KVC_NOT_FOUND);
    assert_int_equal(kvc_saved_get(s.client, "a b", 0, &saved), KVC_INVALID);
    content_free(&one);
    content_free(&two);
    store_close(&s);
}

typedef struct writer {
    store *s;
    const content *contents;
    atomic_bool stop;
    _Atomic uint32_t n;
    kvc_status status;
} writer;

static void writer_main(void *arg)
{
    writer *w = arg;
    while (!atomic_load(&w->stop) && w->status == KVC_OK) {
        const content *next = &w->contents[atomic_load(&w->n) % 2];
        w->status = put(w->s, next, (kvc_saved_when){.replace = true}, NULL);
        atomic_fetch_add(&w->n, 1);
    }
}

/* A reader beside a writer that replaces gets one or the other, never a mixture. */
static void test_get_while_replaced(void **state)
{
    (void)state;
    store s;
    content contents[2];
    uint32_t n_good = 0;
    kvc_thread thread;
    store_open(&s, "16MiB", true);
    fill(&contents[0], &s, "x", 10);
    fill(&contents[1], &s, "x", 11);
    assert_ok(put(&s, &contents[1], (kvc_saved_when){0}, NULL));
    writer w = {.s = &s, .contents = contents};
    assert_ok(kvc_thread_start(&thread, "writer", writer_main, &w));
    uint64_t give_up_ns = kvc_now_ns() + 60000000000u;
    for (uint32_t i = 0; i < 30 || n_good == 0 || atomic_load(&w.n) < 2; i++) {
        assert_true(kvc_now_ns() < give_up_ns);
        kvc_saved *saved;
        kvc_status status = kvc_saved_get(s.client, "x", 0, &saved);
        if (status == KVC_NOT_FOUND)
            continue; /* replaced each time that it was read */
        assert_ok(status);
        assert_true(same(saved, &contents[0]) || same(saved, &contents[1]));
        n_good++;
        kvc_saved_free(saved);
    }
    atomic_store(&w.stop, true);
    kvc_thread_join(&thread);
    assert_ok(w.status);
    content_free(&contents[0]);
    content_free(&contents[1]);
    store_close(&s);
}

static void test_schema_get(void **state)
{
    (void)state;
    store s;
    kvc_schema *schema;
    kvc_digest digest;
    store_open(&s, "16MiB", false);
    assert_ok(kvc_schema_get(s.client, &s.schema, 0, &schema));
    assert_ok(kvc_schema_digest(schema, &digest));
    assert_true(kvc_digest_equal(&digest, &s.schema));
    free(schema);
    digest.bytes[3] ^= 1;
    assert_int_equal(kvc_schema_get(s.client, &digest, 0, &schema), KVC_NOT_FOUND);
    assert_null(schema);
    store_close(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_put_get_kill),
        cmocka_unit_test(test_get_while_replaced),
        cmocka_unit_test(test_schema_get),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
