/*
 * put_take.h: what the two halves of PutBlocks share: put_take.c brings the values in, put.c takes
 * them through lmdb where they must and answers.
 *
 * One thread at a time has a put: the transport's while it takes, the room thread if a segment is
 * to be emptied for it, then the writer's jobs, each of
 * which touches its own item, then whoever ends the last of them.
 */
#ifndef KVS_PUT_TAKE_H
#define KVS_PUT_TAKE_H

#include "cascade.h"
#include "request.h"
#include "writer.h"

typedef enum kvs_put_state {
    KVS_PUT_CHECK,
    KVS_PUT_TAKE,
    KVS_PUT_ROOM,  /* the room thread empties a segment, and takes the rest */
    KVS_PUT_WRITE, /* jobs are with the writer; the last one goes on */
    KVS_PUT_SYNC,  /* a disk thread syncs lmdb for values that were there already */
    KVS_PUT_REPLY,
    KVS_PUT_DONE,
} kvs_put_state;

typedef enum kvs_item_kind {
    KVS_ITEM_NEW = 0, /* not taken */
    KVS_ITEM_SETTLED, /* status is final */
    KVS_ITEM_BOTH,    /* in dram, not visible: visible once lmdb has it */
    KVS_ITEM_THROUGH, /* no room in dram: from the request's bytes to lmdb */
    KVS_ITEM_OLD,     /* somebody's value, in dram only: EXISTS once it is durable */
    KVS_ITEM_SYNC,    /* somebody's value, in lmdb, perhaps not synced */
} kvs_item_kind;

typedef struct kvs_put_item {
    uint32_t value, part; /* part: place */
    kvs_item_kind kind;
    kvs_slot slot;      /* in dram; of KVS_ITEM_SYNC: in lmdb */
    const void *rows;   /* dense: dram, the request's bytes, or copy */
    void *copy;         /* of bytes that came in pieces; NULL otherwise */
    uint32_t *sums;     /* of the rows in dram as they came; NULL: none, or with the job */
    kvs_write_job *job; /* NULL: nothing to write */
    kvs_opaque_id id;   /* of the opaque value that this is a piece of */
    struct kvs_put *put;
} kvs_put_item;

typedef struct kvs_put {
    kvs_job job; /* first: a disk job is a put */
    kvs_server *server;
    kvt_call *call;
    kvs_put_state state;
    const kvs_schema *schema;
    uint32_t n;
    bool durable, wants_sync;
    kvs_room room;         /* WANTED: what is NEW waits for the room thread */
    int8_t *status;        /* [n] */
    atomic_uint n_pending; /* jobs out, and one for the thread that submits them */
    uint32_t n_jobs;
    kvs_put_item items[];
} kvs_put;

/* Claims every NEW value and brings those that are not there to dram, or to where the writer takes
   them from. Afterwards an item is settled or has a kind that says what it waits for, or it is NEW,
   claimed by nobody, and room is WANTED: to be called again with another. */
void kvs_put_take(kvs_put *put);
/* Item i has its final status. */
void kvs_put_settle(kvs_put *put, uint32_t i, kvc_status status);

#endif
