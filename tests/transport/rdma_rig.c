/*
 * rdma_rig.c: see rdma_rig.h.
 *
 * The handler runs on the listener's thread; what replies consist of is set while none is under
 * way.
 */
#include "rdma_rig.h"

#include <sys/mman.h>
#include <unistd.h>

#include "base/lent.h"

uint8_t *rig_lent;
uint32_t rig_n_slices, rig_slice_bytes;

static uint8_t byte_at(size_t i)
{
    return (uint8_t)(i * 131 + (i >> 8));
}

int rig_make_lent(void **state)
{
    (void)state;
    rig_lent = mmap(NULL, BIG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (rig_lent == MAP_FAILED)
        return 1;
    for (size_t i = 0; i < BIG; i++)
        rig_lent[i] = byte_at(i);
    return kvc_lent_add(rig_lent, BIG) != KVC_OK;
}

int rig_drop_lent(void **state)
{
    (void)state;
    kvc_lent_remove(rig_lent);
    return munmap(rig_lent, BIG);
}

/* A fetch gets rig_n_slices of lent memory; a put is checked. */
void rig_handler(fixture *f, kvt_call *call)
{
    kvt_slice slices[KVT_MAX_SLICES];
    if (call->req.method == KVC_PUT_BLOCKS) {
        size_t at = 0;
        bool right = true;
        for (uint32_t i = 0; i < call->req.n_data; i++) {
            right = right && memcmp(call->req.data[i].iov_base, rig_lent + at,
                                    call->req.data[i].iov_len) == 0;
            at += call->req.data[i].iov_len;
        }
        fixture_reply(f, call, right ? KVC_OK : KVC_CORRUPT, NULL, 0, NULL, NULL, 0);
        return;
    }
    for (uint32_t i = 0; i < rig_n_slices; i++)
        slices[i] = counted_slice(f, rig_lent + (size_t)i * rig_slice_bytes, rig_slice_bytes);
    fixture_reply(f, call, KVC_OK, NULL, 0, NULL, slices, rig_n_slices);
}

static void check_bytes(kvt_xfer *xfer)
{
    bulk *b = (bulk *)xfer;
    size_t at = 0;
    if (xfer->status == KVC_OK && xfer->req->method == KVC_FETCH_ROWS) {
        for (uint32_t i = 0; i < xfer->reply.n_data; i++) {
            b->wrong = b->wrong || memcmp(xfer->reply.data[i].iov_base, rig_lent + at,
                                          xfer->reply.data[i].iov_len) != 0;
            at += xfer->reply.data[i].iov_len;
        }
        b->wrong = b->wrong || at != (size_t)rig_n_slices * rig_slice_bytes;
    }
    b->wrong = b->wrong || xfer->status == KVC_CORRUPT;
    b->next(xfer);
}

void bulk_init(bulk *b, fixture *f, kvc_method method, size_t put_bytes)
{
    kvc_request req = sample_request(method, 0, &f->arena);
    b->wrong = false;
    b->data = (struct iovec){rig_lent, put_bytes};
    if (method == KVC_PUT_BLOCKS) {
        req.data = &b->data;
        req.n_data = 1;
        req.data_bytes = put_bytes;
    }
    job_init(&b->j, f, req, PATIENCE_NS);
    b->next = b->j.xfer.done;
    b->j.xfer.done = check_bytes;
}

kvc_status run_bulk(fixture *f, kvc_method method, size_t put_bytes)
{
    bulk b;
    bulk_init(&b, f, method, put_bytes);
    kvc_status status = job_run(&b.j);
    job_fini(&b.j);
    assert_false(b.wrong);
    return status;
}

void rig_set_reply(uint32_t n, uint32_t bytes)
{
    rig_n_slices = n;
    rig_slice_bytes = bytes;
}

void rig_open_on(fixture *f, const fake_device *device)
{
    fake_verbs_use(device);
    fixture_open(f, 1);
    fixture_handle(f, rig_handler);
}

/* Another connection takes the place of the lost one; the old one may be lost in between. */
void rig_assert_recovers(fixture *f)
{
    kvc_status status = KVC_UNAVAILABLE;
    uint64_t give_up_ns = kvc_deadline_ns(PATIENCE_NS);
    while (status == KVC_UNAVAILABLE && !kvc_expired(give_up_ns)) {
        status = run_bulk(f, KVC_FETCH_ROWS, 0);
        if (status == KVC_OK)
            status = run_bulk(f, KVC_PUT_BLOCKS, 300000);
    }
    assert_ok(status);
}

void rig_close_all(fixture *f)
{
    fake_verbs_fault(&fake_no_faults);
    fixture_close(f);
    assert_true(fake_verbs_all_gone());
}

void rig_wait_registered(void)
{
    uint64_t give_up_ns = kvc_deadline_ns(20 * SECOND);
    while (!fake_verbs_registered(rig_lent) && !kvc_expired(give_up_ns))
        usleep(1000);
    assert_true(fake_verbs_registered(rig_lent));
}
