/*
 * attend_gpu_rig.c: see attend_gpu_rig.h.
 */
#include "attend_gpu_rig.h"

uint32_t picks[MAX_PICKS], ranks[MAX_PICKS];
a_partial got, want, other;

const a_shape large = {
    .n_q = 1,
    .n_q_heads = 32,
    .kv_heads = 8,
    .dim = 128,
    .dtype = KVC_DTYPE_BF16,
    .q_dtype = KVC_DTYPE_BF16,
    .o_dtype = KVC_DTYPE_F32,
    .rope = KVC_ROPE_PLAIN,
    .n_picks = 300,
};

uint64_t metric(kvc_metric m)
{
    return kvc_metric_get(m);
}

void wait_metric(kvc_metric m, uint64_t want_value)
{
    for (uint32_t i = 0; i < 60000 && metric(m) != want_value; i++)
        usleep(1000);
    assert_int_equal(metric(m), want_value);
}

uint64_t rows_read(void)
{
#ifdef KVS_TEST_DEVICE
    return 0;
#else
    return fake_cuda_rows_read();
#endif
}

uint32_t asked_to_pin(void)
{
#ifdef KVS_TEST_DEVICE
    return 0;
#else
    return fake_cuda_asked_to_register();
#endif
}

uint64_t ask(a_server *f, const a_shape *s, const char *what)
{
    uint64_t before = metric(KVC_M_rows_attended_gpu), read = rows_read();
    a_attend(f, s, picks, s->ranks ? ranks : NULL, s->n_picks, &got);
    assert_int_equal(f->peer->n_missing, 0);
    a_oracle(s, picks, s->ranks ? ranks : NULL, s->n_picks, NULL, &want);
    a_check_equal(s, &got, &want, what);
    uint64_t n = metric(KVC_M_rows_attended_gpu) - before;
#ifndef KVS_TEST_DEVICE
    assert_int_equal(rows_read() - read, n); /* it was the device that read them */
#else
    (void)read;
#endif
    return n;
}

void start_pinned(a_server *f, const a_shape *s)
{
    f->h.settings.attend_gpu_bytes = 64u << 20;
    a_start(f, s, N_BLOCKS);
    a_choose(s, picks, ranks);
    (void)ask(f, s, "while it is pinned");
    wait_metric(KVC_M_attend_gpu_pinned_bytes, 4u << 20); /* one segment has all of it */
}

int gpu_setup(void **state)
{
#ifndef KVS_TEST_DEVICE
    fake_cuda_absent(false);
    fake_cuda_copies(UINT32_MAX);
    fake_cuda_ops(UINT32_MAX);
    fake_cuda_shared(227u << 10);
    fake_cuda_registers(KVC_OK);
#endif
    return a_setup(state);
}

int gpu_teardown(void **state)
{
    int bad = a_teardown(state);
    bad |= metric(KVC_M_attend_gpu) != 0 || metric(KVC_M_attend_gpu_pinned_bytes) != 0;
#ifndef KVS_TEST_DEVICE
    fake_cuda_copies(UINT32_MAX);
    fake_cuda_ops(UINT32_MAX);
    bad |= fake_cuda_held() != 0;
#endif
    return bad;
}

void prefetch(a_server *f)
{
    kvc_request req = {.method = KVC_PREFETCH};
    req.u.prefetch.context = f->context;
    req.u.prefetch.tier = KVC_TIER_GPU;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->xfer.reply.u.prefetch.left, 0);
}
