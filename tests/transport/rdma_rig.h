/*
 * rdma_rig.h: a server and a client on verbs without a device, with a megabyte of lent memory that
 * fetches are answered from and puts are compared with.
 *
 * The memory and what replies consist of are this program's; see fixture.h for the threads.
 */
#ifndef TESTS_TRANSPORT_RDMA_RIG_H
#define TESTS_TRANSPORT_RDMA_RIG_H

#include "fixture.h"

#include "fake_verbs.h"

#define BIG KVC_MAX_VALUE_BYTES

extern uint8_t *rig_lent; /* [BIG] every byte follows from its place */
extern uint32_t rig_n_slices, rig_slice_bytes;

/* A transfer with its payload; wrong: bytes that are not those of rig_lent, or CORRUPT. */
typedef struct bulk {
    job j; /* first */
    void (*next)(kvt_xfer *xfer);
    struct iovec data;
    bool wrong;
} bulk;

/* For the group: rig_lent, lent. */
int rig_make_lent(void **state);
int rig_drop_lent(void **state);
/* A fetch gets rig_n_slices of rig_lent; a put is checked. */
void rig_handler(fixture *f, kvt_call *call);
void rig_set_reply(uint32_t n, uint32_t bytes);
void bulk_init(bulk *b, fixture *f, kvc_method method, size_t put_bytes);
/* Submits one and waits; fails where it is wrong. */
kvc_status run_bulk(fixture *f, kvc_method method, size_t put_bytes);
void rig_open_on(fixture *f, const fake_device *device);
/* Another connection takes the place of the lost one; the old one may be lost in between. */
void rig_assert_recovers(fixture *f);
/* Closes both ends without faults; nothing of the device's may be left. */
void rig_close_all(fixture *f);
/* Until rig_lent is registered, which comes after its first use. */
void rig_wait_registered(void);

#endif
