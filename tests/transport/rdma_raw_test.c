/*
 * rdma_raw_test.c: clients that speak the frames of RDMA badly, take no answers, or stop half way.
 *
 * The client here is fake_peer.h, over verbs without a device. After each attack the server serves
 * a good client, and nothing of the device's is left.
 */
#include "fixture.h"

#include <malloc.h>
#include <unistd.h>

#include "base/log.h"
#include "base/metrics.h"
#include "fake_peer.h"
#include "fake_verbs.h"
#include "wire/wire.h"

#define MIB (1u << 20)

static const uint8_t zeros[5 * MIB];

static kvc_status run_once(fixture *f, kvc_method method, size_t put_bytes)
{
    job j;
    job_init(&j, f, sample_request(method, put_bytes, &f->arena), 20 * SECOND);
    kvc_status status = job_run(&j);
    job_fini(&j);
    return status;
}

/* What a peer held may be given back a moment later. */
static void assert_serves(fixture *f, size_t put_bytes)
{
    kvc_status status = KVC_AGAIN;
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    fixture_handle(f, sample_handler);
    while (status == KVC_AGAIN && !kvc_expired(give_up_ns))
        status = run_once(f, KVC_PUT_BLOCKS, put_bytes);
    assert_ok(status);
    assert_ok(run_once(f, KVC_STATS, 0));
}

static void open_raw(fixture *f, uint64_t max_inflight_bytes, uint32_t max_calls)
{
    fake_verbs_use(NULL);
    fixture_init(f);
    f->listen.handshake_ns = 300 * MS;
    f->listen.max_inflight_bytes = max_inflight_bytes;
    f->listen.max_calls = max_calls;
    f->listen.idle_ns = 60 * SECOND;
    fixture_listen(f);
    fixture_connect(f, 1);
}

static void close_raw(fixture *f)
{
    fixture_close(f);
    assert_true(fake_verbs_all_gone());
}

/* A request as it goes out, with n_data bytes of payload. */
static kvc_frame frame_of(fixture *f, kvc_method method, uint64_t call, size_t data_bytes,
                          const void **head_p)
{
    size_t head_bytes;
    kvc_request req = sample_request(method, data_bytes, &f->arena);
    assert_ok(kvc_wire_encode_request(&req, &f->arena, head_p, &head_bytes));
    return (kvc_frame){.kind = KVC_FRAME_REQUEST,
                       .method = method,
                       .call = call,
                       .head_bytes = (uint32_t)head_bytes,
                       .data_bytes = (uint32_t)data_bytes};
}

/* ---- what breaks the protocol ---------------------------------------------------------------- */

static void strangers_are_refused(void **state)
{
    (void)state;
    fixture f;
    open_raw(&f, 64 * MIB, 100);
    for (int i = 0; i < 5; i++) {
        fake_peer p;
        fake_intro intro = fake_good_intro;
        intro.magic += i == 0;
        intro.version += i == 1;
        intro.credits = i == 2 ? 3 : i == 3 ? UINT32_MAX : PEER_RECVS;
        intro.frag_bytes = i == 4 ? 512 : PEER_FRAG_BYTES;
        assert_false(peer_connect(&p, f.uri, &intro));
        peer_close(&p);
    }
    assert_serves(&f, 1000);
    close_raw(&f);
}

#define PLACED(k, m, n_bytes, f)                                                                   \
    {                                                                                              \
        .kind = (k), .method = (m), .call = (k) == KVC_FRAME_REQUEST ? 10 : 8,                     \
        .data_bytes = (n_bytes), .flags = PEER_PLACED | (f)                                        \
    }

static void bad_frames_end_the_link(void **state)
{
    (void)state;
    static const kvc_frame bad[] = {
        {.kind = KVC_FRAME_END, .call = 1},
        {.kind = KVC_FRAME_GOAWAY},
        {.kind = KVC_FRAME_HELLO, .head_bytes = KVC_HELLO_BYTES},
        {.kind = KVC_FRAME_OWN_FIRST},
        {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 0},
        {.kind = KVC_FRAME_MESSAGE, .method = KVC_PUT_BLOCKS_STREAM, .call = 9},
        {.kind = KVC_FRAME_MESSAGE, .method = KVC_STATS, .call = 8},
        {.kind = KVC_FRAME_MESSAGE,
         .method = KVC_PUT_BLOCKS_STREAM,
         .call = 8,
         .flags = KVC_FRAME_LAST,
         .head_bytes = 3},
        {.kind = KVC_FRAME_REQUEST, .method = KVC_STATS, .call = 9},
        PLACED(KVC_FRAME_REQUEST, KVC_STATS, 16, 0),
        PLACED(KVC_FRAME_REQUEST, KVC_FETCH_ROWS, 24, 0),
        PLACED(KVC_FRAME_REQUEST, KVC_FETCH_ROWS, 257 * 16, 0),
        PLACED(KVC_FRAME_REQUEST, KVC_FETCH_ROWS, 16, KVC_FRAME_ELSEWHERE),
        PLACED(KVC_FRAME_MESSAGE, KVC_PUT_BLOCKS_STREAM, 16, 0),
    };
    fixture f;
    const void *head;
    open_raw(&f, 64 * MIB, 100);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        fake_peer p;
        assert_true(peer_connect(&p, f.uri, NULL));
        fixture_handle(&f, hold_handler);
        /* Two calls that are held: 8 takes messages, 9 takes none. */
        kvc_frame held = frame_of(&f, KVC_PUT_BLOCKS_STREAM, 8, 0, &head);
        assert_true(peer_send(&p, &held, head, held.head_bytes));
        held = frame_of(&f, KVC_STATS, 9, 0, &head);
        assert_true(peer_send(&p, &held, head, held.head_bytes));
        wait_held(&f, 2);
        (void)peer_send(&p, &bad[i], zeros, kvc_frame_body_bytes(&bad[i]));
        assert_true(peer_cut_off(&p));
        peer_close(&p);
        assert_int_equal(answer_held(&f), 2);
        assert_serves(&f, 1000);
    }
    close_raw(&f);
}

/* An envelope that lies, and more bytes than a frame says. */
static void bad_fragments_end_the_link(void **state)
{
    (void)state;
    fixture f;
    kvc_frame frame = {.kind = KVC_FRAME_CANCEL, .call = 3};
    uint8_t bytes[KVC_FRAME_BYTES + 8] = {0};
    assert_ok(kvc_frame_encode(&frame, bytes));
    open_raw(&f, 64 * MIB, 100);
    for (int i = 0; i < 4; i++) {
        fake_peer p;
        assert_true(peer_connect(&p, f.uri, NULL));
        if (i == 0)
            (void)peer_fragment(&p, bytes, sizeof(bytes), 0); /* 8 too many */
        else if (i == 1)
            (void)peer_fragment(&p, bytes, KVC_FRAME_BYTES - 1, 0);
        else if (i == 2)
            (void)peer_fragment(&p, bytes, KVC_FRAME_BYTES, 0x10000); /* a field that is 0 */
        for (uint32_t n = 0; i == 3 && n < 3 && !p.down; n++)         /* credits for ever */
            (void)peer_fragment(&p, bytes, KVC_FRAME_BYTES, 0xfff0);
        assert_true(peer_cut_off(&p));
        peer_close(&p);
    }
    assert_serves(&f, 1000);
    close_raw(&f);
}

/* The server has receives for what it granted, and those for whom it has none are at fault. */
static void grants_are_kept_to(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    fake_intro intro = fake_good_intro;
    intro.credits = 4;
    open_raw(&f, 64 * MIB, 100);
    assert_true(peer_connect(&p, f.uri, &intro));
    p.stingy = true;
    uint32_t n = 0;
    for (; n < 2000 && !p.down; n++) {
        (void)peer_fragment(&p, NULL, 0, 0);
        usleep(1000); /* the server posts its receives again, whatever it has granted */
    }
    assert_true(n < 2000);
    assert_true(peer_cut_off(&p));
    peer_close(&p);
    assert_serves(&f, 1000);
    close_raw(&f);
}

/* A payload that is to be read from a client that serves no READs. */
static void elsewhere_needs_reads(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    const void *head;
    fake_intro intro = fake_good_intro;
    intro.depth = 0;
    open_raw(&f, 2 * MIB, 100);
    assert_true(peer_connect(&p, f.uri, &intro));
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS, 1, MIB, &head);
    frame.flags = KVC_FRAME_ELSEWHERE;
    (void)peer_send(&p, &frame, head, frame.head_bytes);
    assert_true(peer_cut_off(&p));
    peer_close(&p);
    assert_serves(&f, MIB);
    close_raw(&f);
}

/* A READ that never ends holds what it was charged for until shortly after its deadline. */
static void reads_have_a_deadline(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    const void *head;
    open_raw(&f, 2 * MIB, 100);
    assert_true(peer_connect(&p, f.uri, NULL));
    fake_faults fault = fake_no_faults;
    fault.reads_stall = true;
    fake_verbs_fault(&fault);
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS, 1, MIB, &head);
    frame.flags = KVC_FRAME_ELSEWHERE;
    frame.deadline_ns = 100 * MS;
    assert_true(peer_send(&p, &frame, head, frame.head_bytes));
    assert_true(peer_cut_off(&p));
    fake_verbs_fault(&fake_no_faults);
    peer_close(&p);
    assert_int_equal(atomic_load(&f.n_calls), 0);
    assert_serves(&f, MIB);
    close_raw(&f);
}

/* ---- what holds memory ----------------------------------------------------------------------- */

static void long_handler(fixture *f, kvt_call *call)
{
    kvt_slice slice = counted_slice(f, zeros, 100000);
    kvc_reply reply = {.method = call->req.method};
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, &slice, 1);
}

/* Answers that are not taken count as calls, keep their slices instead of copies of them, and break
 * the link when their time is up. */
static void answers_have_a_deadline(void **state)
{
    (void)state;
    enum { N = 8 };
    fixture f;
    fake_peer p;
    const void *head;
    fake_intro intro = fake_good_intro;
    intro.credits = 4;
    open_raw(&f, 64 * MIB, N);
    fixture_handle(&f, long_handler);
    assert_true(peer_connect(&p, f.uri, &intro));
    p.stingy = true;
    for (uint64_t i = 1; i <= N; i++) {
        kvc_frame frame = frame_of(&f, KVC_FETCH_ROWS, i, 0, &head);
        frame.deadline_ns = SECOND;
        assert_true(peer_send(&p, &frame, head, frame.head_bytes));
    }
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    while (atomic_load(&f.n_calls) < N && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_int_equal(atomic_load(&f.n_calls), N);
    uint32_t n_released = atomic_load(&f.n_released);
    kvc_status status = run_once(&f, KVC_STATS, 0);
    peer_poll(&p); /* before it lets go of anything, the server parts */
    if (!p.down) { /* else this machine has slept for seconds */
        assert_status(status, KVC_AGAIN);
        assert_int_equal(n_released, 0);
    }
    assert_true(peer_cut_off(&p));
    assert_in_range(p.n_ends, 0, 1); /* it begins */
    peer_close(&p);
    assert_serves(&f, 1000);
    assert_int_equal(atomic_load(&f.n_released), N);
    close_raw(&f);
}

/* Refusals are answers too: one that asks on without taking them is held up. */
static void refusals_pile_up_to_a_bound(void **state)
{
    (void)state;
    enum { MOST = 400, TRIES = 2000 };
    fixture f;
    fake_peer p;
    fake_intro intro = fake_good_intro;
    const void *head;
    intro.credits = 4;
    open_raw(&f, 64 * MIB, 100);
    assert_true(peer_connect(&p, f.uri, &intro));
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS, 1, 2000, &head);
    frame.data_bytes = 3000; /* and so it decodes not */
    uint32_t n = 0;
    uint64_t idle_ns = kvc_deadline_ns(20 * SECOND);
    while (n < TRIES && !p.down && !kvc_expired(idle_ns)) {
        uint8_t bytes[PEER_FRAG_BYTES];
        peer_poll(&p);
        if (p.granted == 0) {
            if (n - p.n_ends > MOST)
                break;
            usleep(200);
            continue;
        }
        frame.call = n + 1;
        assert_ok(kvc_frame_encode(&frame, bytes));
        memcpy(bytes + KVC_FRAME_BYTES, head, frame.head_bytes);
        memset(bytes + KVC_FRAME_BYTES + frame.head_bytes, 0xff, frame.data_bytes);
        /* One credit for each sixteen answers: enough to be granted the next. */
        if (!peer_fragment(&p, bytes, KVC_FRAME_BYTES + frame.head_bytes + frame.data_bytes,
                           n % 16 == 0))
            break;
        n++;
    }
    assert_true(n - p.n_ends < MOST);
    peer_close(&p);
    assert_serves(&f, 1000);
    close_raw(&f);
}

/* A request is charged when its header is here, and not waited for for ever. */
static void half_a_body_is_charged(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    const void *head;
    open_raw(&f, MIB, 100);
    assert_true(peer_connect(&p, f.uri, NULL));
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS, 1, MIB, &head);
    frame.deadline_ns = SECOND;
    assert_true(peer_send(&p, &frame, zeros, 300000));
    kvc_status status = run_once(&f, KVC_PUT_BLOCKS, 500000);
    peer_poll(&p); /* before it lets go of anything, the server parts */
    if (!p.down)
        assert_status(status, KVC_AGAIN);
    assert_true(peer_cut_off(&p));
    peer_close(&p);
    assert_int_equal(atomic_load(&f.n_calls), 0);
    assert_serves(&f, 500000);
    close_raw(&f);
}

/* 0 where a sanitizer has its own malloc. */
static size_t memory_bytes(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* A body that is refused is read past and not kept. */
static void refused_bodies_are_skipped(void **state)
{
    (void)state;
    enum { N = 4 };
    fixture f;
    fake_peer p[N];
    job held;
    const void *head;
    open_raw(&f, MIB, 100);
    fixture_handle(&f, hold_handler);
    job_init(&held, &f, sample_request(KVC_PUT_BLOCKS, MIB - 2000, &f.arena), 0);
    job_submit(&held);
    wait_held(&f, 1);
    size_t before_bytes = memory_bytes();
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS, 1, MIB, &head);
    frame.head_bytes = 4 * MIB;
    for (uint32_t i = 0; i < N; i++) {
        assert_true(peer_connect(&p[i], f.uri, NULL));
        assert_true(peer_send(&p[i], &frame, zeros, 4 * MIB));
    }
    assert_true(memory_bytes() < before_bytes + 8 * MIB);
    for (uint32_t i = 0; i < N; i++) {
        for (uint32_t left = MIB; left > 0;) {
            uint32_t n = left < 4000 ? left : 4000;
            assert_true(peer_wait_granted(&p[i], 1));
            assert_true(peer_fragment(&p[i], zeros, n, p[i].owed));
            left -= n;
        }
        uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
        while (p[i].n_ends == 0 && !kvc_expired(give_up_ns))
            peer_poll(&p[i]);
        assert_int_equal(p[i].n_ends, 1);
        assert_status(p[i].last.status, KVC_AGAIN);
        assert_false(p[i].down);
        peer_close(&p[i]);
    }
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, 1);
    job_fini(&held);
    assert_serves(&f, 500000);
    close_raw(&f);
}

/* A message that the server has not asked for is charged all the same, until its call ends. */
static void pushed_messages_are_charged(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    const void *head;
    open_raw(&f, MIB, 100);
    fixture_handle(&f, hold_handler);
    assert_true(peer_connect(&p, f.uri, NULL));
    kvc_frame frame = frame_of(&f, KVC_PUT_BLOCKS_STREAM, 1, 0, &head);
    assert_true(peer_send(&p, &frame, head, frame.head_bytes));
    wait_held(&f, 1);
    frame = (kvc_frame){.kind = KVC_FRAME_MESSAGE,
                        .method = KVC_PUT_BLOCKS_STREAM,
                        .call = 1,
                        .data_bytes = 900000};
    assert_true(peer_send(&p, &frame, zeros, 900000));
    assert_true(peer_wait_granted(&p, PEER_RECVS / 2)); /* the server has seen it */
    fixture_handle(&f, sample_handler);
    assert_status(run_once(&f, KVC_PUT_BLOCKS, 500000), KVC_AGAIN);
    assert_int_equal(answer_held(&f), 1);
    assert_serves(&f, 500000);
    peer_close(&p);
    close_raw(&f);
}

/* A thousand connections cost little more than a hundred: the later ones get fewer fragments. */
static void many_links_are_narrow(void **state)
{
    (void)state;
    enum { WIDE = 128, N = 140 };
    fixture f;
    static fake_peer p[N];
    const void *head;
    open_raw(&f, 64 * MIB, 100);
    kvc_frame frame = frame_of(&f, KVC_STATS, 1, 0, &head);
    for (uint32_t i = 0; i < N; i++) {
        uint64_t before_bytes = kvc_metric_get(KVC_M_rdma_registered_bytes);
        assert_true(peer_connect(&p[i], f.uri, NULL));
        uint64_t n_bytes = kvc_metric_get(KVC_M_rdma_registered_bytes) - before_bytes;
        assert_int_equal(n_bytes, i < WIDE ? 48 * 4096 : 12 * 4096);
        assert_int_equal(p[i].granted, i < WIDE ? 32 : 8);
    }
    for (uint32_t i = 0; i < 50; i++) { /* and work all the same */
        frame.call = i + 1;
        assert_true(peer_send(&p[N - 1], &frame, head, frame.head_bytes));
        uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
        while (p[N - 1].n_ends <= i && !kvc_expired(give_up_ns))
            peer_poll(&p[N - 1]);
        assert_int_equal(p[N - 1].n_ends, i + 1);
    }
    for (uint32_t i = 0; i < N; i++)
        peer_close(&p[i]);
    assert_serves(&f, 1000);
    close_raw(&f);
}

/* A client that asks for the next message of a stream without having taken the one before. */
static void credit_needs_a_message_that_has_left(void **state)
{
    (void)state;
    fixture f;
    fake_peer p;
    const void *head;
    fake_intro intro = fake_good_intro;
    intro.credits = 4;
    open_raw(&f, 64 * MIB, 100);
    fixture_handle(&f, long_handler);
    assert_true(peer_connect(&p, f.uri, &intro));
    p.stingy = true;
    kvc_frame frame = frame_of(&f, KVC_FETCH_ROWS_STREAM, 1, 0, &head);
    kvc_frame credit = {.kind = KVC_FRAME_CREDIT, .call = 1};
    assert_true(peer_send(&p, &frame, head, frame.head_bytes));
    (void)peer_send(&p, &credit, NULL, 0);
    assert_true(peer_cut_off(&p));
    peer_close(&p);
    assert_serves(&f, 1000);
    assert_int_equal(atomic_load(&f.n_released), 1);
    close_raw(&f);
}

/* ---- anything -------------------------------------------------------------------------------- */

static uint64_t next_random(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed >> 33;
}

static kvc_frame random_frame(uint64_t *seed)
{
    kvc_frame frame = {
        .kind = (kvc_frame_kind)(KVC_FRAME_REQUEST + next_random(seed) % 5),
        .call = 1 + next_random(seed) % 6,
        .method = (kvc_method)(next_random(seed) % KVC_METHOD_COUNT),
    };
    bool carries = frame.kind <= KVC_FRAME_MESSAGE;
    if (frame.kind == KVC_FRAME_END && next_random(seed) % 8 != 0)
        frame.kind = KVC_FRAME_CREDIT; /* an END is the end */
    if (!carries)
        return frame;
    frame.head_bytes = (uint32_t)(next_random(seed) % 300);
    frame.data_bytes = next_random(seed) % 2 ? 9000 : 0;
    frame.spare[1] = next_random(seed) % 2 ? 0 : UINT64_MAX << 20;
    if (frame.data_bytes > 0 && next_random(seed) % 16 == 0)
        frame.flags = KVC_FRAME_ELSEWHERE;
    if (frame.kind == KVC_FRAME_REQUEST && next_random(seed) % 8 == 0) {
        frame.flags |= PEER_PLACED;
        frame.method = KVC_FETCH_ROWS;
        frame.data_bytes = (uint32_t)(next_random(seed) % 20) * PEER_RUN_BYTES;
    }
    if (frame.kind == KVC_FRAME_MESSAGE && next_random(seed) % 3 == 0)
        frame = (kvc_frame){.kind = KVC_FRAME_MESSAGE,
                            .flags = KVC_FRAME_LAST,
                            .method = frame.method,
                            .call = frame.call};
    return frame;
}

/* Good frames in no good order, with every id, flag, kind and length that a frame may have. */
static void random_frames_do_no_harm(void **state)
{
    (void)state;
    enum { CONNECTIONS = 100, FRAMES = 40 };
    static uint8_t body[16384];
    fixture f;
    uint64_t seed = 7;
    open_raw(&f, MIB, 100);
    for (uint32_t c = 0; c < CONNECTIONS; c++) {
        fake_peer p;
        assert_true(peer_connect(&p, f.uri, NULL));
        for (uint32_t i = 0; i < FRAMES && !p.down; i++) {
            kvc_frame frame = random_frame(&seed);
            for (uint32_t k = 0; k < 300; k++)
                body[k] = (uint8_t)(next_random(&seed) % 16 ? 0 : next_random(&seed));
            (void)peer_send(&p, &frame, body, kvc_frame_body_bytes(&frame));
        }
        peer_close(&p); /* also in the middle of what is under way */
    }
    assert_serves(&f, 100000);
    close_raw(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(strangers_are_refused),
        cmocka_unit_test(bad_frames_end_the_link),
        cmocka_unit_test(bad_fragments_end_the_link),
        cmocka_unit_test(grants_are_kept_to),
        cmocka_unit_test(elsewhere_needs_reads),
        cmocka_unit_test(reads_have_a_deadline),
        cmocka_unit_test(answers_have_a_deadline),
        cmocka_unit_test(refusals_pile_up_to_a_bound),
        cmocka_unit_test(half_a_body_is_charged),
        cmocka_unit_test(refused_bodies_are_skipped),
        cmocka_unit_test(pushed_messages_are_charged),
        cmocka_unit_test(many_links_are_narrow),
        cmocka_unit_test(credit_needs_a_message_that_has_left),
        cmocka_unit_test(random_frames_do_no_harm),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, NULL, NULL);
}
