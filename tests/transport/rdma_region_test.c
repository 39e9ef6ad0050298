/*
 * rdma_region_test.c: the memory that RDMA writes rows to, on fake verbs: what of it is registered,
 * for whom and for how long.
 *
 * Every case ends with nothing of the device's left.
 */
#include "rdma_rooms.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/lent.h"
#include "base/log.h"
#include "base/metrics.h"
#include "transport/rdma/server.h"

#define REST_FOR_EVER_NS ((uint64_t)1 << 60)

/* ---- registrations --------------------------------------------------------------------------- */

static void registration_fails(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    rig_wait_registered();
    fake_faults fault = fake_no_faults;
    fault.reg_fails_after = 0;
    fake_verbs_fault(&fault);
    uint64_t failed = kvc_metric_get(KVC_M_rdma_registrations_failed);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (kvc_metric_get(KVC_M_rdma_registrations_failed) == failed && !kvc_expired(give_up_ns))
        assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_registrations_failed), failed + 1);
    fake_verbs_fault(&fake_no_faults);
    assert_false(run_rooms(&f, 1, 16, 5, 1)); /* it is not asked for again */
    assert_false(fake_verbs_registered(area[1]));
    assert_true(run_rooms(&f, 0, 16, 5, 1));
    rooms_close(&f);
}

/* Nobody waits for a registration; memory that is taken back waits for its end. */
static void registering_is_off_the_path(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    fake_faults fault = fake_no_faults;
    fault.reg_stalls = area[1];
    fake_verbs_fault(&fault);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_stalled() == 0 && !kvc_expired(give_up_ns))
        assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_int_equal(fake_verbs_stalled(), 1);
    assert_false(run_rooms(&f, 1, 16, 5, 1));
    assert_true(run_rooms(&f, 0, 16, 5, 1));
    fake_verbs_fault(&fake_no_faults);
    kvc_lent_remove(area[1]);
    assert_false(fake_verbs_registered(area[1]));
    assert_ok(kvc_lent_add(area[1], AREA));
    warm(&f, 1);
    rooms_close(&f);
}

/* The region that was used least recently makes room, unless the server may write there. */
static void least_recently_used_goes(void **state)
{
    (void)state;
    fixture f;
    fetch held;
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, 2 * (uint64_t)AREA, false);
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    warm(&f, 0);
    warm(&f, 1);
    assert_true(run_rooms(&f, 0, 16, 0, 1));
    warm(&f, 2);
    assert_false(fake_verbs_registered(area[1]));
    assert_true(fake_verbs_registered(area[0]));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted + 1);
    /* One call to each of the two that are left: the third has no room until one is over. */
    fixture_handle(&f, hold_handler);
    rooms_init(&held, &f, 0, 16, 0, 1, PATIENCE_NS);
    job_submit(&held.j);
    wait_held(&f, 1);
    fetch other;
    rooms_init(&other, &f, 2, 16, 0, 1, PATIENCE_NS);
    job_submit(&other.j);
    wait_held(&f, 2);
    fixture_handle(&f, rooms_handler);
    for (int i = 0; i < 50; i++) {
        assert_false(run_rooms(&f, 1, 16, 0, 1));
        usleep(1000);
    }
    assert_true(fake_verbs_registered(area[0]) && fake_verbs_registered(area[2]));
    uint32_t n_done = f.n_done;
    assert_int_equal(answer_held(&f), 2);
    wait_done(&f, n_done + 2);
    assert_status(held.j.status, KVC_NOT_FOUND);
    job_fini(&held.j);
    job_fini(&other.j);
    warm(&f, 1);
    rooms_close(&f);
}

/* What was used just now stays: of three that are used in turn, with room for two, two come without
 * a copy all the time and nothing is registered anew. */
static void used_in_turn(void **state)
{
    (void)state;
    fixture f;
    kvtr_region_rest_ns = REST_FOR_EVER_NS;
    rooms_open(&f, NULL, 2 * (uint64_t)AREA, false);
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    warm(&f, 0);
    warm(&f, 1);
    for (int i = 0; i < 50; i++) {
        assert_true(run_rooms(&f, 0, 16, 0, 1));
        assert_true(run_rooms(&f, 1, 16, 0, 1));
        assert_false(run_rooms(&f, 2, 16, 0, 1));
        usleep(1000); /* for the thread that would do it */
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted);
    kvc_lent_remove(area[0]); /* its sequence is over, and the third has room at once */
    warm(&f, 2);
    assert_ok(kvc_lent_add(area[0], AREA));
    rooms_close(&f);
}

/* Nothing goes where that would not be enough: half of the room is in use, and the third area needs
 * more than the rest. */
static void evicted_in_vain(void **state)
{
    (void)state;
    fixture f;
    fetch held;
    uint8_t *half = area[0] + AREA / 2;
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, AREA, false);
    kvc_lent_remove(area[0]);
    assert_ok(kvc_lent_add(area[0], AREA / 2));
    assert_ok(kvc_lent_add(half, AREA / 2));
    warm(&f, 0);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (!run_rooms(&f, 0, 16, SLOTS / 2, 1) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(fake_verbs_registered(half));
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    fixture_handle(&f, hold_handler);
    rooms_init(&held, &f, 0, 16, 0, 1, PATIENCE_NS);
    job_submit(&held.j);
    wait_held(&f, 1);
    fixture_handle(&f, rooms_handler);
    for (int i = 0; i < 50; i++) {
        assert_false(run_rooms(&f, 1, 16, 0, 1));
        usleep(1000);
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted);
    uint32_t n_done = f.n_done;
    assert_int_equal(answer_held(&f), 1);
    wait_done(&f, n_done + 1);
    job_fini(&held.j);
    warm(&f, 1); /* now both halves go */
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted + 2);
    kvc_lent_remove(half);
    kvc_lent_remove(area[0]);
    assert_ok(kvc_lent_add(area[0], AREA));
    rooms_close(&f);
}

/* Until rows of slots first .. first + n - 1 come without a copy. */
static void warm_at(fixture *f, uint32_t n, uint32_t first)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (!run_rooms(f, 0, n, first, 1) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(run_rooms(f, 0, n, first, 1));
}

/* Of a region that is larger than all there is room for, pieces are registered as they are used:
 * rows within half a piece always, over more than a piece never. It is counted once. */
static void larger_than_the_room(void **state)
{
    (void)state;
    fixture f;
    uint64_t n = kvc_metric_get(KVC_M_rdma_regions_too_large);
    const uint32_t piece = SLOTS / 2 / KVTI_WINDOWS; /* slots */
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, AREA / 2, false);
    warm_at(&f, piece / 2, 0);
    assert_int_equal(fake_verbs_bytes(area[0], AREA), piece * ROW_BYTES);
    assert_true(run_rooms(&f, 0, piece / 2, piece / 2, 1)); /* the next piece has them, too */
    assert_int_equal(fake_verbs_bytes(area[0], AREA), piece * ROW_BYTES);
    for (uint32_t first = 0; first < SLOTS; first += piece / 4 + 1) {
        uint32_t n_rows = first + piece / 2 < SLOTS ? piece / 2 : SLOTS - first;
        warm_at(&f, n_rows, first);
    }
    for (int i = 0; i < 20; i++)
        assert_false(run_rooms(&f, 0, piece + 1, piece / 2, 1));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_too_large), n + 1);
    assert_false(fake_verbs_bytes(area[0], AREA) > AREA / 2);
    assert_true(fake_verbs_bytes(area[0], AREA) > AREA / 4); /* several of them at once */
    assert_true(run_rooms(&f, 0, piece / 2, SLOTS - piece / 2, 1));
    kvc_lent_remove(area[0]);
    assert_int_equal(fake_verbs_bytes(area[0], AREA), 0);
    assert_ok(kvc_lent_add(area[0], AREA));
    rooms_close(&f);
}

/* What is used lately stays, and the rest is copied: nothing is registered for one use. */
static void larger_and_used_all_over(void **state)
{
    (void)state;
    fixture f;
    const uint32_t half = SLOTS / 4 / KVTI_WINDOWS;
    uint32_t n_placed = 0;
    kvtr_region_rest_ns = REST_FOR_EVER_NS;
    rooms_open(&f, NULL, AREA / 2, false);
    uint64_t evicted = kvc_metric_get(KVC_M_rdma_regions_evicted);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    for (int turn = 0; turn < 4 || (n_placed == 0 && !kvc_expired(give_up_ns)); turn++) {
        n_placed = 0;
        for (uint32_t first = 0; first < SLOTS; first += half)
            n_placed += run_rooms(&f, 0, half, first, 1);
        usleep(1000); /* for the thread that registers */
    }
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_evicted), evicted);
    assert_true(n_placed > 0 && n_placed < SLOTS / half);
    rooms_close(&f);
}

/* Room that is too small to be cut: copied to, and counted once. */
static void too_large(void **state)
{
    (void)state;
    fixture f;
    uint64_t n = kvc_metric_get(KVC_M_rdma_regions_too_large);
    rooms_open(&f, NULL, 4 * 4096, false);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (kvc_metric_get(KVC_M_rdma_regions_too_large) == n && !kvc_expired(give_up_ns)) {
        assert_false(run_rooms(&f, 0, 16, 0, 1));
        usleep(1000);
    }
    for (int i = 0; i < 20; i++)
        assert_false(run_rooms(&f, 0, 16, 0, 1));
    assert_int_equal(kvc_metric_get(KVC_M_rdma_regions_too_large), n + 1);
    assert_false(fake_verbs_registered(area[0]));
    rooms_close(&f);
}

/* The limit is that of two connections together: while one has all of it, the other has nothing. */
static void assert_shared(fixture *f)
{
    struct rlimit before;
    kvt_conn *first = f->conn;
    warm(f, 0);
    assert_int_equal(getrlimit(RLIMIT_MEMLOCK, &before), 0);
    struct rlimit now = {4 * AREA, before.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &now), 0);
    fixture_connect(f, 1);
    assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &before), 0);
    for (int i = 0; i < 20; i++) {
        assert_false(run_rooms(f, 0, 16, 0, 1));
        assert_false(run_rooms(f, 1, 16, 0, 1));
        usleep(1000);
    }
    f->ops->conn_close(first);
    warm(f, 1);
}

/* What may be locked is not all for regions, however many connections there are. */
static void locked_memory_is_limited(void **state)
{
    (void)state;
    struct rlimit before;
    assert_int_equal(getrlimit(RLIMIT_MEMLOCK, &before), 0);
    for (rlim_t areas = 3; areas <= 4; areas++) {
        struct rlimit now = {areas * AREA, before.rlim_max};
        fixture f;
        if (before.rlim_max != RLIM_INFINITY && before.rlim_max < now.rlim_cur)
            skip();
        assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &now), 0);
        rooms_open(&f, NULL, 0, false);
        assert_int_equal(setrlimit(RLIMIT_MEMLOCK, &before), 0);
        for (uint32_t i = 0; i < 20 && areas == 3; i++) { /* pieces of it, within the limit */
            (void)run_rooms(&f, 0, 16, i * 20, 1);
            assert_true(fake_verbs_bytes(area[0], AREA) <= 3 * AREA / 4);
            usleep(1000);
        }
        if (areas == 4)
            assert_shared(&f);
        rooms_close(&f);
    }
}

/* Each connection registers for itself: a key opens nothing to another connection's server. */
static void keys_are_of_a_connection(void **state)
{
    (void)state;
    fixture f;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    warm(&f, 0);
    assert_int_equal(fake_verbs_n_registered(area[0]), 1);
    kvt_conn *first = f.conn;
    fixture_connect(&f, 1);
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (fake_verbs_n_registered(area[0]) < 2 && !kvc_expired(give_up_ns))
        (void)run_rooms(&f, 0, 2, 0, 1);
    assert_int_equal(fake_verbs_n_registered(area[0]), 2);
    f.ops->conn_close(f.conn);
    assert_int_equal(fake_verbs_n_registered(area[0]), 1);
    f.conn = first;
    assert_true(run_rooms(&f, 0, 16, 0, 1));
    rooms_close(&f);
}

/* ---- memory of a GPU -------------------------------------------------------------------------
 */

/* Area 0 is where a GPU's memory is seen to be, and no CPU may touch it; its bytes are a file's,
 * which is its dma-buf, behind some that are not its. */
#define GPU_OFF_BYTES 8192u

typedef struct gpu_memory {
    uint8_t *base, *bytes;
    int fd;
} gpu_memory;

static void gpu_make(gpu_memory *m, bool peer, int dmabuf_errno)
{
    m->fd = memfd_create("gpu", MFD_CLOEXEC);
    assert_true(m->fd >= 0);
    assert_int_equal(ftruncate(m->fd, GPU_OFF_BYTES + AREA), 0);
    m->bytes = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, (off_t)GPU_OFF_BYTES);
    m->base = mmap(NULL, AREA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(m->bytes != MAP_FAILED && m->base != MAP_FAILED);
    fake_verbs_gpu(&(fake_gpu){.base = m->base,
                               .len_bytes = AREA,
                               .bytes = m->bytes,
                               .peer = peer,
                               .dmabuf_errno = dmabuf_errno});
}

static void gpu_drop(gpu_memory *m)
{
    (void)munmap(m->base, AREA);
    (void)munmap(m->bytes, AREA);
    (void)close(m->fd);
}

/* One fetch of n rows to slots first ..., whose bytes are looked at where they really are. */
static bool run_gpu(fixture *f, const gpu_memory *m, uint32_t n, uint32_t first)
{
    fetch t;
    rooms_init(&t, f, 0, n, first, 1, PATIENCE_NS);
    t.room.base = m->base;
    memset(m->bytes, 0, AREA);
    assert_ok(job_run(&t.j));
    bool placed = t.j.xfer.placed;
    for (uint32_t i = 0; i < n && placed; i++)
        assert_memory_equal(m->bytes + (size_t)(first + i) * ROW_BYTES,
                            rig_lent + (size_t)i * ROW_BYTES, ROW_BYTES);
    job_fini(&t.j);
    return placed;
}

/* Until what becomes of it is known; whether rows are placed then. */
static bool settle_gpu(fixture *f, const gpu_memory *m, const kvc_lent_gpu *gpu)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (atomic_load(&gpu->way) == KVC_LENT_NOT_YET && !kvc_expired(give_up_ns)) {
        (void)run_gpu(f, m, 2, 0);
        usleep(1000);
    }
    if (atomic_load(&gpu->way) != KVC_LENT_COPIED)
        while (!run_gpu(f, m, 2, 0) && !kvc_expired(give_up_ns))
            usleep(1000);
    return run_gpu(f, m, 16, 5);
}

typedef struct gpu_case {
    bool exported, peer;
    int dmabuf_errno;
    kvc_lent_way way;
    const char *why; /* of COPIED, a part of it */
} gpu_case;

static void check_gpu(const gpu_case *c)
{
    fixture f;
    gpu_memory m;
    const kvc_lent_gpu *gpu = NULL;
    rooms_open(&f, NULL, ROOMS_ALL, false);
    gpu_make(&m, c->peer, c->dmabuf_errno);
    assert_ok(kvc_lent_add_gpu(m.base, AREA, c->exported ? m.fd : -1, GPU_OFF_BYTES, &gpu));
    assert_int_equal(settle_gpu(&f, &m, gpu), c->way != KVC_LENT_COPIED);
    assert_int_equal(atomic_load(&gpu->way), c->way);
    if (c->way == KVC_LENT_COPIED)
        assert_non_null(strstr(atomic_load(&gpu->why), c->why));
    else
        assert_true(fake_verbs_open(m.base));
    kvc_lent_remove(m.base);
    assert_false(fake_verbs_registered(m.base));
    gpu_drop(&m);
    rooms_close(&f);
}

static void memory_of_a_gpu(void **state)
{
    (void)state;
    const gpu_case cases[] = {
        {true, false, 0, KVC_LENT_DMABUF, NULL},
        {true, true, 0, KVC_LENT_DMABUF, NULL},
        {true, true, EOPNOTSUPP, KVC_LENT_PEER, NULL},
        {false, true, 0, KVC_LENT_PEER, NULL},
        {true, false, EOPNOTSUPP, KVC_LENT_COPIED, "takes no dma-buf"},
        {true, false, EINVAL, KVC_LENT_COPIED, "refused the dma-buf"},
        {false, false, 0, KVC_LENT_COPIED, "exports no dma-buf"},
    };
    uint64_t dmabuf = kvc_metric_get(KVC_M_rdma_gpu_regions_dmabuf);
    uint64_t peer = kvc_metric_get(KVC_M_rdma_gpu_regions_peer);
    uint64_t copied = kvc_metric_get(KVC_M_rdma_gpu_regions_copied);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
        check_gpu(&cases[i]);
    assert_int_equal(kvc_metric_get(KVC_M_rdma_gpu_regions_dmabuf), dmabuf + 2);
    assert_int_equal(kvc_metric_get(KVC_M_rdma_gpu_regions_peer), peer + 2);
    assert_int_equal(kvc_metric_get(KVC_M_rdma_gpu_regions_copied), copied + 3);
}

/* Neither a registration that fails nor sums reach for it by CPU, and a descriptor of the caller's
 * may be closed at once. */
static void a_gpu_that_is_copied_to(void **state)
{
    (void)state;
    for (int sums = 0; sums < 2; sums++) {
        fixture f;
        gpu_memory m;
        const kvc_lent_gpu *gpu = NULL;
        rooms_open(&f, NULL, ROOMS_ALL, sums == 1);
        gpu_make(&m, false, 0);
        fake_faults fault = fake_no_faults;
        warm(&f, 1); /* nothing else is to be registered from here on */
        rig_wait_registered();
        fault.reg_fails_after = sums == 1 ? UINT32_MAX : 0;
        fake_verbs_fault(&fault);
        assert_ok(kvc_lent_add_gpu(m.base, AREA, m.fd, GPU_OFF_BYTES, &gpu));
        assert_int_equal(close(m.fd), 0);
        m.fd = -1;
        assert_false(settle_gpu(&f, &m, gpu));
        assert_int_equal(atomic_load(&gpu->way), KVC_LENT_COPIED);
        assert_non_null(strstr(atomic_load(&gpu->why), sums == 1 ? "sums" : "refused"));
        assert_false(fake_verbs_registered(m.base));
        fake_verbs_fault(&fake_no_faults);
        kvc_lent_remove(m.base);
        gpu_drop(&m);
        rooms_close(&f);
    }
}

static uint64_t ways_counted(void)
{
    return kvc_metric_get(KVC_M_rdma_gpu_regions_dmabuf) +
           kvc_metric_get(KVC_M_rdma_gpu_regions_peer) +
           kvc_metric_get(KVC_M_rdma_gpu_regions_copied);
}

/* Of a region, not of its pieces, it is told and counted what became of it; one piece that is
 * refused does not make it one that is copied to. */
static void pieces_are_one_region(void **state)
{
    (void)state;
    const uint32_t half = SLOTS / 4 / KVTI_WINDOWS;
    for (int refused = 0; refused < 2; refused++) {
        fixture f;
        gpu_memory m;
        const kvc_lent_gpu *gpu = NULL;
        fake_faults fault = fake_no_faults;
        kvtr_region_rest_ns = 0;
        rooms_open(&f, NULL, AREA / 2, false);
        (void)run_rooms(&f, 1, 2, 0, 1);
        rig_wait_registered();
        gpu_make(&m, false, refused == 1 ? EINVAL : 0);
        uint64_t counted = ways_counted();
        assert_ok(kvc_lent_add_gpu(m.base, AREA, m.fd, GPU_OFF_BYTES, &gpu));
        (void)settle_gpu(&f, &m, gpu);
        if (refused == 0)
            fault.reg_fails_after = 0;
        fake_verbs_fault(&fault);
        uint64_t failed = kvc_metric_get(KVC_M_rdma_registrations_failed) + 3;
        for (uint32_t first = 3 * half; first + half <= SLOTS; first += half) {
            uint64_t tried = kvc_metric_get(KVC_M_rdma_registrations_failed);
            uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
            while (tried < failed && kvc_metric_get(KVC_M_rdma_registrations_failed) == tried &&
                   !kvc_expired(give_up_ns)) {
                if (run_gpu(&f, &m, half, first))
                    break;
                usleep(1000);
            }
        }
        assert_true(kvc_metric_get(KVC_M_rdma_registrations_failed) >= failed);
        assert_int_equal(ways_counted(), counted + 1);
        assert_int_equal(atomic_load(&gpu->way), refused == 1 ? KVC_LENT_COPIED : KVC_LENT_DMABUF);
        fake_verbs_fault(&fake_no_faults);
        kvc_lent_remove(m.base);
        gpu_drop(&m);
        rooms_close(&f);
    }
}

static void summing_handler(fixture *f, kvt_call *call)
{
    ((kvtr_rcall *)call)->summed = true;
    rooms_handler(f, call);
}

/* A server that sums what nobody asked it to sum makes no CPU read a GPU's memory: its answer is
 * against the protocol, and so is one for memory of the host. */
static void sums_unasked(void **state)
{
    (void)state;
    for (int host = 0; host < 2; host++) {
        fixture f;
        gpu_memory m;
        fetch t;
        const kvc_lent_gpu *gpu = NULL;
        rooms_open(&f, NULL, ROOMS_ALL, false);
        gpu_make(&m, false, 0);
        assert_ok(kvc_lent_add_gpu(m.base, AREA, m.fd, GPU_OFF_BYTES, &gpu));
        assert_true(settle_gpu(&f, &m, gpu));
        warm(&f, 1);
        fixture_handle(&f, summing_handler);
        rooms_init(&t, &f, 1, 16, 0, 1, PATIENCE_NS);
        if (host == 0)
            t.room.base = m.base;
        (void)job_run(&t.j);
        assert_status(t.j.status, KVC_PROTOCOL);
        assert_false(t.j.xfer.placed);
        job_fini(&t.j);
        kvc_lent_remove(m.base);
        gpu_drop(&m);
        rooms_close(&f);
    }
}

/* Pieces of a large one are found in the dma-buf where they are. */
static void pieces_of_a_gpu(void **state)
{
    (void)state;
    fixture f;
    gpu_memory m;
    const kvc_lent_gpu *gpu = NULL;
    const uint32_t half = SLOTS / 4 / KVTI_WINDOWS;
    kvtr_region_rest_ns = 0;
    rooms_open(&f, NULL, AREA / 2, false);
    gpu_make(&m, false, 0);
    assert_ok(kvc_lent_add_gpu(m.base, AREA, m.fd, GPU_OFF_BYTES, &gpu));
    for (uint32_t first = 0; first + half <= SLOTS; first += half) {
        uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
        while (!run_gpu(&f, &m, half, first) && !kvc_expired(give_up_ns))
            usleep(1000);
        assert_true(run_gpu(&f, &m, half, first));
    }
    kvc_lent_remove(m.base);
    gpu_drop(&m);
    rooms_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(registration_fails),       cmocka_unit_test(registering_is_off_the_path),
        cmocka_unit_test(least_recently_used_goes), cmocka_unit_test(keys_are_of_a_connection),
        cmocka_unit_test(locked_memory_is_limited), cmocka_unit_test(used_in_turn),
        cmocka_unit_test(evicted_in_vain),          cmocka_unit_test(too_large),
        cmocka_unit_test(larger_than_the_room),     cmocka_unit_test(larger_and_used_all_over),
        cmocka_unit_test(memory_of_a_gpu),          cmocka_unit_test(a_gpu_that_is_copied_to),
        cmocka_unit_test(pieces_of_a_gpu),          cmocka_unit_test(sums_unasked),
        cmocka_unit_test(pieces_are_one_region),
    };
    kvc_log_set_level(getenv("KVASIR_TEST_LOG") != NULL ? KVC_LOG_LEVEL_TRACE : KVC_LOG_LEVEL_OFF);
    suite_uri = "rdma://127.0.0.1:0";
    return cmocka_run_group_tests(tests, rooms_make, rooms_drop);
}
