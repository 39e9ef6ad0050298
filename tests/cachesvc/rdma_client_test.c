/*
 * rdma_client_test.c: the client library over rdma:// against a server in this process, on verbs
 * without a device: values put by READs, rows written by WRITEs, and its option `sums`.
 *
 * A byte that changes under way is told of with sums; without them it is in the rows.
 */
#include "harness.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/metrics.h"
#include "fake_verbs.h"
#include "kvc/client.h"

#define ROW_BYTES   512u
#define VALUE_BYTES (H_TOKENS * ROW_BYTES)
#define N_PUT       4u
#define N_ROWS      (N_PUT * H_TOKENS)

typedef struct rig {
    h_server h;
    h_schema schema;
    kvc_client *client;
    kvc_region *region;
    kvc_context *context;
    uint8_t *bytes; /* [N_PUT * VALUE_BYTES] */
    int8_t status[N_ROWS];
} rig;

/* How a client asks for sums. */
enum { NO_SUMS, SUMS_BY_OPTION, SUMS_BY_URI };

static void open_rig(rig *r, int sums)
{
    char uri[256];
    fake_verbs_use(NULL);
    h_listen = "rdma://127.0.0.1:0";
    h_server_init(&r->h);
    h_server_start(&r->h);
    h_schema_init(&r->schema, "rdma", 1, ROW_BYTES, false);
    r->bytes = malloc(N_PUT * VALUE_BYTES);
    assert_non_null(r->bytes);
    (void)snprintf(uri, sizeof(uri), "%s%s", kvs_server_uri(r->h.server, 0),
                   sums == SUMS_BY_OPTION ? ""
                   : sums == SUMS_BY_URI  ? "?sums=1"
                                          : "?sums=0");
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .connect_timeout_ns = 60000000000ull,
                            .uris = uri,
                            .n_channels = 1,
                            .sums = sums != SUMS_BY_URI, /* an address that says has its way */
                            .region_bytes = 64u << 20};
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = r->bytes,
                            .len_bytes = N_PUT * VALUE_BYTES,
                            .kind = KVC_MEMORY_HOST};
    assert_int_equal(kvc_client_open(&opts, &r->client), KVC_OK);
    assert_int_equal(kvc_client_sums(r->client), sums != NO_SUMS);
    assert_int_equal(kvc_region_register(r->client, &desc, &r->region), KVC_OK);
    assert_int_equal(kvc_schema_register(r->client, &r->schema.schema, 0, &r->schema.digest),
                     KVC_OK);
}

static void close_rig(rig *r)
{
    fake_verbs_fault(&fake_no_faults);
    kvc_context_close(r->context);
    assert_int_equal(kvc_region_deregister(r->client, r->region), KVC_OK);
    kvc_client_close(r->client);
    h_server_stop(&r->h, false);
    h_server_fini(&r->h);
    free(r->bytes);
    assert_true(fake_verbs_all_gone());
}

static void flip(enum ibv_wr_opcode opcode, uint32_t after)
{
    fake_faults fault = fake_no_faults;
    fault.flip = opcode;
    fault.flip_after = after;
    fake_verbs_fault(&fault);
}

static kvc_status put(rig *r, uint64_t first)
{
    kvc_value values[N_PUT];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < N_PUT; i++) {
        h_fill(first + i, 0, ROW_BYTES, r->bytes + i * VALUE_BYTES);
        values[i] = (kvc_value){.digest = h_digest(first + i),
                                .len_bytes = VALUE_BYTES,
                                .src_off_bytes = i * VALUE_BYTES};
    }
    assert_int_equal(kvc_put(r->client, &r->schema.digest, KVC_PROMISE_MEMORY, values, N_PUT,
                             r->region, r->status, 0, &op),
                     KVC_OK);
    kvc_status status = kvc_op_wait(&op, 0);
    for (uint32_t i = 0; i < N_PUT && status == KVC_OK; i++)
        status = (kvc_status)r->status[i];
    return status;
}

static void open_context(rig *r, uint64_t first)
{
    kvc_digest digests[N_PUT];
    for (uint32_t i = 0; i < N_PUT; i++)
        digests[i] = h_digest(first + i);
    assert_int_equal(
        kvc_context_open(r->client, &r->schema.digest, digests, N_PUT, 0, 0, &r->context), KVC_OK);
}

/* Row i of the context to slot N_ROWS - 1 - i, if backwards. */
static kvc_status fetch_to(rig *r, bool backwards)
{
    uint32_t picks[N_ROWS], slots[N_ROWS];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < N_ROWS; i++) {
        picks[i] = i;
        slots[i] = backwards ? N_ROWS - 1 - i : i;
    }
    kvc_pick_group group = {.context = r->context,
                            .row_bytes = ROW_BYTES,
                            .n_picks = N_ROWS,
                            .picks = picks,
                            .dst_slots = slots};
    memset(r->bytes, 0xcd, N_PUT * VALUE_BYTES);
    assert_int_equal(kvc_fetch(r->client, &group, 1, r->region, r->status, NULL, 0, &op), KVC_OK);
    return kvc_op_wait(&op, 0);
}

static kvc_status fetch(rig *r)
{
    return fetch_to(r, false);
}

static uint32_t wrong_rows(const rig *r, uint64_t first)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < N_ROWS; i++)
        n += !h_row_is(first + i / H_TOKENS, 0, i % H_TOKENS, ROW_BYTES, r->bytes + i * ROW_BYTES);
    return n;
}

static void test_rows_by_writes(void **state)
{
    (void)state;
    rig r = {0};
    open_rig(&r, NO_SUMS);
    assert_int_equal(put(&r, 1), KVC_OK);
    assert_true(fake_verbs_posted(IBV_WR_RDMA_READ) > 0);
    open_context(&r, 1);
    assert_int_equal(fetch(&r), KVC_OK);
    assert_int_equal(wrong_rows(&r, 1), 0);
    assert_true(fake_verbs_posted(IBV_WR_RDMA_WRITE) > 0);
    flip(IBV_WR_RDMA_WRITE, 1);
    assert_int_equal(fetch(&r), KVC_OK); /* nobody has looked */
    assert_int_equal(fake_verbs_hits(), 1);
    assert_int_equal(wrong_rows(&r, 1), 1);
    close_rig(&r);
}

static void erase(rig *r, uint64_t block)
{
    kvc_digest digest = h_digest(block);
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(kvc_erase(r->client, &r->schema.digest, &digest, 1, NULL, 0, NULL, 0, &op),
                     KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
}

/* Rows go where they belong without a copy, once the region is registered, which its end undoes;
 * those that are missing leave their slots alone. */
static void test_rows_without_a_copy(void **state)
{
    (void)state;
    rig r = {0};
    open_rig(&r, NO_SUMS);
    assert_int_equal(put(&r, 1), KVC_OK);
    open_context(&r, 1);
    erase(&r, 3); /* the third of four blocks */
    uint64_t give_up_ns = kvc_deadline_ns(20000000000ull);
    uint64_t placed = 0, want = (uint64_t)(N_PUT - 1) * VALUE_BYTES;
    while (placed != want && !kvc_expired(give_up_ns)) {
        uint64_t before = kvc_metric_get(KVC_M_rdma_placed_bytes);
        assert_int_equal(fetch_to(&r, true), KVC_OK);
        placed = kvc_metric_get(KVC_M_rdma_placed_bytes) - before;
        for (uint32_t i = 0; i < N_ROWS; i++) {
            const uint8_t *slot = r.bytes + (size_t)(N_ROWS - 1 - i) * ROW_BYTES;
            bool gone = i / H_TOKENS == 2;
            assert_int_equal(r.status[i], gone ? KVC_NOT_FOUND : KVC_OK);
            assert_true(gone ? slot[0] == 0xcd && slot[ROW_BYTES - 1] == 0xcd
                             : h_row_is(1 + i / H_TOKENS, 0, i % H_TOKENS, ROW_BYTES, slot));
        }
    }
    assert_int_equal(placed, want);
    assert_true(fake_verbs_registered(r.bytes));
    assert_int_equal(kvc_region_deregister(r.client, r.region), KVC_OK);
    assert_false(fake_verbs_registered(r.bytes));
    r.region = NULL;
    close_rig(&r);
}

static void check_sums(int how)
{
    rig r = {0};
    open_rig(&r, how);
    uint64_t wrong = kvc_metric_get(KVC_M_rdma_sums_wrong);
    flip(IBV_WR_RDMA_READ, 1);
    assert_int_equal(put(&r, 1), KVC_CORRUPT);
    assert_int_equal(fake_verbs_hits(), 1);
    assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong), wrong + 1);
    assert_int_equal(put(&r, 1), KVC_OK); /* so nothing of the first is there */
    open_context(&r, 1);
    flip(IBV_WR_RDMA_WRITE, 1);
    assert_int_equal(fetch(&r), KVC_CORRUPT);
    assert_int_equal(fake_verbs_hits(), 1);
    assert_int_equal(kvc_metric_get(KVC_M_rdma_sums_wrong), wrong + 2);
    assert_int_equal(fetch(&r), KVC_OK);
    assert_int_equal(wrong_rows(&r, 1), 0);
    close_rig(&r);
}

static void test_sums(void **state)
{
    (void)state;
    check_sums(SUMS_BY_OPTION);
    check_sums(SUMS_BY_URI);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_by_writes),
        cmocka_unit_test(test_rows_without_a_copy),
        cmocka_unit_test(test_sums),
    };
    return cmocka_run_group_tests_name("rdma client", tests, NULL, NULL);
}
