/*
 * fake_internal.h: what fake_verbs.c, fake_mrs.c and fake_cm.c share; nobody else includes it.
 *
 * Everything is guarded by fake_mutex.
 */
#ifndef TESTS_SUPPORT_FAKE_INTERNAL_H
#define TESTS_SUPPORT_FAKE_INTERNAL_H

#include <pthread.h>

#include "fake_verbs.h"

#define FAKE_RECVS 64u

typedef struct fake_comp {
    struct ibv_comp_channel channel; /* first */
} fake_comp;

typedef struct fake_cq {
    struct ibv_cq cq; /* first */
    struct ibv_wc *wcs;
    int at, n;
    bool armed;
} fake_cq;

typedef struct fake_recv {
    uint64_t wr_id;
    struct ibv_sge sge;
} fake_recv;

/* A work request that is not done yet. */
typedef struct fake_wr {
    struct fake_wr *next;
    struct ibv_send_wr wr;
    struct ibv_sge sge[32];
} fake_wr;

typedef struct fake_qp fake_qp;
struct fake_qp {
    struct ibv_qp qp; /* first */
    fake_qp *next;
    fake_qp *peer;
    bool error;
    uint32_t max_sge, sq_depth, sq_used, unsignalled;
    fake_recv recvs[FAKE_RECVS];
    uint32_t recv_at, n_recvs;
    struct ibv_send_wr late[FAKE_RECVS]; /* READs to be done once the queue is empty */
    struct ibv_sge late_sge[FAKE_RECVS];
    uint32_t n_late;
    fake_wr *stalled; /* WRITEs that stall, and what was posted behind them */
};

extern pthread_mutex_t fake_mutex;
extern fake_live fake_now;
extern fake_device fake_dev;
extern fake_faults fake_fault;
extern struct ibv_context fake_context;

/* With the mutex held. */
void fake_qp_error(fake_qp *qp);
fake_qp *fake_find_qp(uint32_t qp_num);
/* All of them, one after another; NULL: the first, and after the last. */
fake_qp *fake_next_qp(fake_qp *qp);
/* The bytes at addr, if the key covers them, allows the access and is of the domain; else NULL. */
uint8_t *fake_reach(const struct ibv_pd *pd, uint32_t key, uint64_t addr, uint64_t len_bytes,
                    int access, bool remote);
/* Something is registered in the domain. */
bool fake_pd_used(const struct ibv_pd *pd);
/* Fills in what registers memory; there is no memory of a GPU. */
void fake_mrs_table(kvtr_verbs *table);
/* Fills in the calls of librdmacm. */
void fake_cm_table(kvtr_verbs *table);

#endif
