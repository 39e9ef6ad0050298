/*
 * put.c: the put threads; see put.h.
 *
 * A server has a lane, which is a thread and its jobs; there is a job for each block. Its states:
 * QUEUED (to be sent), FLYING (the op is the client's), LANDED (answered; to be judged), WAITING
 * (to be sent again at due_ns), PLACED (its server has every value; that server's context does not
 * cover it yet), COVERED (it does; earlier blocks of other servers are not that far). Only the
 * lane's thread moves a job, except FLYING -> LANDED, which the op's callback does; the engine's
 * thread queues jobs and sets flags. A COVERED job is in no thread's hands and leaves the queue
 * with the sequence's earlier blocks; any other leaves it by its lane, when it is given up.
 * Invariant: a sequence's jobs are consecutive blocks from n_acked on.
 */
#include "put.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "internal.h"

#define BACKOFF_MIN_NS 5000000ull
#define BACKOFF_MAX_NS 1000000000ull
/* Several servers: how long a context may take to grow before it is asked again: a sequence that
 * closes waits no longer for one that hangs. */
#define EXTEND_NS      2000000000ull
#define RUN_CAP        64u /* blocks by which contexts grow at a time */

typedef enum job_state { QUEUED, FLYING, LANDED, WAITING, PLACED, COVERED } job_state;

typedef struct job {
    struct job *next;
    kvw_seq *seq;
    uint32_t block, server;
    const kvwi_block *buf;
    job_state state;
    bool cancelled;
    uint64_t due_ns, backoff_ns;
    kvc_op op;
    uint32_t n; /* values not yet acknowledged */
    kvc_value *values;
    int8_t *status;
} job;

typedef struct lane {
    kvwi_putter *putter;
    uint32_t server;
    kvc_cond wake; /* its thread: something to do */
    kvc_thread thread;
} lane;

struct kvwi_putter {
    kvw_worker *worker;
    kvc_mutex mutex; /* WORKER; guards all below and every sequence's put state; nothing is called
                        under it */
    kvc_cond moved;  /* sequences: a job left, or an error came */
    job *head, *tail;
    bool closing;
    uint32_t n_started; /* lanes whose threads run */
    lane lanes[];       /* one a server */
};

uint64_t kvwi_put_extend_ns = EXTEND_NS;

/* ---- jobs ---- */

static void free_job(job *j)
{
    if (j != NULL) {
        free(j->values);
        free(j->status);
        free(j);
    }
}

/* Every kv value of the block, and every index value where they are stored. */
static void list_values(const kvw_worker *w, job *j, const kvc_digest *digest)
{
    uint32_t bt = w->opts.block_tokens;
    for (uint32_t layer = 0; layer < w->opts.n_layers; layer++) {
        size_t kv_bytes = bt * w->row_bytes, index_bytes = bt * w->index_row_bytes;
        j->values[j->n++] = (kvc_value){.digest = *digest,
                                        .part = w->kv_parts[layer],
                                        .len_bytes = (uint32_t)kv_bytes,
                                        .src_off_bytes = layer * kv_bytes};
        if (index_bytes != 0) {
            j->values[j->n++] =
                (kvc_value){.digest = *digest,
                            .part = w->index_parts[layer],
                            .len_bytes = (uint32_t)index_bytes,
                            .src_off_bytes = w->block_kv_bytes + layer * index_bytes};
        }
    }
}

static job *new_job(kvw_seq *seq, uint32_t block, const kvwi_block *buf)
{
    const kvw_worker *w = seq->worker;
    size_t cap = 2u * w->opts.n_layers;
    job *j = calloc(1, sizeof(*j));
    if (j == NULL) {
        return NULL;
    }
    j->values = calloc(cap, sizeof(*j->values));
    j->status = calloc(cap, sizeof(*j->status));
    if (j->values == NULL || j->status == NULL) {
        free_job(j);
        return NULL;
    }
    j->seq = seq;
    j->block = block;
    j->server = seq->blocks[block].server;
    j->buf = buf;
    j->backoff_ns = BACKOFF_MIN_NS;
    list_values(w, j, &seq->blocks[block].digest);
    return j;
}

/* Under the mutex. */
static void append_job(kvwi_putter *p, job *j)
{
    if (p->tail == NULL) {
        p->head = j;
    } else {
        p->tail->next = j;
    }
    p->tail = j;
    j->seq->put.n_jobs++;
}

/* Under the mutex: takes j out of the queue and frees it. */
static void remove_job(kvwi_putter *p, job *j)
{
    job *before = NULL;
    for (job *i = p->head; i != j; i = i->next) {
        before = i;
    }
    if (before == NULL) {
        p->head = j->next;
    } else {
        before->next = j->next;
    }
    if (p->tail == j) {
        p->tail = before;
    }
    j->seq->put.n_jobs--;
    free_job(j);
    kvc_cond_broadcast(&p->moved);
}

static void wait_again(job *j)
{
    j->state = WAITING;
    j->due_ns = kvc_now_ns() + j->backoff_ns;
    j->backoff_ns = j->backoff_ns * 2u < BACKOFF_MAX_NS ? j->backoff_ns * 2u : BACKOFF_MAX_NS;
}

/* Errors that another attempt cannot mend. */
static bool is_final(kvc_status st)
{
    switch (st) {
    case KVC_INVALID:
    case KVC_UNSUPPORTED:
    case KVC_DENIED:
    case KVC_NO_SPACE:
    case KVC_PROTOCOL:
    case KVC_CORRUPT:
        return true;
    default:
        return false;
    }
}

/* ---- a lane's moves; each is called without the mutex ---- */

static void on_done(kvc_op *op, void *arg)
{
    job *j = arg;
    kvwi_putter *p = j->seq->worker->putter;
    (void)op;
    kvc_mutex_lock(&p->mutex);
    j->state = LANDED;
    kvc_cond_signal(&p->lanes[j->server].wake);
    kvc_mutex_unlock(&p->mutex);
}

/* Every lane drops the sequence's jobs. The mutex is held. */
static void give_up(kvwi_putter *p, kvw_seq *seq)
{
    seq->put.give_up = true;
    for (uint32_t i = 0; i < p->n_started; i++) {
        kvc_cond_signal(&p->lanes[i].wake);
    }
}

/* An attempt failed as a whole; decides whether there will be another. The mutex is held. */
static void judge_failure(kvwi_putter *p, job *j, kvc_status st)
{
    kvw_seq *seq = j->seq;
    if (is_final(st)) {
        char server[KVWI_SERVER_TEXT];
        KVC_LOG_WARN(WORKER, "block %u cannot be put: %s%s", j->block, kvc_status_name(st),
                     kvwi_server_text(p->worker, j->server, server));
        if (seq->put.error == KVC_OK) {
            seq->put.error = st;
            seq->put.error_server = j->server;
        }
        give_up(p, seq);
        kvc_cond_broadcast(&p->moved);
    } else if (seq->put.closing && st != KVC_AGAIN) {
        give_up(p, seq);
    }
    seq->put.retries++;
    wait_again(j); /* or sweep takes it */
}

static void send(kvwi_putter *p, job *j)
{
    kvw_worker *w = p->worker;
    kvc_op_init(&j->op, on_done, j);
    memset(j->status, KVC_AGAIN, j->n);
    kvc_status st = kvc_put(w->servers.all[j->server].client, &w->schema, w->opts.promise,
                            j->values, j->n, j->buf->regions.of[j->server], j->status, 0, &j->op);
    if (st == KVC_OK) {
        return;
    }
    kvc_mutex_lock(&p->mutex);
    judge_failure(p, j, st);
    kvc_mutex_unlock(&p->mutex);
}

/* Keeps the values that still have to be sent; the mutex is held. */
static kvc_status sift(job *j)
{
    kvwi_put_state *put = &j->seq->put;
    kvc_status worst = KVC_OK;
    uint32_t left = 0;
    for (uint32_t i = 0; i < j->n; i++) {
        kvc_status st = (kvc_status)j->status[i];
        if (st == KVC_OK || st == KVC_EXISTS) {
            put->bytes_put += st == KVC_OK ? j->values[i].len_bytes : 0;
            continue;
        }
        worst = worst == KVC_OK || is_final(st) ? st : worst;
        j->values[left++] = j->values[i];
    }
    j->n = left;
    return worst;
}

/* Judges an answered put. */
static void land(kvwi_putter *p, job *j)
{
    kvc_mutex_lock(&p->mutex);
    kvwi_put_state *put = &j->seq->put;
    bool all_exist = true;
    for (uint32_t i = 0; i < j->n; i++) {
        all_exist = all_exist && j->status[i] == KVC_EXISTS;
    }
    put->requests++;
    kvc_status st = j->op.status == KVC_OK ? sift(j) : j->op.status;
    if (st != KVC_OK) {
        judge_failure(p, j, st);
    } else {
        put->blocks_existed += all_exist ? 1u : 0u;
        put->blocks_put++;
        j->state = PLACED;
        j->due_ns = 0;
        j->backoff_ns = BACKOFF_MIN_NS;
    }
    kvc_mutex_unlock(&p->mutex);
}

/* Digests of a lane's placed blocks of a sequence that its context covers next. The mutex is held.
 */
static uint32_t placed_run(const lane *l, const kvw_seq *seq, kvc_digest *run)
{
    uint32_t n = 0;
    for (const job *j = l->putter->head; j != NULL && n < RUN_CAP; j = j->next) {
        if (j->seq != seq || j->server != l->server || j->state == COVERED) {
            continue;
        }
        if (j->state != PLACED) {
            break;
        }
        run[n++] = j->values[0].digest;
    }
    return n;
}

/* Those n are covered now. The mutex is held. */
static void cover(lane *l, const kvw_seq *seq, uint32_t n)
{
    for (job *j = l->putter->head; j != NULL && n > 0; j = j->next) {
        if (j->seq == seq && j->server == l->server && j->state == PLACED) {
            j->state = COVERED;
            n--;
        }
    }
}

/* The sequence's leading covered blocks are acknowledged, whosever they are, and leave. The mutex
 * is held. */
static void acknowledge(kvwi_putter *p, kvw_seq *seq)
{
    job *next = NULL;
    for (job *j = p->head; j != NULL; j = next) {
        next = j->next;
        if (j->seq != seq) {
            continue;
        }
        if (j->state != COVERED || j->block != seq->put.n_acked) {
            break;
        }
        seq->put.n_acked++;
        remove_job(p, j);
    }
}

/* Extends the lane's context over the placed run that begins with j. */
static void extend(lane *l, job *j)
{
    kvc_digest run[RUN_CAP];
    kvwi_putter *p = l->putter;
    kvw_seq *seq = j->seq;
    kvc_mutex_lock(&p->mutex);
    uint32_t n = placed_run(l, seq, run);
    kvc_mutex_unlock(&p->mutex);
    uint64_t deadline_ns = p->worker->servers.n == 1 ? 0 : kvc_deadline_ns(kvwi_put_extend_ns);
    kvc_status st = kvc_context_extend(seq->servers[l->server].context, run, n, deadline_ns);
    kvc_mutex_lock(&p->mutex);
    if (st != KVC_OK) {
        judge_failure(p, j, st);
    } else {
        cover(l, seq, n);
        acknowledge(p, seq);
    }
    kvc_mutex_unlock(&p->mutex);
}

/* A flying job of the lane whose sequence has lost patience; what does not fly leaves at once. */
static job *sweep(lane *l)
{
    job *next = NULL;
    for (job *j = l->putter->head; j != NULL; j = next) {
        next = j->next;
        if (j->server != l->server || !j->seq->put.give_up) {
            continue;
        }
        if (j->state != FLYING) {
            remove_job(l->putter, j);
        } else if (!j->cancelled) {
            return j;
        }
    }
    return NULL;
}

/* Whether j, which is placed, is what the lane's context of its sequence covers next. */
static bool is_next(const lane *l, const job *j)
{
    const job *i = l->putter->head;
    while (i->seq != j->seq || i->server != l->server || i->state == COVERED) {
        i = i->next;
    }
    return i == j;
}

/* Something that the lane can do now; else NULL and the time of the next thing. */
static job *next_job(lane *l, uint64_t *due_p)
{
    uint64_t now = kvc_now_ns();
    job *leaving = sweep(l);
    *due_p = 0;
    if (leaving != NULL) {
        return leaving;
    }
    for (job *j = l->putter->head; j != NULL; j = j->next) {
        if (j->server != l->server) {
            continue;
        }
        if (j->state == QUEUED || j->state == LANDED || (j->state == PLACED && is_next(l, j))) {
            return j;
        }
        if (j->state == WAITING) {
            if (j->due_ns <= now) {
                return j;
            }
            *due_p = *due_p == 0 || j->due_ns < *due_p ? j->due_ns : *due_p;
        }
    }
    return NULL;
}

/* One move of a job; called with the mutex, returns with it. */
static void move(lane *l, job *j)
{
    kvwi_putter *p = l->putter;
    job_state state = j->state;
    if (state == WAITING && j->n == 0) {
        state = j->state = PLACED; /* it was the context that would not grow */
        if (!is_next(l, j)) {
            return;
        }
    }
    if (state == QUEUED || state == WAITING) {
        j->state = FLYING; /* before the submit: its callback may come at once */
    }
    j->cancelled = state == FLYING;
    kvc_mutex_unlock(&p->mutex);
    if (state == FLYING) {
        kvc_op_cancel(&j->op);
    } else if (state == LANDED) {
        land(p, j);
    } else if (state == PLACED) {
        extend(l, j);
    } else {
        send(p, j);
    }
    kvc_mutex_lock(&p->mutex);
}

static void run(void *arg)
{
    lane *l = arg;
    kvwi_putter *p = l->putter;
    uint64_t due = 0;
    kvc_mutex_lock(&p->mutex);
    for (;;) {
        job *j = next_job(l, &due);
        if (j != NULL) {
            move(l, j);
        } else if (p->closing) {
            break;
        } else {
            (void)kvc_cond_wait_until(&l->wake, &p->mutex, due);
        }
    }
    kvc_mutex_unlock(&p->mutex);
}

/* ---- the engine's side ---- */

static kvc_status start_lane(kvwi_putter *p, uint32_t server)
{
    char name[24]; /* of which 15 bytes count, and KVW_MAX_SERVERS takes fewer */
    lane *l = &p->lanes[server];
    (void)snprintf(name, sizeof(name), "kvw-put-%u", server);
    l->putter = p;
    l->server = server;
    kvc_cond_init(&l->wake);
    kvc_status st = kvc_thread_start(&l->thread, name, run, l);
    if (st != KVC_OK) {
        kvc_cond_fini(&l->wake);
        return kvwi_fail(st, "a put thread does not start");
    }
    p->n_started++;
    return KVC_OK;
}

kvc_status kvwi_putter_open(kvw_worker *worker, kvwi_putter **putter_p)
{
    uint32_t n = worker->servers.n;
    kvc_status st = KVC_OK;
    kvwi_putter *p = calloc(1, sizeof(*p) + n * sizeof(p->lanes[0]));
    *putter_p = NULL;
    if (p == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    p->worker = worker;
    kvc_mutex_init(&p->mutex, KVC_RANK_WORKER);
    kvc_cond_init(&p->moved);
    for (uint32_t i = 0; st == KVC_OK && i < n; i++) {
        st = start_lane(p, i);
    }
    if (st != KVC_OK) {
        kvwi_putter_close(p);
        return st;
    }
    *putter_p = p;
    return KVC_OK;
}

void kvwi_putter_close(kvwi_putter *putter)
{
    if (putter == NULL) {
        return;
    }
    kvc_mutex_lock(&putter->mutex);
    putter->closing = true;
    for (uint32_t i = 0; i < putter->n_started; i++) {
        kvc_cond_signal(&putter->lanes[i].wake);
    }
    kvc_mutex_unlock(&putter->mutex);
    for (uint32_t i = 0; i < putter->n_started; i++) {
        kvc_thread_join(&putter->lanes[i].thread);
        kvc_cond_fini(&putter->lanes[i].wake);
    }
    kvc_cond_fini(&putter->moved);
    kvc_mutex_fini(&putter->mutex);
    free(putter);
}

/* Whose error it was, or who has the sequence's oldest block. The mutex is held. */
static uint32_t server_to_blame(const kvwi_putter *p, const kvw_seq *seq)
{
    const job *j = p->head;
    while (j != NULL && (j->seq != seq || j->block != seq->put.n_acked)) {
        j = j->next;
    }
    return seq->put.error != KVC_OK || j == NULL ? seq->put.error_server : j->server;
}

kvc_status kvwi_put_submit(kvw_seq *seq, uint32_t block, const kvwi_block *buf,
                           uint64_t deadline_ns)
{
    kvw_worker *w = seq->worker;
    kvwi_putter *p = w->putter;
    kvc_status st = KVC_OK;
    job *j = new_job(seq, block, buf);
    if (j == NULL) {
        return kvwi_fail(KVC_NO_MEMORY, "out of memory");
    }
    kvc_mutex_lock(&p->mutex);
    while (seq->put.error == KVC_OK && seq->put.n_jobs >= w->opts.put_window && st == KVC_OK) {
        st = kvc_cond_wait_until(&p->moved, &p->mutex, deadline_ns);
    }
    st = seq->put.error != KVC_OK ? seq->put.error : st;
    if (st == KVC_OK) {
        append_job(p, j);
        kvc_cond_signal(&p->lanes[j->server].wake);
    }
    uint32_t slow = server_to_blame(p, seq);
    kvc_mutex_unlock(&p->mutex);
    if (st != KVC_OK) {
        char server[KVWI_SERVER_TEXT];
        free_job(j);
        return kvwi_fail(st, "block %u was not put: %s%s", block, kvc_status_name(st),
                         kvwi_server_text(w, slow, server));
    }
    return KVC_OK;
}

kvc_status kvwi_put_flush(kvw_seq *seq, uint64_t deadline_ns)
{
    kvwi_putter *p = seq->worker->putter;
    kvc_status st = KVC_OK;
    kvc_mutex_lock(&p->mutex);
    while (seq->put.error == KVC_OK && seq->put.n_jobs != 0 && st == KVC_OK) {
        st = kvc_cond_wait_until(&p->moved, &p->mutex, deadline_ns);
    }
    st = seq->put.error != KVC_OK ? seq->put.error : st;
    uint32_t slow = server_to_blame(p, seq);
    kvc_mutex_unlock(&p->mutex);
    char server[KVWI_SERVER_TEXT];
    return st == KVC_OK ? st
                        : kvwi_fail(st, "flush: %s%s", kvc_status_name(st),
                                    kvwi_server_text(seq->worker, slow, server));
}

void kvwi_put_close(kvw_seq *seq)
{
    kvwi_putter *p = seq->worker->putter;
    kvc_mutex_lock(&p->mutex);
    seq->put.closing = true;
    kvc_mutex_unlock(&p->mutex);
}

void kvwi_put_abandon(kvw_seq *seq, uint64_t deadline_ns)
{
    kvwi_putter *p = seq->worker->putter;
    kvc_mutex_lock(&p->mutex);
    while (seq->put.n_jobs != 0) {
        uint64_t wait_ns = deadline_ns;
        if (kvc_expired(deadline_ns)) {
            give_up(p, seq);
            wait_ns = 0;
        }
        (void)kvc_cond_wait_until(&p->moved, &p->mutex, wait_ns);
    }
    kvc_mutex_unlock(&p->mutex);
}

kvwi_put_state kvwi_put_look(const kvw_seq *seq)
{
    kvwi_putter *p = seq->worker->putter;
    kvc_mutex_lock(&p->mutex);
    kvwi_put_state state = seq->put;
    kvc_mutex_unlock(&p->mutex);
    return state;
}
