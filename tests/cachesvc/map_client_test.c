/*
 * map_client_test.c: the client library over shm against a server in this process: rows from mapped
 * memory and rows by request are the same rows, whatever happens to the context meanwhile.
 *
 * Which way the rows took is told by kvc_fetch_info.requests and by client_mapped_rows.
 */
#include "harness.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "base/thread.h"
#include "kvc/client.h"
#include "maps_internal.h"

#define ROW_BYTES 512u
#define SECOND    1000000000ull
#define MAX_PICKS 4000u
#define PART_IDS  ((const uint32_t[]){0, 10})

typedef struct rig {
    h_server h;
    char dir[256];
    h_schema schema;
    h_peer *peer;
    kvc_client *client;
    kvc_region *region;
    uint8_t *bytes; /* [MAX_PICKS * ROW_BYTES] */
    int8_t status[MAX_PICKS];
    kvc_fetch_info info;
    atomic_int n_segments; /* mapped and not unmapped */
} rig;

static void count_segment(void *arg, const void *base, size_t len_bytes, bool mapped)
{
    rig *r = arg;
    assert_true(base != NULL && len_bytes > 0);
    atomic_fetch_add(&r->n_segments, mapped ? 1 : -1);
}

static void connect_client(rig *r, const char *uris)
{
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts), .connect_timeout_ns = 60000000000ull, .uris = uris};
    assert_int_equal(kvc_client_open(&opts, &r->client), KVC_OK);
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = r->bytes,
                            .len_bytes = MAX_PICKS * ROW_BYTES,
                            .kind = KVC_MEMORY_HOST};
    assert_int_equal(kvc_region_register(r->client, &desc, &r->region), KVC_OK);
    kvc_map_opts map = {
        .size_bytes = sizeof(map), .all = true, .on_segment = count_segment, .arg = r};
    assert_int_equal(kvc_client_map_contexts(r->client, &map), KVC_OK);
}

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket", r->dir);
    r->h.settings.dram_bytes = 16u << 20;
    h_schema_init(&r->schema, "map", 2, ROW_BYTES, false);
    r->bytes = malloc(MAX_PICKS * ROW_BYTES);
    assert_non_null(r->bytes);
    *state = r;
    return 0;
}

static void start(rig *r)
{
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
    connect_client(r, r->h.listen);
}

static int teardown(void **state)
{
    rig *r = *state;
    assert_int_equal(kvc_region_deregister(r->client, r->region), KVC_OK);
    kvc_client_close(r->client);
    assert_int_equal(atomic_load(&r->n_segments), 0);
    h_disconnect(r->peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r->bytes);
    free(r);
    return 0;
}

static void put_blocks(rig *r, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++)
        assert_int_equal(h_put(r->peer, &r->schema, first + b, PART_IDS, 2, KVC_PROMISE_MEMORY),
                         KVC_OK);
}

/* A context over blocks numbers[]. */
static kvc_context *open_context(rig *r, const uint64_t *numbers, uint32_t n)
{
    kvc_digest digests[64];
    kvc_context *context;
    for (uint32_t i = 0; i < n; i++)
        digests[i] = h_digest(numbers[i]);
    assert_int_equal(kvc_context_open(r->client, &r->schema.digest, digests, n, 0, 0, &context),
                     KVC_OK);
    return context;
}

static kvc_status extend(kvc_context *context, uint64_t number)
{
    kvc_digest digest = h_digest(number);
    return kvc_context_extend(context, &digest, 1, 0);
}

static kvc_status fetch(rig *r, const kvc_pick_group *groups, uint32_t n)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    memset(r->bytes, 0xcd, MAX_PICKS * ROW_BYTES);
    memset(r->status, 0x55, sizeof(r->status));
    kvc_status status = kvc_fetch(r->client, groups, n, r->region, r->status, &r->info, 0, &op);
    return status == KVC_OK ? kvc_op_wait(&op, 0) : status;
}

/* Fetches every row of some blocks of a part and compares; numbers[i] 0: not there. */
static void expect_rows(rig *r, kvc_context *context, uint32_t part, const uint64_t *numbers,
                        uint32_t n)
{
    static uint32_t picks[MAX_PICKS];
    for (uint32_t i = 0; i < n * H_TOKENS; i++)
        picks[i] = i;
    kvc_pick_group group = {.context = context,
                            .part = part,
                            .row_bytes = ROW_BYTES,
                            .n_picks = n * H_TOKENS,
                            .picks = picks};
    assert_int_equal(fetch(r, &group, 1), KVC_OK);
    for (uint32_t i = 0; i < n * H_TOKENS; i++) {
        uint64_t number = numbers[i / H_TOKENS];
        const uint8_t *row = r->bytes + i * ROW_BYTES;
        assert_int_equal(r->status[i], number == 0 ? KVC_NOT_FOUND : KVC_OK);
        if (number != 0)
            assert_true(h_row_is(number, part, i % H_TOKENS, ROW_BYTES, row));
        else
            assert_true(row[0] == 0xcd && row[ROW_BYTES - 1] == 0xcd); /* untouched */
    }
}

/* ---- cases ------------------------------------------------------------------------------------
 */

static void mapped_and_asked_rows_are_the_same(void **state)
{
    rig *r = *state;
    uint64_t numbers[24], random = 12345;
    start(r);
    for (uint32_t i = 0; i < 24; i++)
        numbers[i] = 100 + i;
    put_blocks(r, 100, 20); /* of the last four there is nothing */
    kvc_context *context = open_context(r, numbers, 24);
    uint64_t mapped = kvc_metric_get(KVC_M_client_mapped_rows);
    for (uint32_t round = 0; round < 60; round++) {
        static uint32_t picks[2][700], slots[700];
        static uint8_t first[MAX_PICKS * ROW_BYTES];
        static int8_t first_status[MAX_PICKS];
        kvc_pick_group groups[2];
        uint32_t n[2] = {(uint32_t)(h_random(&random) % 700), (uint32_t)(h_random(&random) % 700)};
        for (uint32_t i = 0; i < 700; i++)
            slots[i] = i;
        for (uint32_t i = 699; i > 0; i--) {
            uint32_t k = (uint32_t)(h_random(&random) % (i + 1)), swap = slots[i];
            slots[i] = slots[k];
            slots[k] = swap;
        }
        for (uint32_t g = 0; g < 2; g++) {
            for (uint32_t i = 0; i < 700; i++) /* also beyond the context */
                picks[g][i] = (uint32_t)(h_random(&random) % (26 * H_TOKENS));
            groups[g] = (kvc_pick_group){.context = context,
                                         .part = PART_IDS[g],
                                         .row_bytes = ROW_BYTES,
                                         .n_picks = n[g],
                                         .picks = picks[g],
                                         .dst_slots = g == 0 ? slots : NULL,
                                         .dst_off_bytes = g * 700 * ROW_BYTES};
        }
        assert_int_equal(fetch(r, groups, 2), KVC_OK);
        memcpy(first, r->bytes, sizeof(first));
        memcpy(first_status, r->status, sizeof(first_status));
        kvc_fetch_info by_map = r->info;
        if (round % 8 == 0) { /* else it would be mapped anew each time */
            kvc_context_unmap(context);
            assert_int_equal(fetch(r, groups, 2), KVC_OK);
            assert_true(r->info.requests >= 1 || n[0] + n[1] == 0);
            assert_memory_equal(first, r->bytes, sizeof(first));
            assert_memory_equal(first_status, r->status, sizeof(first_status));
            assert_int_equal(by_map.rows_dram, r->info.rows_dram);
            assert_int_equal(by_map.rows_missing, r->info.rows_missing);
            assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_OK);
        }
    }
    assert_true(kvc_metric_get(KVC_M_client_mapped_rows) > mapped + 10000);
    kvc_context_close(context);
}

static void no_request_where_all_is_mapped(void **state)
{
    rig *r = *state;
    const uint64_t numbers[6] = {1, 2, 3, 4, 5, 6};
    kvc_map_info info;
    kvc_mapped_value value;
    start(r);
    put_blocks(r, 1, 5);
    kvc_context *context = open_context(r, numbers, 4);
    uint64_t calls = kvc_metric_get(KVC_M_requests);
    expect_rows(r, context, 0, numbers, 4);
    expect_rows(r, context, 10, numbers, 4);
    assert_int_equal(r->info.requests, 0);
    assert_int_equal(r->info.rows_dram, 4 * H_TOKENS);
    assert_int_equal(kvc_metric_get(KVC_M_requests), calls);
    assert_true(atomic_load(&r->n_segments) > 0);
    assert_int_equal(kvc_context_locate(context, 10, 3, &value), KVC_OK);
    assert_true(h_row_is(4, 10, 7, ROW_BYTES, (const uint8_t *)value.rows + 7 * value.row_bytes));
    assert_true(kvc_context_is_mapped(context, value.stamp));
    assert_int_equal(kvc_context_locate(context, 10, 4, &value), KVC_NOT_FOUND);
    /* It grows by itself; what is not there when it grows goes by request, also later. */
    assert_int_equal(extend(context, 5), KVC_OK);
    assert_int_equal(extend(context, 6), KVC_OK);
    expect_rows(r, context, 0, numbers, 5);
    assert_int_equal(r->info.requests, 0);
    put_blocks(r, 6, 1);
    expect_rows(r, context, 0, numbers, 6);
    assert_int_equal(r->info.requests, 1);
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, &info), KVC_OK);
    assert_int_equal(info.values, 10);
    assert_int_equal(info.by_request, 2);
    assert_true(info.pinned_bytes > 0 && info.pinned_bytes <= info.max_bytes);
    /* Anew, it has all; another choice of parts takes the place of the first. */
    kvc_context_unmap(context);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    assert_int_equal(kvc_context_map(context, PART_IDS + 1, 1, 0, &info), KVC_OK);
    assert_int_equal(info.values, 6);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 6);
    expect_rows(r, context, 10, numbers, 6);
    assert_int_equal(r->info.requests, 0);
    expect_rows(r, context, 0, numbers, 6);
    assert_int_equal(r->info.requests, 1);
    assert_int_equal(kvc_context_map(context, PART_IDS, 2, 0, &info), KVC_OK);
    assert_int_equal(info.values, 12);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 12);
    assert_int_equal(kvc_context_map(context, (const uint32_t[]){77}, 1, 0, NULL), KVC_INVALID);
    kvc_context_close(context);
    assert_int_equal(kvc_metric_get(KVC_M_maps), 0);
}

/* Blocks that took the place of others are not read from where those were. */
static void a_cut_context_forgets_its_end(void **state)
{
    rig *r = *state;
    uint64_t numbers[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    kvc_context *twin;
    start(r);
    put_blocks(r, 1, 20);
    kvc_context *context = open_context(r, numbers, 8);
    expect_rows(r, context, 0, numbers, 8);
    assert_int_equal(kvc_context_fork(context, 6, 0, 0, &twin), KVC_OK);
    assert_int_equal(kvc_context_truncate(context, 5, 0), KVC_OK);
    uint64_t gone[8] = {1, 2, 3, 4, 5, 0, 0, 0};
    expect_rows(r, context, 0, gone, 8);
    for (uint32_t i = 5; i < 8; i++) {
        numbers[i] = 10 + i;
        assert_int_equal(extend(context, numbers[i]), KVC_OK);
    }
    expect_rows(r, context, 0, numbers, 8);
    assert_int_equal(r->info.requests, 0);
    expect_rows(r, twin, 10, (const uint64_t[]){1, 2, 3, 4, 5, 6}, 6);
    assert_int_equal(r->info.requests, 0);
    kvc_context_close(twin);
    kvc_context_close(context);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
}

/* What was cut off is not pinned for ever, however often a context is cut and grows again. */
static void cuts_give_pins_back(void **state)
{
    rig *r = *state;
    const uint64_t numbers[2] = {1, 2};
    start(r);
    put_blocks(r, 1, 30);
    kvc_context *context = open_context(r, numbers, 2);
    for (uint32_t i = 0; i < 14; i++) {
        assert_int_equal(extend(context, 3 + 2 * i), KVC_OK);
        assert_int_equal(extend(context, 4 + 2 * i), KVC_OK);
        assert_int_equal(kvc_metric_get(KVC_M_map_pins), 8);
        assert_int_equal(kvc_metric_get(KVC_M_maps), 1);
        expect_rows(r, context, 10, (const uint64_t[]){1, 2, 3 + 2 * i, 4 + 2 * i}, 4);
        assert_int_equal(r->info.requests, 0);
        assert_int_equal(kvc_context_truncate(context, 2, 0), KVC_OK);
    }
    kvc_context_close(context);
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
}

static void erased_rows_are_gone_at_once(void **state)
{
    rig *r = *state;
    const uint64_t numbers[4] = {1, 2, 3, 4};
    kvc_mapped_value value;
    start(r);
    put_blocks(r, 1, 4);
    kvc_context *context = open_context(r, numbers, 4);
    expect_rows(r, context, 0, numbers, 4);
    assert_int_equal(kvc_context_locate(context, 0, 0, &value), KVC_OK);
    kvc_digest digest = h_digest(2);
    kvc_request req = {.method = KVC_ERASE};
    req.u.erase.schema = r->schema.digest;
    req.u.erase.digests = &digest;
    req.u.erase.n_digests = 1;
    assert_int_equal(h_call(r->peer, &req), KVC_OK); /* another client's */
    assert_false(kvc_context_is_mapped(context, value.stamp));
    expect_rows(r, context, 0, (const uint64_t[]){1, 0, 3, 4}, 4);
    assert_int_equal(r->info.requests, 1);
    put_blocks(r, 50, 4); /* into the slots that the erase has freed */
    expect_rows(r, context, 10, (const uint64_t[]){1, 0, 3, 4}, 4);
    put_blocks(r, 2, 1);
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_OK);
    expect_rows(r, context, 0, numbers, 4);
    assert_int_equal(r->info.requests, 0);
    kvc_context_close(context);
}

static void a_new_server_is_mapped_anew(void **state)
{
    rig *r = *state;
    const uint64_t numbers[5] = {1, 2, 3, 4, 5};
    start(r);
    put_blocks(r, 1, 4);
    kvc_context *context = open_context(r, numbers, 4);
    expect_rows(r, context, 0, numbers, 4);
    assert_int_equal(r->info.requests, 0);
    h_server_stop(&r->h, false);
    h_server_start(&r->h);
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
    put_blocks(r, 1, 5);
    assert_int_equal(extend(context, 5), KVC_OK);
    expect_rows(r, context, 0, numbers, 5);
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_OK);
    expect_rows(r, context, 10, numbers, 5);
    assert_int_equal(r->info.requests, 0);
    kvc_context_close(context);
}

/* Puts through the staging ring and fetches beyond the caps, all by the public interface. */
static void caps_change_nothing_but_the_way(void **state)
{
    rig *r = *state;
    const uint64_t numbers[6] = {1, 2, 3, 4, 5, 6};
    kvc_map_info info;
    r->h.settings.max_map_pin_bytes = 7 * ROW_BYTES * H_TOKENS;
    start(r);
    put_blocks(r, 1, 6);
    kvc_context *context = open_context(r, numbers, 6);
    expect_rows(r, context, 0, numbers, 6);
    assert_int_equal(r->info.requests, 1);
    expect_rows(r, context, 10, numbers, 6);
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, &info), KVC_OK);
    assert_int_equal(info.values, 7);
    assert_int_equal(info.by_request, 5);
    assert_int_equal(info.pinned_bytes, info.max_bytes);
    kvc_context_close(context);
}

/* Waits for what happens off the test's thread. */
static void wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < 30000 && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

static void wait_segments(rig *r, int want)
{
    for (int i = 0; i < 30000 && atomic_load(&r->n_segments) != want; i++)
        usleep(1000);
    assert_int_equal(atomic_load(&r->n_segments), want);
}

/* Memory that no context is in goes back by itself, and comes again where one is. */
static void what_no_map_has_is_given_back(void **state)
{
    rig *r = *state;
    kvc_map_opts map = {.size_bytes = sizeof(map),
                        .all = true,
                        .on_segment = count_segment,
                        .arg = r,
                        .keep_ns = 1};
    start(r);
    assert_int_equal(kvc_client_map_contexts(r->client, &map), KVC_OK);
    put_blocks(r, 1, 60); /* of both parts: 120 values, 32 a segment */
    for (uint64_t round = 0; round < 6; round++) {
        const uint64_t low[2] = {1, 2}, high[2] = {59, 60};
        kvc_context *first = open_context(r, low, 2), *second = open_context(r, high, 2);
        expect_rows(r, first, 0, low, 2);
        assert_int_equal(r->info.requests, 0);
        expect_rows(r, second, 10, high, 2);
        assert_int_equal(r->info.requests, 0);
        assert_int_equal(atomic_load(&r->n_segments), 2);
        assert_int_equal(kvc_metric_get(KVC_M_mapped_segments), 2);
        kvc_context_close(first);
        wait_segments(r, 1);
        wait_gauge(KVC_M_mapped_segments, 1);
        expect_rows(r, second, 0, high, 2);
        assert_int_equal(r->info.requests, 0);
        kvc_context_close(second);
        wait_segments(r, 0);
        wait_gauge(KVC_M_mapped_segments, 0);
        assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    }
}

/* Who still reads keeps what is read mapped, also when the map has been given back. */
static void what_is_held_stays_mapped(void **state)
{
    rig *r = *state;
    const uint64_t numbers[2] = {1, 2};
    kvc_mapped_value value;
    kvc_map_opts map = {.size_bytes = sizeof(map),
                        .all = true,
                        .on_segment = count_segment,
                        .arg = r,
                        .keep_ns = 1};
    start(r);
    assert_int_equal(kvc_client_map_contexts(r->client, &map), KVC_OK);
    put_blocks(r, 1, 2);
    kvc_context *context = open_context(r, numbers, 2);
    assert_int_equal(kvc_context_locate(context, 10, 1, &value), KVC_OK);
    kvc_map_hold *hold = kvc_context_hold_map(context, value.stamp);
    assert_non_null(hold);
    assert_null(kvc_context_hold_map(context, value.stamp + 1));
    kvc_context_unmap(context);
    assert_null(kvc_context_hold_map(context, value.stamp));
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_OK);
    kvc_context_unmap(context);
    usleep(100000); /* long enough for a sweep */
    assert_int_equal(atomic_load(&r->n_segments), 1);
    assert_true(h_row_is(2, 10, 7, ROW_BYTES, (const uint8_t *)value.rows + 7 * value.row_bytes));
    kvc_map_let_go(hold);
    kvc_map_let_go(NULL);
    wait_segments(r, 0);
    kvc_context_close(context);
}

/* A server that does not answer while a thread of the test holds its maps. */
typedef struct hang {
    rig *r;
    atomic_bool begun, over;
    kvc_thread thread;
} hang;

static void hold_maps(void *arg)
{
    hang *h = arg;
    kvc_mutex_lock(&h->r->h.server->maps->lock);
    atomic_store(&h->begun, true);
    while (!atomic_load(&h->over))
        usleep(1000);
    kvc_mutex_unlock(&h->r->h.server->maps->lock);
}

static void begin_hang(rig *r, hang *h)
{
    *h = (hang){.r = r};
    assert_int_equal(kvc_thread_start(&h->thread, "hang", hold_maps, h), KVC_OK);
    while (!atomic_load(&h->begun))
        usleep(1000);
}

static void end_hang(hang *h)
{
    atomic_store(&h->over, true);
    kvc_thread_join(&h->thread);
}

/* Its caller has gone when the answer comes: nothing stays pinned, nothing breaks, and the next one
 * maps as ever. */
static void a_late_map_harms_nobody(void **state)
{
    rig *r = *state;
    const uint64_t numbers[4] = {1, 2, 3, 4};
    kvc_map_opts map = {.size_bytes = sizeof(map), .on_segment = count_segment, .arg = r};
    hang h;
    start(r);
    assert_int_equal(kvc_client_map_contexts(r->client, &map), KVC_OK);
    put_blocks(r, 1, 4);
    uint64_t reconnects = kvc_metric_get(KVC_M_client_reconnects);
    uint64_t late = kvc_metric_get(KVC_M_client_maps_abandoned);
    /* On a busy machine a deadline may pass before the question is asked. */
    for (uint32_t round = 0;
         round < 2 || (round < 20 && late == kvc_metric_get(KVC_M_client_maps_abandoned));
         round++) {
        kvc_context *context = open_context(r, numbers, 4), *gone = open_context(r, numbers, 4);
        begin_hang(r, &h);
        assert_int_equal(kvc_context_map(gone, NULL, 0, kvc_deadline_ns(SECOND), NULL),
                         KVC_TIMED_OUT);
        assert_int_equal(kvc_context_map(context, NULL, 0, kvc_deadline_ns(SECOND / 10), NULL),
                         KVC_TIMED_OUT); /* it is not its turn */
        end_hang(&h);
        kvc_context_close(gone);
        /* Waits its turn, or is asked for a second time. */
        assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_OK);
        expect_rows(r, context, 10, numbers, 4);
        assert_int_equal(r->info.requests, 0);
        kvc_context_close(context);
        wait_gauge(KVC_M_maps, 0);
        wait_gauge(KVC_M_map_pins, 0);
    }
    assert_true(kvc_metric_get(KVC_M_client_maps_abandoned) > late);
    assert_int_equal(kvc_metric_get(KVC_M_client_reconnects), reconnects);
    /* A client may close while an answer is awaited. */
    kvc_context *context = open_context(r, numbers, 4);
    begin_hang(r, &h);
    assert_int_equal(kvc_context_map(context, NULL, 0, kvc_deadline_ns(SECOND / 5), NULL),
                     KVC_TIMED_OUT);
    kvc_context_close(context);
    end_hang(&h);
}

/* Closing does not wait for a server that does not answer, but for the first second. */
static void closing_does_not_wait_for_each(void **state)
{
    rig *r = *state;
    const uint64_t numbers[2] = {1, 2};
    enum { MANY = 40 };
    kvc_context *contexts[MANY];
    hang h;
    start(r);
    put_blocks(r, 1, 2);
    for (uint32_t i = 0; i < MANY; i++)
        contexts[i] = open_context(r, numbers, 2);
    assert_int_equal(kvc_metric_get(KVC_M_maps), MANY);
    begin_hang(r, &h);
    uint64_t began_ns = kvc_now_ns();
    for (uint32_t i = 0; i < MANY; i++)
        kvc_context_close(contexts[i]);
    uint64_t took_ns = kvc_now_ns() - began_ns;
    end_hang(&h);
    assert_true(took_ns < MANY * SECOND); /* what waiting for each takes at the least; it is one */
    wait_gauge(KVC_M_maps, 0);
}

static void other_transports_go_by_request(void **state)
{
    rig *r = *state;
    const uint64_t numbers[2] = {1, 2};
    snprintf(r->h.listen, sizeof(r->h.listen), "inproc://map-client-%d", (int)getpid());
    start(r);
    put_blocks(r, 1, 2);
    kvc_context *context = open_context(r, numbers, 2);
    expect_rows(r, context, 0, numbers, 2);
    assert_int_equal(r->info.requests, 1);
    assert_int_equal(kvc_context_map(context, NULL, 0, 0, NULL), KVC_UNSUPPORTED);
    kvc_context_close(context);
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)
    const struct CMUnitTest tests[] = {
        CASE(mapped_and_asked_rows_are_the_same), CASE(no_request_where_all_is_mapped),
        CASE(a_cut_context_forgets_its_end),      CASE(erased_rows_are_gone_at_once),
        CASE(a_new_server_is_mapped_anew),        CASE(caps_change_nothing_but_the_way),
        CASE(other_transports_go_by_request),     CASE(cuts_give_pins_back),
        CASE(what_no_map_has_is_given_back),      CASE(a_late_map_harms_nobody),
        CASE(what_is_held_stays_mapped),          CASE(a_late_map_harms_nobody),
        CASE(closing_does_not_wait_for_each),
    };
    return cmocka_run_group_tests_name("map_client", tests, NULL, NULL);
}
