/*
 * rdma_rooms.c: see rdma_rooms.h.
 *
 * What replies consist of is set while none is under way.
 */
#include "rdma_rooms.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/lent.h"

#define EMPTY 0xa5

uint8_t *area[AREAS];
kvc_missing_row missing[MAX_ROWS];
uint32_t n_missing;
static uint32_t n_asked; /* rows of a request */

static bool is_missing(uint32_t row)
{
    for (uint32_t m = 0; m < n_missing; m++) {
        if (missing[m].index == row)
            return true;
    }
    return false;
}

/* Rows n_asked of rig_lent, but for missing ones. */
void rooms_handler(fixture *f, kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    kvc_reply reply = {.method = KVC_FETCH_ROWS};
    uint32_t n = 0;
    reply.u.fetch_rows.missing = missing;
    reply.u.fetch_rows.n_missing = n_missing;
    for (uint32_t i = 0; i < n_asked; i++) {
        if (!is_missing(i))
            slices[n++] = counted_slice(f, rig_lent + (size_t)i * ROW_BYTES, ROW_BYTES);
    }
    fixture_reply(f, call, KVC_OK, NULL, 0, &reply, slices, n);
}

static void on_done(kvt_xfer *xfer)
{
    fetch *t = (fetch *)xfer;
    t->qps_at_done = (uint32_t)fake_verbs_live().qps;
    t->next(xfer);
}

/* Rows n of area a, row i to slot first + i * step. */
void rooms_init(fetch *t, fixture *f, uint32_t a, uint32_t n, uint32_t first, uint32_t step,
                uint64_t timeout_ns)
{
    n_asked = n;
    job_init(&t->j, f, sample_request(KVC_FETCH_ROWS, 0, &f->arena), timeout_ns);
    t->next = t->j.xfer.done;
    t->j.xfer.done = on_done;
    for (uint32_t i = 0; i < n; i++)
        t->slots[i] = first + i * step;
    t->room = (kvt_room){.base = area[a],
                         .slots = step == 1 ? NULL : t->slots,
                         .first_slot = first,
                         .n = n,
                         .row_bytes = ROW_BYTES};
    t->j.xfer.rooms = &t->room;
    t->j.xfer.n_rooms = 1;
    memset(area[a], EMPTY, AREA);
}

bool slot_is_empty(const uint8_t *slot)
{
    uint32_t i = 0;
    while (i < ROW_BYTES && slot[i] == EMPTY)
        i++;
    return i == ROW_BYTES;
}

/* Every row that there is lies in its slot, and nothing else was touched. */
void assert_placed(const fetch *t)
{
    uint32_t n_rows = 0;
    for (uint32_t s = 0; s < SLOTS; s++) {
        const uint8_t *slot = t->room.base + (size_t)s * ROW_BYTES;
        uint32_t row = 0;
        while (row < t->room.n && (t->slots[row] != s || is_missing(row)))
            row++;
        if (row == t->room.n) {
            assert_true(slot_is_empty(slot));
            continue;
        }
        assert_memory_equal(slot, rig_lent + (size_t)row * ROW_BYTES, ROW_BYTES);
        n_rows++;
    }
    assert_int_equal(n_rows, t->room.n - n_missing);
}

/* One fetch; whether its rows came without a copy. */
bool run_rooms(fixture *f, uint32_t a, uint32_t n, uint32_t first, uint32_t step)
{
    fetch t;
    rooms_init(&t, f, a, n, first, step, PATIENCE_NS);
    assert_ok(job_run(&t.j));
    bool placed = t.j.xfer.placed;
    assert_int_equal(t.j.xfer.reply.data_bytes, (uint64_t)(n - n_missing) * ROW_BYTES);
    if (placed)
        assert_placed(&t);
    else
        assert_true(
            slot_is_empty(area[a] + (size_t)first * ROW_BYTES)); /* they are the reply's data */
    job_fini(&t.j);
    return placed;
}

/* Until rows of the area come without a copy; a first use is copied. */
void warm(fixture *f, uint32_t a)
{
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (!run_rooms(f, a, 2, 0, 1) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(fake_verbs_registered(area[a]));
}

void rooms_open(fixture *f, const fake_device *device, uint64_t region_bytes, bool sums)
{
    fake_verbs_use(device);
    n_missing = 0;
    fixture_init(f);
    f->region_bytes = region_bytes;
    f->sums = sums;
    fixture_listen(f);
    fixture_connect(f, 1);
    fixture_handle(f, rooms_handler);
    for (uint32_t a = 0; a < AREAS; a++)
        assert_ok(kvc_lent_add(area[a], AREA));
}

void rooms_close(fixture *f)
{
    fake_verbs_fault(&fake_no_faults);
    for (uint32_t a = 0; a < AREAS; a++) {
        kvc_lent_remove(area[a]);
        assert_false(fake_verbs_registered(area[a]));
    }
    rig_close_all(f);
}

int rooms_make(void **state)
{
    for (uint32_t a = 0; a < AREAS; a++) {
        area[a] = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (area[a] == MAP_FAILED)
            return 1;
    }
    return rig_make_lent(state);
}

int rooms_drop(void **state)
{
    for (uint32_t a = 0; a < AREAS; a++)
        (void)munmap(area[a], AREA);
    return rig_drop_lent(state);
}
