/*
 * map_lost_test.c: what a client cannot map, cannot tell, or was passed by a server that has gone
 * does not stay lost: nothing stays mapped or charged, and the next map is as good as any.
 *
 * Server and client are of this process. mmap and kvci_call_new are wrapped, to fail once.
 */
#include "harness.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/thread.h"
#include "kvc/client.h"

#define ROW_BYTES 512u
#define SECOND    1000000000ull
#define BLOCKS    8u
#define PART_IDS  ((const uint32_t[]){0, 10})
#define LEASE_MAX ((size_t)65536) /* a lease is shorter, a segment longer */

typedef struct rig {
    h_server h;
    char dir[256];
    h_schema schema;
    h_peer *peer;
    kvc_client *client;
    kvc_digest digests[BLOCKS];
    atomic_int n_segments; /* mapped and not unmapped */
    atomic_bool stop;
    atomic_uint n_asked;
} rig;

enum { FAIL_NOTHING, FAIL_LEASE, FAIL_SEGMENT };
static atomic_int fail_map, fail_call, n_failed;

void *__real_mmap(void *at, size_t len_bytes, int prot, int flags, int fd, off_t off_bytes);
void *__wrap_mmap(void *at, size_t len_bytes, int prot, int flags, int fd, off_t off_bytes);
void *__wrap_mmap(void *at, size_t len_bytes, int prot, int flags, int fd, off_t off_bytes)
{
    int how = len_bytes <= LEASE_MAX ? FAIL_LEASE : FAIL_SEGMENT;
    if (prot == PROT_READ && (flags & MAP_SHARED) != 0 &&
        atomic_compare_exchange_strong(&fail_map, &how, FAIL_NOTHING)) {
        atomic_fetch_add(&n_failed, 1);
        return MAP_FAILED;
    }
    return __real_mmap(at, len_bytes, prot, flags, fd, off_bytes);
}

/* A kind of calls begins with its name. */
void *__real_kvci_call_new(kvc_client *client, const char *const *kind, uint32_t n_msgs,
                           size_t extra_bytes, uint64_t deadline_ns);
void *__wrap_kvci_call_new(kvc_client *client, const char *const *kind, uint32_t n_msgs,
                           size_t extra_bytes, uint64_t deadline_ns);
void *__wrap_kvci_call_new(kvc_client *client, const char *const *kind, uint32_t n_msgs,
                           size_t extra_bytes, uint64_t deadline_ns)
{
    int one = 1;
    if (strcmp(*kind, "unmap") == 0 && atomic_load(&fail_call) == 2)
        atomic_store(&fail_call, 1); /* the map's release; what is unmapped comes after it */
    else if (strcmp(*kind, "unmap") == 0 && atomic_compare_exchange_strong(&fail_call, &one, 0)) {
        atomic_fetch_add(&n_failed, 1);
        return NULL;
    }
    return __real_kvci_call_new(client, kind, n_msgs, extra_bytes, deadline_ns);
}

static void count_segment(void *arg, const void *base, size_t len_bytes, bool mapped)
{
    rig *r = arg;
    assert_true(base != NULL && len_bytes > 0);
    atomic_fetch_add(&r->n_segments, mapped ? 1 : -1);
}

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket", r->dir);
    r->h.settings.dram_bytes = 16u << 20;
    h_schema_init(&r->schema, "lost", 2, ROW_BYTES, false);
    for (uint32_t i = 0; i < BLOCKS; i++)
        r->digests[i] = h_digest(1 + i);
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
    for (uint32_t i = 0; i < BLOCKS; i++)
        assert_int_equal(h_put(r->peer, &r->schema, 1 + i, PART_IDS, 2, KVC_PROMISE_MEMORY),
                         KVC_OK);
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .connect_timeout_ns = 60 * SECOND, .uris = r->h.listen};
    assert_int_equal(kvc_client_open(&opts, &r->client), KVC_OK);
    kvc_map_opts map = {.size_bytes = sizeof(map),
                        .all = true,
                        .on_segment = count_segment,
                        .arg = r,
                        .keep_ns = SECOND / 10};
    assert_int_equal(kvc_client_map_contexts(r->client, &map), KVC_OK);
    atomic_store(&n_failed, 0);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    rig *r = *state;
    kvc_client_close(r->client);
    assert_int_equal(atomic_load(&r->n_segments), 0);
    h_disconnect(r->peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    return 0;
}

static kvc_context *open_context(rig *r)
{
    kvc_context *context;
    assert_int_equal(
        kvc_context_open(r->client, &r->schema.digest, r->digests, BLOCKS, 0, 0, &context), KVC_OK);
    return context;
}

static void assert_maps_all(kvc_context *context)
{
    kvc_map_info info = {0};
    assert_int_equal(kvc_context_map(context, NULL, 0, kvc_deadline_ns(30 * SECOND), &info),
                     KVC_OK);
    assert_int_equal(info.values, 2 * BLOCKS);
    assert_int_equal(info.by_request, 0);
}

/* Waits for what happens off the test's thread. */
static void wait_segments(rig *r, int want)
{
    for (int i = 0; i < 30000 && atomic_load(&r->n_segments) != want; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&r->n_segments), want);
}

static void wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < 30000 && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

/* ---- cases ----------------------------------------------------------------------------------- */

static void what_cannot_be_mapped_comes_again(void **state)
{
    rig *r = *state;
    uint64_t reconnects = kvc_metric_get(KVC_M_client_reconnects);
    atomic_store(&fail_map, FAIL_SEGMENT);
    kvc_context *context = open_context(r);
    assert_int_equal(atomic_load(&n_failed), 1);
    assert_maps_all(context);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 1);
    assert_int_equal(kvc_metric_get(KVC_M_client_reconnects), reconnects); /* it was told */
    kvc_context_close(context);
    wait_segments(r, 0);
    wait_gauge(KVC_M_mapped_segments, 0);
}

static void a_lost_lease_comes_again(void **state)
{
    rig *r = *state;
    uint64_t reconnects = kvc_metric_get(KVC_M_client_reconnects);
    atomic_store(&fail_map, FAIL_LEASE);
    kvc_context *context = open_context(r);
    assert_int_equal(atomic_load(&n_failed), 1);
    assert_maps_all(context);
    assert_true(kvc_metric_get(KVC_M_client_reconnects) > reconnects);
    wait_gauge(KVC_M_mapped_segments, 1);
    wait_gauge(KVC_M_maps, 1);
    kvc_context_close(context);
}

static void what_cannot_be_told_ends_the_link(void **state)
{
    rig *r = *state;
    uint64_t reconnects = kvc_metric_get(KVC_M_client_reconnects);
    kvc_context *context = open_context(r);
    assert_int_equal(atomic_load(&r->n_segments), 1);
    atomic_store(&fail_call, 2);
    kvc_context_close(context);
    wait_segments(r, 0);
    wait_gauge(KVC_M_mapped_segments, 0);
    assert_int_equal(atomic_load(&n_failed), 1);
    context = open_context(r);
    assert_maps_all(context);
    assert_true(kvc_metric_get(KVC_M_client_reconnects) > reconnects);
    kvc_context_close(context);
}

/* Also where nothing is mapped afterwards, and where the server comes again. */
static void memory_of_a_lost_server_goes(void **state)
{
    rig *r = *state;
    kvc_context *context = open_context(r);
    assert_int_equal(atomic_load(&r->n_segments), 1);
    h_server_stop(&r->h, false);
    kvc_digest more = h_digest(100);
    assert_int_not_equal(kvc_context_extend(context, &more, 1, kvc_deadline_ns(SECOND)), KVC_OK);
    kvc_context_close(context);
    wait_segments(r, 0);
    h_server_start(&r->h);
}

/* Asks for what no server has, so that the link is looked at again and again. */
static void ask_in_vain(void *arg)
{
    rig *r = arg;
    kvc_digest unknown = h_digest(1000);
    while (!atomic_load(&r->stop)) {
        kvc_prefetch_info info;
        kvc_op op;
        kvc_op_init(&op, NULL, NULL);
        assert_int_equal(kvc_prefetch_blocks(r->client, &unknown, r->digests, 1, NULL, 0,
                                             KVC_TIER_DRAM, &info, 0, &op),
                         KVC_OK);
        (void)kvc_op_wait(&op, 0); /* NOT_FOUND, or cut off as the link is looked at */
        atomic_fetch_add(&r->n_asked, 1);
    }
}

/* A link that is only being looked at stays, and so would the maps that were not given back. */
static void a_suspect_link_gives_maps_back(void **state)
{
    rig *r = *state;
    kvc_context *contexts[64];
    kvc_digest digest;
    kvc_thread thread;
    /* A client that has registered schemas looks whether the server forgot them. */
    assert_int_equal(kvc_schema_register(r->client, &r->schema.schema, 0, &digest), KVC_OK);
    for (uint32_t i = 0; i < 64; i++)
        contexts[i] = open_context(r);
    atomic_store(&r->stop, false);
    atomic_store(&r->n_asked, 0);
    assert_int_equal(kvc_thread_start(&thread, "in-vain", ask_in_vain, r), KVC_OK);
    for (uint32_t i = 0; i < 64; i++) {
        for (int ms = 0; ms < 30000 && atomic_load(&r->n_asked) < 2 * i; ms++)
            usleep(1000);
        kvc_context_close(contexts[i]);
    }
    atomic_store(&r->stop, true);
    kvc_thread_join(&thread);
    wait_gauge(KVC_M_maps, 0);
    wait_gauge(KVC_M_map_pins, 0);
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        CASE(what_cannot_be_mapped_comes_again), CASE(a_lost_lease_comes_again),
        CASE(what_cannot_be_told_ends_the_link), CASE(memory_of_a_lost_server_goes),
        CASE(a_suspect_link_gives_maps_back),
    };
    return cmocka_run_group_tests_name("map_lost", tests, NULL, NULL);
}
