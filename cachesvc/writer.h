/*
 * writer.h: the one thread that hands values to the lmdb tier.
 *
 * It takes DURABLE and write-through values first, then the index's dirty ones (write-behind),
 * computes those row sums that it was not given, and makes room when the tier is full. The tier
 * groups and commits.
 */
#ifndef KVS_WRITER_H
#define KVS_WRITER_H

#include "server.h"

typedef struct kvs_write_job {
    kvs_tier_write
        write;      /* submitter: key, row_bytes, n_rows, rows, durable. Result: status, slot */
    uint32_t *sums; /* of the rows, taken; NULL: the writer computes them */
    uint32_t cls;   /* eviction class of the value */
    uint64_t deadline_ns; /* TIMED_OUT if it was not handed to the tier by then; 0: none */
    void (*done)(
        struct kvs_write_job *job); /* the writer's or a tier's thread, once, no lock held */
    void *arg;
    kvs_writer *writer; /* the writer's, as the two below */
    uint32_t tries;
    struct kvs_write_job *next;
} kvs_write_job;

kvc_status kvs_writer_create(kvs_server *server, kvs_writer **writer_p) KVC_MUST_CHECK;
/* flush: the dirty values are written first. Every job's done has run on return. NULL is fine. */
void kvs_writer_destroy(kvs_writer *writer, bool flush);
/* Any thread, does not block. job and its rows are kept until done. Not after destroy began. */
void kvs_writer_submit(kvs_writer *writer, kvs_write_job *job);
/* There is a new dirty value. Any thread. */
void kvs_writer_kick(kvs_writer *writer);

#endif
