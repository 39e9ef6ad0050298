/*
 * lmdb_ahead.c: reads many values one after the other, with the next few under way already, so that
 * the disk has work while rows of the one before are copied and summed up.
 *
 * Thread: a disk thread; all here is its own. Invariants: one read transaction serves all that are
 * under way, since a thread that waits for a second one while it has a first could wait for ever;
 * it is given back when it grows old, when the writer waits for it, and before anything else is
 * read. What goes ahead is an attempt only: whatever is not right with it is read again by itself,
 * and that counts.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "lmdb_cold.h"

#define AHEAD 4u /* values under way at once */

typedef struct flight {
    kvs_tier_read read;
    kvsi_reading reading;
} flight;

typedef struct ahead {
    kvs_tier *tier;
    const kvs_tier_reads *reads;
    kvsi_env *env; /* whose transaction txn is */
    MDB_txn *txn;  /* NULL: none is open */
    uint64_t until_ns;
    uint32_t first, n; /* of flights, a ring */
    flight flights[AHEAD];
} ahead;

static void let_go(ahead *a)
{
    if (a->txn != NULL)
        kvsi_env_read_end(a->env, a->txn);
    a->txn = NULL;
}

static bool must_let_go(const ahead *a)
{
    return atomic_load(&a->env->gate) || kvc_now_ns() > a->until_ns;
}

static void while_waiting(void *arg)
{
    ahead *a = arg;

    if (a->txn != NULL && must_let_go(a))
        let_go(a);
}

/* A transaction of env, not yet too old. */
static kvc_status want_txn(ahead *a, kvsi_env *env)
{
    if (a->txn != NULL && (a->env != env || must_let_go(a)))
        let_go(a);
    if (a->txn != NULL)
        return KVC_OK;
    a->env = env;
    a->until_ns = kvc_now_ns() + a->tier->reader_ns;
    return kvsi_env_read_begin(env, &a->txn);
}

/* NOT: nothing of it is held. */
static kvsi_launched launch(ahead *a, flight *f)
{
    kvs_tier_read *read = &f->read;
    kvsi_reading *r = &f->reading;
    kvsi_launched how = KVSI_LAUNCH_NOT;

    if (kvsi_reading_init(r, a->tier, &read->key, read->slot, read->row_bytes, read->n_rows,
                          read->ranges, read->n_ranges) != KVC_OK)
        return KVSI_LAUNCH_NOT;
    if (kvsi_reading_prepare(r) == KVC_OK && want_txn(a, &r->class->env) == KVC_OK) {
        r->txn = a->txn;
        r->until_ns = a->until_ns;
        if (kvsi_reading_look_up(r) == KVC_OK)
            how = kvsi_reading_launch(r);
    }
    /* The transaction is not the reading's, and may go before it lands: so what looks damaged then
     * need not be. */
    r->txn = NULL;
    r->first_page = NULL;
    r->early = true;
    if (how == KVSI_LAUNCH_NOT)
        kvsi_reading_finish(r);
    return how;
}

/* Reads a value by itself. */
static void read_alone(ahead *a, kvs_tier_read *read)
{
    let_go(a);
    read->status = kvsi_read(a->tier, &read->key, read->slot, read->row_bytes, read->n_rows,
                             read->ranges, read->n_ranges);
    a->reads->done(a->reads->arg, read);
}

/* All of it is here, or status says why not. */
static void settle(ahead *a, flight *f, kvc_status status)
{
    kvsi_reading *r = &f->reading;

    if (status == KVC_OK)
        status = kvsi_reading_verify(r);
    if (status == KVC_OK)
        kvsi_reading_count(r);
    kvsi_reading_finish(r);
    if (status != KVC_OK) {
        read_alone(a, &f->read);
        return;
    }
    f->read.status = KVC_OK;
    a->reads->done(a->reads->arg, &f->read);
}

/* Waits for the oldest. */
static void land(ahead *a)
{
    flight *f = &a->flights[a->first];

    a->first = (a->first + 1) % AHEAD;
    a->n--;
    settle(a, f, kvsi_reading_land(&f->reading, while_waiting, a));
}

static void read_plainly(kvs_tier *tier, const kvs_tier_reads *reads)
{
    kvs_tier_read read;

    while (reads->next(reads->arg, &read)) {
        read.status = kvsi_read(tier, &read.key, read.slot, read.row_bytes, read.n_rows,
                                read.ranges, read.n_ranges);
        reads->done(reads->arg, &read);
    }
}

void kvsi_read_each(kvs_tier *tier, const kvs_tier_reads *reads)
{
    ahead *a = malloc(sizeof(*a));

    if (a == NULL) {
        read_plainly(tier, reads);
        return;
    }
    a->tier = tier;
    a->reads = reads;
    a->env = NULL;
    a->txn = NULL;
    a->first = a->n = 0;
    for (;;) {
        while (a->n > 0 && (a->n == AHEAD || kvsi_lanes_busy(tier->lanes)))
            land(a);
        flight *f = &a->flights[(a->first + a->n) % AHEAD];
        if (!reads->next(reads->arg, &f->read))
            break;
        switch (launch(a, f)) {
        case KVSI_LAUNCH_NOT:
            read_alone(a, &f->read);
            break;
        case KVSI_LAUNCH_WARM:
            settle(a, f, KVC_OK);
            break;
        case KVSI_LAUNCH_AWAY:
            a->n++;
            break;
        }
    }
    while (a->n > 0)
        land(a);
    let_go(a);
    free(a);
}
