/*
 * worker_fake_rdma_test.c: decode steps over the fake device whose far rows a server in this
 * process writes by RDMA, on verbs without a device: to the GPU's memory where that can be
 * registered, else to the host's, with the same bits.
 */
#include "bench.h"
#include "device/state.h"
#include "fake_cuda.h"
#include "fake_rig.h"
#include "fake_verbs.h"
#include "harness.h"
#include "oracle.h"

#include "base/clock.h"
#include "base/metrics.h"

#define PREFILL 576u

typedef struct rdma_bench {
    h_server h;
    kvc_client *client;
} rdma_bench;

static int open_bench(void **state)
{
    rdma_bench *b = calloc(1, sizeof(*b));
    assert_non_null(b);
    fake_verbs_use(NULL);
    h_listen = "rdma://127.0.0.1:0";
    h_server_init(&b->h);
    h_server_start(&b->h);
    b->client = store_client(kvs_server_uri(b->h.server, 0));
    *state = b;
    return 0;
}

static int close_bench(void **state)
{
    rdma_bench *b = *state;
    kvc_client_close(b->client);
    h_server_fini(&b->h);
    assert_true(fake_verbs_all_gone());
    free(b);
    return 0;
}

static kvw_seq *open_seq(rig *r, rdma_bench *b, const char *revision)
{
    uint32_t reused = 0;
    kvw_seq *seq = NULL;
    fake_rig(r, b->client);
    r->opts.revision = revision;
    r->opts.way = "rdma";
    rig_open(r);
    assert_ok(kvw_seq_create(r->worker, NULL, 0, &seq, &reused));
    return seq;
}

/* Decodes [from, to); the first token's rows are the first that the server may write to the GPU's
 * memory, and what becomes of it is known before the second's. */
static void decode(rig *r, kvw_seq *seq, uint32_t from, uint32_t to, rig_check *check, void *arg)
{
    const kvc_region *region = seq->device->gpu_staging->regions.of[0];
    rig_decode(r, seq, from, from + 1, check, arg);
    support_wait_for(kvc_region_gpu_way(region, NULL) != KVC_REGION_NOT_YET);
    rig_decode(r, seq, from + 1, to, check, arg);
}

/* Decodes after the prefix. */
static void finish(rig *r, kvw_seq *seq, rig_record *record)
{
    rig_record_init(record, r);
    rig_prefill(r, seq, 0, PREFILL, NULL, NULL);
    assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
    decode(r, seq, PREFILL, FAKE_TOKENS, rig_record_step, record);
    kvw_stats stats = stats_of(seq);
    assert_int_equal(stats.steps_device, stats.steps);
    assert_true(stats.rows_dram > 100);
}

/* Without memory of the GPU that anybody writes to. */
static void by_host(rdma_bench *b, rig_record *record)
{
    rig r;
    fake_cuda_no_export(true);
    kvw_seq *seq = open_seq(&r, b, "host");
    kvwi_gpu_staging *s = seq->device->gpu_staging;
    assert_non_null(s);
    fake_verbs_gpu(&(fake_gpu){.base = s->memory, .len_bytes = s->len_bytes});
    finish(&r, seq, record);
    assert_true(s->refused);
    assert_int_equal(seq->device->staged, seq->device->cap_tokens);
    assert_int_equal(kvc_region_gpu_way(s->regions.of[0], NULL), KVC_REGION_COPIED);
    kvw_seq *next = NULL;
    uint32_t reused = 0;
    assert_ok(kvw_seq_create(r.worker, NULL, 0, &next, &reused));
    assert_null(next->device->gpu_staging); /* it is not tried again */
    kvw_seq_destroy(next);
    kvw_seq_destroy(seq);
    rig_close(&r);
    fake_cuda_no_export(false);
}

/* The server writes to the GPU's memory: by its dma-buf, or by peer memory without one. */
static void by_gpu(rdma_bench *b, bool exports, rig_record *record)
{
    rig r;
    fake_cuda_no_export(!exports);
    uint64_t placed = kvc_metric_get(KVC_M_rdma_placed_bytes);
    uint32_t flushes = fake_cuda_flushes();
    kvw_seq *seq = open_seq(&r, b, exports ? "dma-buf" : "peer");
    kvwi_gpu_staging *s = seq->device->gpu_staging;
    assert_non_null(s);
    finish(&r, seq, record);
    assert_int_equal(kvc_region_gpu_way(s->regions.of[0], NULL),
                     exports ? KVC_REGION_DMABUF : KVC_REGION_PEER);
    assert_true(fake_verbs_registered(s->memory));
    assert_true(seq->device->staged > seq->device->cap_tokens);
    assert_true(kvc_metric_get(KVC_M_rdma_placed_bytes) > placed);
    assert_true(fake_cuda_flushes() > flushes + 1);
    kvw_seq_destroy(seq);
    rig_close(&r);
    fake_cuda_no_export(false);
}

static void bits_do_not_depend_on_where_rows_land(void **state)
{
    rdma_bench *b = *state;
    rig r;
    rig_record host, dmabuf, peer;
    by_gpu(b, true, &dmabuf);
    by_gpu(b, false, &peer);
    by_host(b, &host);
    fake_rig(&r, NULL);
    rig_fill(&r);
    rig_record_equal(&r, &host, &dmabuf, PREFILL, FAKE_TOKENS);
    rig_record_equal(&r, &host, &peer, PREFILL, FAKE_TOKENS);
    rig_record_fini(&host);
    rig_record_fini(&dmabuf);
    rig_record_fini(&peer);
    rig_close(&r);
}

/* A sequence that outgrows its room keeps where rows land, whatever was decided. */
static void it_stays_so_as_a_sequence_grows(void **state)
{
    rdma_bench *b = *state;
    for (int refused = 0; refused < 2; refused++) {
        rig r;
        uint32_t reused = 0;
        kvw_seq *seq = NULL;
        fake_rig(&r, b->client);
        r.opts.revision = refused == 0 ? "grows" : "grows by host";
        r.opts.way = "rdma";
        r.opts.max_tokens = 320;
        rig_open(&r);
        fake_cuda_no_export(refused == 1);
        assert_ok(kvw_seq_create(r.worker, NULL, 0, &seq, &reused));
        kvwi_gpu_staging *s = seq->device->gpu_staging;
        assert_non_null(s);
        if (refused == 1)
            fake_verbs_gpu(&(fake_gpu){.base = s->memory, .len_bytes = s->len_bytes});
        uint32_t dims = FAKE_DIMS, cap = seq->device->cap_tokens;
        rig_prefill(&r, seq, 0, 368, NULL, NULL);
        assert_ok(kvw_flush(seq, kvc_deadline_ns(SUPPORT_PATIENCE_NS)));
        decode(&r, seq, 368, 396, oracle_check_step, &dims);
        assert_true(seq->device->cap_tokens > cap);
        assert_int_equal(s->refused, refused);
        kvw_seq_destroy(seq);
        rig_close(&r);
    }
    fake_cuda_no_export(false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(bits_do_not_depend_on_where_rows_land, open_bench,
                                        close_bench),
        cmocka_unit_test_setup_teardown(it_stays_so_as_a_sequence_grows, open_bench, close_bench),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
