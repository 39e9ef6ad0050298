/*
 * fake_verbs.h: RDMA verbs without a device: queue pairs of one process that copy memory.
 *
 * fake_verbs_use() puts it in the place of the libraries. It is strict: a SEND without a receive,
 * a key that does not cover its bytes, allow the access or belong to the queue pair's domain, too
 * many pieces or work requests, all fail as a device would fail them. Faults are asked for by the
 * fields of fake_verbs_faults, which may be set at any time and are read under the fake's lock.
 */
#ifndef TESTS_SUPPORT_FAKE_VERBS_H
#define TESTS_SUPPORT_FAKE_VERBS_H

#include <stdbool.h>
#include <stdint.h>

#include "transport/rdma/verbs.h"

typedef struct fake_device {
    uint32_t max_sge, max_inline_bytes, max_reads;
    bool iwarp;
    bool late_reads; /* a READ is done, and completes, after the SENDs that were posted behind it */
} fake_device;

/* Everything that was made and not yet destroyed. */
typedef struct fake_live {
    int channels, ids, pds, mrs, comp_channels, cqs, qps;
} fake_live;

typedef struct fake_faults {
    uint32_t wc_after;         /* the n-th work request that is posted from now on ... */
    enum ibv_wc_status wc;     /* ... completes so, and its queue pair fails; SUCCESS: none */
    uint32_t reg_fails_after;  /* registrations that still succeed; UINT32_MAX: all */
    uint32_t post_fails_after; /* posts of sends that still succeed; UINT32_MAX: all */
    uint32_t flip_after;       /* the n-th work request from now on ... */
    enum ibv_wr_opcode flip;   /* ... of this kind comes with its last byte changed; 0: none */
    bool qp_fails, cq_fails, pd_fails;
    uint8_t accept_says; /* bytes of private data that a client gets at most; 0: all */
    bool reads_stall;    /* READs are never done, until this is lifted */
    /* WRITEs, and what is posted behind them, are not done until this is lifted, and then only on
     * queue pairs that are still there. */
    bool writes_stall;
    const void *reg_stalls;  /* to register memory that begins there takes until this is lifted */
    size_t reg_stalls_bytes; /* or so much, that is open to the peer or not: */
    bool reg_stalls_open;
} fake_faults;

/* Memory of a GPU, as addresses that no CPU can touch, and where its bytes are. A file with these
 * bytes is its dma-buf. */
typedef struct fake_gpu {
    uint8_t *base;
    size_t len_bytes;
    uint8_t *bytes;   /* for peer memory; NULL without */
    bool peer;        /* there is peer memory */
    int dmabuf_errno; /* with which the device takes no dma-buf, whosever it is; 0: it does */
} fake_gpu;

/* From now on; nothing may be in use. device NULL: 32 pieces, 256 bytes inline, 16 READs. */
void fake_verbs_use(const fake_device *device);
void fake_verbs_fault(const fake_faults *faults);
/* From now on; fake_verbs_use forgets it. */
void fake_verbs_gpu(const fake_gpu *memory);
/* How often a fault that was asked for last has hit a work request. */
uint32_t fake_verbs_hits(void);
/* Registrations that a fault holds up. */
uint32_t fake_verbs_stalled(void);
/* No fault at all. */
extern const fake_faults fake_no_faults;
fake_live fake_verbs_live(void);
/* True if nothing is left. */
bool fake_verbs_all_gone(void);
/* Work requests that a fault holds up. */
uint32_t fake_verbs_waiting(void);
/* How often memory that begins there is registered. */
uint32_t fake_verbs_n_registered(const void *addr);
bool fake_verbs_registered(const void *addr);
/* Of registrations that begin within, whether they overlap or not. */
uint64_t fake_verbs_bytes(const void *addr, size_t len_bytes);
/* True if a peer may read or write some of the memory that is registered from there. */
bool fake_verbs_open(const void *addr);
/* Queues an event for every id that is connected or connecting; gives their number. */
uint32_t fake_verbs_event(enum rdma_cm_event_type type);
/* Work requests of a kind that were posted, and the most pieces that one of them had. */
uint32_t fake_verbs_posted(enum ibv_wr_opcode opcode);
uint32_t fake_verbs_signals(void);

#endif
