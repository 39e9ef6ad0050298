/*
 * rdma_client_test.c: the client library over rdma:// against a server in this process, on verbs
 * without a device: values put by READs, rows written by WRITEs, and its option `sums`.
 *
 * A byte that changes under way is told of with sums; without them it is in the rows.
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
#include "fake_verbs.h"
#include "kvc/client.h"

#define ROW_BYTES   512u
#define VALUE_BYTES (H_TOKENS * ROW_BYTES)
#define N_PUT       4u
#define N_ROWS      (N_PUT * H_TOKENS)
/* So a stream of them has several messages, which do not end where blocks do. */
#define FEW_BYTES   (VALUE_BYTES + VALUE_BYTES / 4)

static uint32_t message_bytes; /* of the next server's; 0: the usual */

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
    if (message_bytes > 0)
        r->h.server->limits.max_message_bytes = message_bytes;
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

typedef kvc_status fetch_rows_fn(kvc_client *client, const kvc_pick_group *groups,
                                 uint32_t n_groups, const kvc_region *dst, int8_t *status,
                                 kvc_fetch_info *info_p, uint64_t deadline_ns, kvc_op *op);

/* Row i of the context to slot N_ROWS - 1 - i, if backwards. */
static kvc_status fetch_by(rig *r, bool backwards, fetch_rows_fn *fetch_rows)
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
    assert_int_equal(fetch_rows(r->client, &group, 1, r->region, r->status, NULL, 0, &op), KVC_OK);
    return kvc_op_wait(&op, 0);
}

static kvc_status fetch(rig *r)
{
    return fetch_by(r, false, kvc_fetch);
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

/* Blocks in reverse order; as kvc_fetch of their rows. */
static kvc_status fetch_blocks(rig *r)
{
    kvc_digest digests[N_PUT];
    uint32_t slots[N_PUT];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < N_PUT; i++) {
        digests[i] = h_digest(1 + i);
        slots[i] = N_PUT - 1 - i;
    }
    const kvc_block_part part = {
        .value_bytes = VALUE_BYTES, .stride_bytes = VALUE_BYTES, .dst_slots = slots};
    memset(r->bytes, 0xcd, N_PUT * VALUE_BYTES);
    assert_int_equal(kvc_fetch_blocks(r->client, &r->schema.digest, digests, N_PUT, &part, 1,
                                      r->region, r->status, NULL, 0, &op),
                     KVC_OK);
    return kvc_op_wait(&op, 0);
}

/* Every row of the blocks 1 ... in slots that run backwards, but for those of block 3. */
static void check_backwards(const rig *r)
{
    for (uint32_t i = 0; i < N_ROWS; i++) {
        const uint8_t *slot = r->bytes + (size_t)(N_ROWS - 1 - i) * ROW_BYTES;
        bool gone = i / H_TOKENS == 2;
        assert_int_equal(r->status[i], gone ? KVC_NOT_FOUND : KVC_OK);
        assert_true(gone ? slot[0] == 0xcd && slot[ROW_BYTES - 1] == 0xcd
                         : h_row_is(1 + i / H_TOKENS, 0, i % H_TOKENS, ROW_BYTES, slot));
    }
}

static void check_blocks(const rig *r)
{
    for (uint32_t i = 0; i < N_ROWS; i++) {
        uint32_t b = i / H_TOKENS;
        const uint8_t *row =
            r->bytes + ((size_t)(N_PUT - 1 - b) * H_TOKENS + i % H_TOKENS) * ROW_BYTES;
        assert_int_equal(r->status[b], b == 2 ? KVC_NOT_FOUND : KVC_OK);
        assert_true(b == 2 ? row[0] == 0xcd && row[ROW_BYTES - 1] == 0xcd
                           : h_row_is(1 + b, 0, i % H_TOKENS, ROW_BYTES, row));
    }
}

enum { BY_ROWS, BY_STREAM, BY_BLOCKS };

/* What comes goes where it belongs without a copy, once the region is registered, which its end
 * undoes; what is missing leaves its slots alone. A stream takes several messages. */
static void check_placed(int how, int sums)
{
    rig r = {0};
    open_rig(&r, sums);
    assert_int_equal(put(&r, 1), KVC_OK);
    open_context(&r, 1);
    erase(&r, 3); /* the third of four blocks */
    uint64_t give_up_ns = kvc_deadline_ns(20000000000ull);
    uint64_t placed = 0, want = (uint64_t)(N_PUT - 1) * VALUE_BYTES;
    while (placed != want && !kvc_expired(give_up_ns)) {
        uint64_t before = kvc_metric_get(KVC_M_rdma_placed_bytes);
        if (how == BY_BLOCKS) {
            assert_int_equal(fetch_blocks(&r), KVC_OK);
            check_blocks(&r);
        } else {
            assert_int_equal(fetch_by(&r, true, how == BY_ROWS ? kvc_fetch : kvc_fetch_stream),
                             KVC_OK);
            check_backwards(&r);
        }
        placed = kvc_metric_get(KVC_M_rdma_placed_bytes) - before;
    }
    assert_int_equal(placed, want);
    assert_true(fake_verbs_registered(r.bytes));
    assert_int_equal(kvc_region_deregister(r.client, r.region), KVC_OK);
    assert_false(fake_verbs_registered(r.bytes));
    r.region = NULL;
    close_rig(&r);
}

static void test_rows_without_a_copy(void **state)
{
    (void)state;
    check_placed(BY_ROWS, NO_SUMS);
}

static void test_streams_without_a_copy(void **state)
{
    (void)state;
    message_bytes = FEW_BYTES;
    for (int how = BY_STREAM; how <= BY_BLOCKS; how++) {
        check_placed(how, NO_SUMS);
        check_placed(how, SUMS_BY_OPTION);
    }
    message_bytes = 0;
}

/* A byte of a stream that changes on its way to its place. */
static void test_streams_are_summed(void **state)
{
    (void)state;
    rig r = {0};
    message_bytes = FEW_BYTES;
    open_rig(&r, SUMS_BY_OPTION);
    message_bytes = 0;
    assert_int_equal(put(&r, 1), KVC_OK);
    open_context(&r, 1);
    uint64_t give_up_ns = kvc_deadline_ns(20000000000ull), placed = 0;
    while (placed < N_PUT * VALUE_BYTES && !kvc_expired(give_up_ns)) {
        uint64_t before = kvc_metric_get(KVC_M_rdma_placed_bytes);
        assert_int_equal(fetch_blocks(&r), KVC_OK);
        placed = kvc_metric_get(KVC_M_rdma_placed_bytes) - before;
    }
    flip(IBV_WR_RDMA_WRITE, 2);
    assert_int_equal(fetch_blocks(&r), KVC_CORRUPT);
    assert_int_equal(fake_verbs_hits(), 1);
    assert_int_equal(fetch_blocks(&r), KVC_OK);
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

/* ---- memory of a GPU ---- */

/* Addresses that no CPU may touch, and where their bytes are: a file, which is their dma-buf. */
typedef struct gpu {
    uint8_t *base, *bytes;
    int fd;
    atomic_uint n_copies, n_flushes;
    kvc_status status; /* of copying */
    kvc_region *region;
} gpu;

#define GPU_BYTES ((size_t)N_PUT * VALUE_BYTES)

static kvc_status copy_in(void *arg, void *to, const void *from, size_t len_bytes)
{
    gpu *g = arg;
    size_t off = (size_t)((uint8_t *)to - g->base);
    if (off > GPU_BYTES || len_bytes > GPU_BYTES - off)
        return KVC_INVALID;
    atomic_fetch_add(&g->n_copies, 1);
    if (g->status == KVC_OK)
        memcpy(g->bytes + off, from, len_bytes);
    return g->status;
}

static kvc_status flush(void *arg)
{
    atomic_fetch_add(&((gpu *)arg)->n_flushes, 1);
    return KVC_OK;
}

static void open_gpu(gpu *g, rig *r, bool exported)
{
    memset(g, 0, sizeof(*g));
    g->fd = memfd_create("gpu", MFD_CLOEXEC);
    assert_true(g->fd >= 0);
    assert_int_equal(ftruncate(g->fd, GPU_BYTES), 0);
    g->bytes = mmap(NULL, GPU_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
    g->base = mmap(NULL, GPU_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(g->bytes != MAP_FAILED && g->base != MAP_FAILED);
    fake_verbs_gpu(&(fake_gpu){.base = g->base, .len_bytes = GPU_BYTES});
    const kvc_region_gpu how = {.size_bytes = sizeof(how),
                                .dmabuf_fd = exported ? g->fd : -1,
                                .copy_in = copy_in,
                                .flush = flush,
                                .arg = g};
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = g->base,
                            .len_bytes = GPU_BYTES,
                            .kind = KVC_MEMORY_CUDA};
    assert_int_equal(kvc_region_register(r->client, &desc, &g->region), KVC_UNSUPPORTED);
    desc.gpu = &how;
    assert_int_equal(kvc_region_register(r->client, &desc, &g->region), KVC_OK);
    assert_int_equal(kvc_region_gpu_way(g->region, NULL), KVC_REGION_NOT_YET);
}

static void close_gpu(gpu *g, rig *r)
{
    assert_int_equal(kvc_region_deregister(r->client, g->region), KVC_OK);
    assert_false(fake_verbs_registered(g->base));
    (void)munmap(g->base, GPU_BYTES);
    (void)munmap(g->bytes, GPU_BYTES);
    (void)close(g->fd);
}

/* All rows, in their order, and whether they are right where they came. */
static kvc_status fetch_gpu(rig *r, gpu *g, fetch_rows_fn *fetch_rows)
{
    uint32_t picks[N_ROWS];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < N_ROWS; i++)
        picks[i] = i;
    kvc_pick_group group = {
        .context = r->context, .row_bytes = ROW_BYTES, .n_picks = N_ROWS, .picks = picks};
    memset(g->bytes, 0xcd, GPU_BYTES);
    assert_int_equal(fetch_rows(r->client, &group, 1, g->region, r->status, NULL, 0, &op), KVC_OK);
    kvc_status status = kvc_op_wait(&op, 0);
    for (uint32_t i = 0; i < N_ROWS && status == KVC_OK; i++)
        assert_true(h_row_is(1 + i / H_TOKENS, 0, i % H_TOKENS, ROW_BYTES,
                             g->bytes + (size_t)i * ROW_BYTES));
    return status;
}

static void fetch_gpu_blocks(rig *r, gpu *g)
{
    kvc_digest digests[N_PUT];
    int8_t status[N_PUT];
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    for (uint32_t i = 0; i < N_PUT; i++)
        digests[i] = h_digest(1 + i);
    const kvc_block_part part = {.value_bytes = VALUE_BYTES, .stride_bytes = VALUE_BYTES};
    memset(g->bytes, 0xcd, GPU_BYTES);
    assert_int_equal(kvc_fetch_blocks(r->client, &r->schema.digest, digests, N_PUT, &part, 1,
                                      g->region, status, NULL, 0, &op),
                     KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    for (uint32_t i = 0; i < N_ROWS; i++)
        assert_true(h_row_is(1 + i / H_TOKENS, 0, i % H_TOKENS, ROW_BYTES,
                             g->bytes + (size_t)i * ROW_BYTES));
}

/* Until it is known how rows come; what the last fetch copied. */
static uint32_t settle_gpu(rig *r, gpu *g, kvc_region_way way)
{
    uint64_t give_up_ns = kvc_deadline_ns(20000000000ull);
    uint32_t copies = 1;
    while (kvc_region_gpu_way(g->region, NULL) == KVC_REGION_NOT_YET && !kvc_expired(give_up_ns))
        assert_int_equal(fetch_gpu(r, g, kvc_fetch), KVC_OK);
    assert_int_equal(kvc_region_gpu_way(g->region, NULL), way);
    while (copies > 0 && !kvc_expired(give_up_ns)) {
        uint32_t before = atomic_load(&g->n_copies);
        assert_int_equal(fetch_gpu(r, g, kvc_fetch), KVC_OK);
        copies = atomic_load(&g->n_copies) - before;
        if (way == KVC_REGION_COPIED)
            break;
    }
    return copies;
}

/* Once it is registered nobody copies, and what a device wrote is flushed before it is told of. */
static void test_rows_to_a_gpu(void **state)
{
    (void)state;
    rig r = {0};
    gpu g;
    const char *why = NULL;
    message_bytes = FEW_BYTES;
    open_rig(&r, NO_SUMS);
    message_bytes = 0;
    assert_int_equal(put(&r, 1), KVC_OK);
    open_context(&r, 1);
    open_gpu(&g, &r, true);
    assert_int_equal(settle_gpu(&r, &g, KVC_REGION_DMABUF), 0);
    assert_true(atomic_load(&g.n_flushes) > 0);
    assert_int_equal(kvc_region_gpu_way(g.region, &why), KVC_REGION_DMABUF);
    assert_string_equal(why, "");
    uint32_t copies = atomic_load(&g.n_copies), flushes = atomic_load(&g.n_flushes);
    assert_int_equal(fetch_gpu(&r, &g, kvc_fetch_stream), KVC_OK);
    fetch_gpu_blocks(&r, &g);
    assert_int_equal(atomic_load(&g.n_copies), copies);
    assert_true(atomic_load(&g.n_flushes) > flushes + 2); /* once a message */
    close_gpu(&g, &r);
    close_rig(&r);
}

/* Where no device takes it, rows come by the host, and why is said; the caller's failure to copy
 * is the fetch's. */
static void test_rows_copied_to_a_gpu(void **state)
{
    (void)state;
    rig r = {0};
    gpu g;
    const char *why = NULL;
    open_rig(&r, NO_SUMS);
    assert_int_equal(put(&r, 1), KVC_OK);
    open_context(&r, 1);
    open_gpu(&g, &r, false);
    assert_true(settle_gpu(&r, &g, KVC_REGION_COPIED) > 0);
    assert_int_equal(kvc_region_gpu_way(g.region, &why), KVC_REGION_COPIED);
    assert_non_null(strstr(why, "no dma-buf"));
    assert_int_equal(fetch_gpu(&r, &g, kvc_fetch_stream), KVC_OK);
    fetch_gpu_blocks(&r, &g);
    /* None of them is taken for a server's answer, which would be asked for again. */
    const kvc_status statuses[] = {KVC_DEVICE, KVC_AGAIN, KVC_UNAVAILABLE, KVC_NOT_FOUND};
    for (size_t i = 0; i < sizeof(statuses) / sizeof(statuses[0]); i++) {
        uint64_t retries = kvc_metric_get(KVC_M_client_retries);
        g.status = statuses[i];
        assert_int_equal(fetch_gpu(&r, &g, kvc_fetch), KVC_DEVICE);
        assert_int_equal(fetch_gpu(&r, &g, kvc_fetch_stream), KVC_DEVICE);
        assert_int_equal(kvc_metric_get(KVC_M_client_retries), retries);
    }
    assert_int_equal(atomic_load(&g.n_flushes), 0);
    close_gpu(&g, &r);
    close_rig(&r);
}

/* What would read there is refused before it does. */
static void test_a_gpu_is_only_written_to(void **state)
{
    (void)state;
    rig r = {0};
    gpu g;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    open_rig(&r, NO_SUMS);
    open_gpu(&g, &r, true);
    const kvc_value value = {.digest = h_digest(1), .len_bytes = VALUE_BYTES};
    kvc_opaque_value opaque = {.digest = h_digest(2), .len_bytes = 100};
    assert_int_equal(kvc_put(r.client, &r.schema.digest, KVC_PROMISE_MEMORY, &value, 1, g.region,
                             r.status, 0, &op),
                     KVC_UNSUPPORTED);
    assert_int_equal(kvc_put_stream(r.client, &r.schema.digest, KVC_PROMISE_MEMORY, 0, &value, 1,
                                    g.region, r.status, NULL, 0, &op),
                     KVC_UNSUPPORTED);
    assert_int_equal(kvc_opaque_put(r.client, &r.schema.digest, KVC_PROMISE_MEMORY, 0, &opaque, 1,
                                    g.region, r.status, 0, &op),
                     KVC_UNSUPPORTED);
    assert_int_equal(
        kvc_opaque_get(r.client, &r.schema.digest, &opaque, 1, g.region, r.status, 0, &op),
        KVC_UNSUPPORTED);
    close_gpu(&g, &r);
    close_rig(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rows_by_writes),
        cmocka_unit_test(test_rows_without_a_copy),
        cmocka_unit_test(test_streams_without_a_copy),
        cmocka_unit_test(test_streams_are_summed),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_rows_to_a_gpu),
        cmocka_unit_test(test_rows_copied_to_a_gpu),
        cmocka_unit_test(test_a_gpu_is_only_written_to),
    };
    return cmocka_run_group_tests_name("rdma client", tests, NULL, NULL);
}
