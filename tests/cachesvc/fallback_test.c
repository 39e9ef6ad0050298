/*
 * fallback_test.c: a way that breaks in the middle of a request: it is asked again by the client's
 * next address, within its deadline; results come once, and are those of an undisturbed request.
 *
 * A server in this process that listens on two addresses, and the client library. Calls of the
 * server are wrapped: as the request arrives, or as its answer is ready, the connection that it
 * came by is broken and its address taken away. rdma:// is on verbs without a device.
 */
#include "attend_rig.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/metrics.h"
#include "kvc/client.h"
#include "request.h"
#ifdef KVS_TEST_RDMA
#include "fake_verbs.h"
#endif

#define N_PICKS  300u
#define VALUE    1000u /* the block that is put */
#define DEADLINE 120000000000ull

enum { NOWHERE, ON_ARRIVAL, ON_ANSWER };

typedef struct rig {
    a_server *f;
    char path[300]; /* of the shm socket; empty: rdma */
    char listen[1200], uris[1200];
    kvc_client *client;
    kvc_region *region;
    kvc_context *context;
    uint8_t *bytes; /* [N_PICKS rows] or a value */
    size_t len_bytes;
    atomic_uint n_done;
} rig;

static _Atomic(rig *) broken;  /* the rig whose way breaks next */
static atomic_int break_where; /* NOWHERE once it is broken */
static atomic_int break_method;
static atomic_uint n_arrived; /* requests of break_method */

/* ---- what breaks ------------------------------------------------------------------------------
 */

static void break_way(const rig *r)
{
#ifdef KVS_TEST_RDMA
    if (r->path[0] == '\0') { /* the next work request fails, and so does each new connection */
        fake_faults faults = fake_no_faults;
        faults.wc_after = 1;
        faults.wc = IBV_WC_RETRY_EXC_ERR;
        faults.qp_fails = true;
        fake_verbs_fault(&faults);
        return;
    }
#endif
    assert_int_equal(unlink(r->path), 0);
    h_break_shm(r->path);
}

static void reached(const kvt_call *call, int where)
{
    const rig *r = atomic_load(&broken);
    if (r == NULL || (int)call->req.method != atomic_load(&break_method))
        return;
    if (where == ON_ARRIVAL)
        atomic_fetch_add(&n_arrived, 1);
    if (atomic_compare_exchange_strong(&break_where, &where, NOWHERE))
        break_way(r);
}

#define WRAP(name)                                                                                 \
    void __real_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant);              \
    void __wrap_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant);              \
    void __wrap_##name(kvs_server *server, kvt_call *call, const kvc_digest *tenant)               \
    {                                                                                              \
        reached(call, ON_ARRIVAL);                                                                 \
        __real_##name(server, call, tenant);                                                       \
    }
WRAP(kvs_on_fetch_rows)
WRAP(kvs_on_attend_rows)
WRAP(kvs_on_put_blocks)

void __real_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices);
void __wrap_kvs_answer(kvt_call *call, const kvc_reply *reply, const kvt_slice *slices,
                       uint32_t n_slices)
{
    reached(call, ON_ANSWER);
    __real_kvs_answer(call, reply, slices, n_slices);
}

/* ---- rig ------------------------------------------------------------------------------------- */

static const char *second_way(const rig *r, bool tcp)
{
    static char uri[300];
#ifdef KVASIR_GRPC
    if (tcp)
        return "grpc://127.0.0.1:0";
    (void)snprintf(uri, sizeof(uri), "grpc+unix://%s/grpc", r->f->dir);
#else
    (void)tcp;
    (void)snprintf(uri, sizeof(uri), "inproc://fallback-%d-%p", (int)getpid(), (const void *)r);
#endif
    return uri;
}

static void open_rig(rig *r, bool rdma, bool tcp)
{
    memset(r, 0, sizeof(*r));
    void *state;
    (void)a_setup(&state);
    r->f = state;
    h_temp_dir(r->f->dir);
    if (!rdma)
        (void)snprintf(r->path, sizeof(r->path), "%s/shm", r->f->dir);
#ifdef KVS_TEST_RDMA
    fake_verbs_use(NULL);
#endif
    /* The rig's own connection is by the first of these, the client's preference is the other. */
    (void)snprintf(r->listen, sizeof(r->listen), "%s,%s%s", second_way(r, tcp),
                   rdma ? "rdma://127.0.0.1:0" : "shm://", r->path);
    r->f->h.settings.listen = r->listen;
    a_start(r->f, &a_plain, N_BLOCKS);
    (void)snprintf(r->uris, sizeof(r->uris), "%s,%s", kvs_server_uri(r->f->h.server, 1),
                   kvs_server_uri(r->f->h.server, 0));
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .connect_timeout_ns = DEADLINE,
                            .uris = r->uris,
                            .n_channels = 1};
    assert_int_equal(kvc_client_open(&opts, &r->client), KVC_OK);
    r->len_bytes = (size_t)N_PICKS * r->f->part.row_bytes;
    r->bytes = calloc(1, r->len_bytes);
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = r->bytes,
                            .len_bytes = r->len_bytes,
                            .kind = KVC_MEMORY_HOST};
    assert_int_equal(kvc_region_register(r->client, &desc, &r->region), KVC_OK);
    kvc_digest digests[N_BLOCKS];
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        digests[b] = h_digest(b);
    assert_int_equal(
        kvc_context_open(r->client, &r->f->digest, digests, N_BLOCKS, 0, 0, &r->context), KVC_OK);
}

static void close_rig(rig *r)
{
    kvc_context_close(r->context);
    assert_int_equal(kvc_region_deregister(r->client, r->region), KVC_OK);
    kvc_client_close(r->client);
    a_stop(r->f);
    void *state = r->f;
    (void)a_teardown(&state);
    free(r->bytes);
#ifdef KVS_TEST_RDMA
    fake_verbs_fault(&fake_no_faults);
    assert_true(fake_verbs_all_gone());
#endif
}

static void count_done(kvc_op *op, void *arg)
{
    (void)op;
    atomic_fetch_add(&((rig *)arg)->n_done, 1);
}

static uint32_t picks[MAX_PICKS];

/* ---- requests: each gives what it gave as bytes, which the caller frees -----------------------
 */

/* Waits until count_done has been called for an op, which must be OK. */
static void wait_done(rig *r, const kvc_op *op, kvc_status sent)
{
    assert_int_equal(sent, KVC_OK);
    uint64_t until_ns = kvc_deadline_ns(DEADLINE);
    while (atomic_load(&r->n_done) == 0 && !kvc_expired(until_ns))
        usleep(1000);
    assert_int_not_equal(atomic_load(&r->n_done), 0);
    if (op->status != KVC_OK)
        fail_msg("the request: %s", kvc_status_name(op->status));
}

static uint8_t *ask_fetch(rig *r, size_t *len_p)
{
    const kvc_pick_group group = {.context = r->context,
                                  .part = 7,
                                  .row_bytes = r->f->part.row_bytes,
                                  .n_picks = N_PICKS,
                                  .picks = picks};
    int8_t status[N_PICKS];
    kvc_fetch_info info;
    kvc_op op;
    memset(r->bytes, 0xcd, r->len_bytes);
    kvc_op_init(&op, count_done, r);
    wait_done(
        r, &op,
        kvc_fetch(r->client, &group, 1, r->region, status, &info, kvc_deadline_ns(DEADLINE), &op));
    assert_int_equal(info.rows_dram, N_PICKS); /* of both tries it would be twice as many */
    for (uint32_t i = 0; i < N_PICKS; i++)
        assert_int_equal(status[i], KVC_OK);
    uint8_t *out = malloc(*len_p = r->len_bytes);
    memcpy(out, r->bytes, r->len_bytes);
    return out;
}

static uint8_t *ask_attend(rig *r, size_t *len_p)
{
    size_t n = (size_t)a_plain.n_q_heads * a_plain.dim;
    float *q = calloc(n, sizeof(*q)), *out = calloc(n + a_plain.n_q_heads, sizeof(*out));
    for (size_t i = 0; i < n; i++)
        q[i] = (float)(i % 17) / 8 - 1;
    const kvc_attend_group group = {.context = r->context,
                                    .part = 7,
                                    .n_picks = N_PICKS,
                                    .picks = picks,
                                    .row_bytes = r->f->part.row_bytes,
                                    .n_q = 1,
                                    .n_q_heads = a_plain.n_q_heads,
                                    .dim = a_plain.dim,
                                    .q_dtype = KVC_DTYPE_F32,
                                    .o_dtype = KVC_DTYPE_F32,
                                    .q = q,
                                    .o = out,
                                    .lse = out + n};
    kvc_fetch_info info;
    kvc_op op;
    kvc_op_init(&op, count_done, r);
    wait_done(r, &op,
              kvc_attend(r->client, &group, 1, NULL, &info, kvc_deadline_ns(DEADLINE), &op));
    assert_int_equal(info.rows_dram, N_PICKS);
    free(q);
    *len_p = (n + a_plain.n_q_heads) * sizeof(*out);
    return (uint8_t *)out;
}

/* A value that is new each time, read back. */
static uint8_t *ask_put(rig *r, size_t *len_p)
{
    static uint64_t block = VALUE;
    uint32_t value_bytes = H_TOKENS * r->f->part.row_bytes, rows[H_TOKENS];
    kvc_value value = {.digest = h_digest(++block), .part = 7, .len_bytes = value_bytes};
    int8_t status = KVC_IO;
    kvc_context *context;
    kvc_op op;
    assert_true(value_bytes <= r->len_bytes);
    h_fill(VALUE, 7, r->f->part.row_bytes, r->bytes);
    kvc_op_init(&op, count_done, r);
    wait_done(r, &op,
              kvc_put(r->client, &r->f->digest, KVC_PROMISE_MEMORY, &value, 1, r->region, &status,
                      kvc_deadline_ns(DEADLINE), &op));
    if (status != KVC_OK && status != KVC_EXISTS) /* EXISTS: the first try had stored it */
        fail_msg("the value: %s", kvc_status_name((kvc_status)status));
    assert_int_equal(kvc_context_open(r->client, &r->f->digest, &value.digest, 1, 0, 0, &context),
                     KVC_OK);
    for (uint32_t i = 0; i < H_TOKENS; i++)
        rows[i] = i;
    const kvc_pick_group group = {.context = context,
                                  .part = 7,
                                  .row_bytes = r->f->part.row_bytes,
                                  .n_picks = H_TOKENS,
                                  .picks = rows};
    memset(r->bytes, 0xcd, r->len_bytes);
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(kvc_fetch(r->client, &group, 1, r->region, NULL, NULL, 0, &op), KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    kvc_context_close(context);
    uint8_t *out = malloc(*len_p = value_bytes);
    memcpy(out, r->bytes, value_bytes);
    return out;
}

/* ---- cases ------------------------------------------------------------------------------------
 */

static const struct {
    kvc_method method;
    uint8_t *(*ask)(rig *r, size_t *len_p);
} requests[] = {
    {KVC_FETCH_ROWS, ask_fetch},
    {KVC_ATTEND_ROWS, ask_attend},
    {KVC_PUT_BLOCKS, ask_put},
};

static void check(bool rdma, bool tcp, size_t which, int where)
{
    rig r;
    size_t want_bytes, got_bytes;
    for (uint32_t i = 0; i < N_PICKS; i++)
        picks[i] = i * 7919u % (N_BLOCKS * H_TOKENS);
    atomic_store(&broken, NULL);
    open_rig(&r, rdma, tcp);
    uint8_t *want = requests[which].ask(&r, &want_bytes);
    uint64_t reconnects = kvc_metric_get(KVC_M_client_reconnects);
    atomic_store(&r.n_done, 0);
    atomic_store(&n_arrived, 0);
    atomic_store(&break_method, (int)requests[which].method);
    atomic_store(&broken, &r);
    atomic_store(&break_where, where);
    uint8_t *got = requests[which].ask(&r, &got_bytes);
    atomic_store(&broken, NULL);
    assert_int_equal(atomic_load(&break_where), NOWHERE); /* it did break */
    assert_int_equal(atomic_load(&n_arrived), 2);         /* by the one way, then by the other */
    assert_int_equal(kvc_metric_get(KVC_M_client_reconnects), reconnects + 1);
    assert_int_equal(got_bytes, want_bytes);
    assert_memory_equal(got, want, want_bytes);
    free(want);
    free(got);
    close_rig(&r);
    assert_int_equal(atomic_load(&r.n_done), 1); /* of all callbacks that there ever will be */
}

static void check_all(bool rdma, bool tcp)
{
    for (size_t which = 0; which < sizeof(requests) / sizeof(requests[0]); which++) {
        check(rdma, tcp, which, ON_ARRIVAL);
        check(rdma, tcp, which, ON_ANSWER);
    }
}

static void test_shm_breaks(void **state)
{
    (void)state;
    check_all(false, false);
}

#ifdef KVASIR_GRPC
static void test_shm_breaks_then_tcp(void **state)
{
    (void)state;
    check_all(false, true);
}
#endif

#ifdef KVS_TEST_RDMA
static void test_rdma_breaks(void **state)
{
    (void)state;
    check_all(true, true);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shm_breaks),
#ifdef KVASIR_GRPC
        cmocka_unit_test(test_shm_breaks_then_tcp),
#endif
#ifdef KVS_TEST_RDMA
        cmocka_unit_test(test_rdma_breaks),
#endif
    };
    return cmocka_run_group_tests_name("fallback", tests, NULL, NULL);
}
