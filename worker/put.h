/*
 * put.h: putting full blocks behind the engine's back.
 *
 * A thread per server ("kvw-put-N") owns the conversation with it: it sends a block's values, sends
 * again what the server had no room for, and extends the sequence's context there in block order. A
 * server that hangs holds up its own blocks, and those behind them only in being acknowledged. The
 * engine's thread only queues blocks, and waits while the window is full. Lock: one mutex (rank
 * WORKER) guards the queue and the kvwi_put_state of every sequence; nothing is called under it.
 */
#ifndef KVWI_PUT_H
#define KVWI_PUT_H

#include <stdbool.h>
#include <stdint.h>

#include "kvc/client.h"
#include "kvw/worker.h"

typedef struct kvwi_putter kvwi_putter;
struct kvwi_block;

/* Per sequence; all of it guarded by the put mutex. */
typedef struct kvwi_put_state {
    uint32_t n_acked; /* leading blocks that the store has and contexts cover */
    uint32_t n_jobs;  /* blocks on their way */
    bool closing;     /* the sequence is going away: no new attempts after a failure */
    bool give_up;     /* the put threads drop its jobs: a final error, or closing took too long */
    kvc_status error; /* of a put that can never succeed; OK: none */
    uint32_t error_server;
    uint64_t blocks_put, blocks_existed, bytes_put, retries, requests;
} kvwi_put_state;

/* With several servers: what one gets to let a context grow before it is asked again, by which a
 * sequence's end may be late. Tests set it before the first worker. */
extern uint64_t kvwi_put_extend_ns;

kvc_status kvwi_putter_open(kvw_worker *worker, kvwi_putter **putter_p) KVC_MUST_CHECK;
/* No sequence may have jobs. NULL is fine. */
void kvwi_putter_close(kvwi_putter *putter);
/*
 * Queues block number `block` of seq; buf stays the sequence's, untouched until the block is
 * acknowledged. Waits while the window is full, to deadline_ns: TIMED_OUT. The sequence's put
 * error, once it has one.
 */
kvc_status kvwi_put_submit(kvw_seq *seq, uint32_t block, const struct kvwi_block *buf,
                           uint64_t deadline_ns) KVC_MUST_CHECK;
/* Waits until the sequence has no jobs. TIMED_OUT; its put error. */
kvc_status kvwi_put_flush(kvw_seq *seq, uint64_t deadline_ns) KVC_MUST_CHECK;
/* From here on the first attempt that fails with another status than AGAIN is the last one. */
void kvwi_put_close(kvw_seq *seq);
/* After close: waits like flush, gives up at the deadline; on return no job of seq is left. */
void kvwi_put_abandon(kvw_seq *seq, uint64_t deadline_ns);
/* A copy of the sequence's state. */
kvwi_put_state kvwi_put_look(const kvw_seq *seq);

#endif
