/*
 * rdma_rooms.h: fetches over RDMA into memory of the test's own, on verbs without a device: areas
 * of slots that are lent, and checks that rows lie in theirs and nothing else was touched.
 *
 * The test's thread; the handler runs on the listener's, and looks at what was set before submit.
 */
#ifndef TESTS_TRANSPORT_RDMA_ROOMS_H
#define TESTS_TRANSPORT_RDMA_ROOMS_H

#include "rdma_rig.h"

#define ROW_BYTES 4096u
#define MAX_ROWS  256u
#define SLOTS     512u
#define AREA      (SLOTS * ROW_BYTES)
#define AREAS     3u
#define ROOMS_ALL ((uint64_t)1 << 30)

extern uint8_t *area[AREAS]; /* [SLOTS][ROW_BYTES] */
extern kvc_missing_row missing[MAX_ROWS];
extern uint32_t n_missing; /* 0 after rooms_open */

typedef struct fetch {
    job j; /* first */
    void (*next)(kvt_xfer *xfer);
    kvt_room room;
    uint32_t slots[MAX_ROWS];
    uint32_t qps_at_done;
} fetch;

/* For the group: areas, and rig_lent. */
int rooms_make(void **state);
int rooms_drop(void **state);
/* region_bytes as in kvt_connect_opts. Lends every area. */
void rooms_open(fixture *f, const fake_device *device, uint64_t region_bytes, bool sums);
/* Nothing of the device's may be left. */
void rooms_close(fixture *f);
/* As many rows of rig_lent as rooms_init said last, but for missing ones. */
void rooms_handler(fixture *f, kvt_call *call);
/* Rows n of area a, which is emptied, row i to slot first + i * step. */
void rooms_init(fetch *t, fixture *f, uint32_t a, uint32_t n, uint32_t first, uint32_t step,
                uint64_t timeout_ns);
bool slot_is_empty(const uint8_t *slot);
/* Every row that there is lies in its slot, and nothing else was touched. */
void assert_placed(const fetch *t);
/* One fetch; whether its rows came without a copy. */
bool run_rooms(fixture *f, uint32_t a, uint32_t n, uint32_t first, uint32_t step);
/* Until rows of the area come without a copy; a first use is copied. */
void warm(fixture *f, uint32_t a);

#endif
