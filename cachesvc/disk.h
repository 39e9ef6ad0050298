/*
 * disk.h: the threads that may wait for a medium, and others that do long work off the transports.
 *
 * A bounded queue of jobs; a full one answers AGAIN. Jobs are embedded in what they work for.
 */
#ifndef KVS_DISK_H
#define KVS_DISK_H

#include "kvc/status.h"

#include <stdint.h>

typedef struct kvs_disk kvs_disk;

typedef struct kvs_job {
    void (*run)(struct kvs_job *job); /* on a disk thread, once; may free the job */
} kvs_job;

#define KVS_DISK_QUEUE 4096u

/* name: at most 7 bytes; the threads are called kvs-<name>-N. */
kvc_status kvs_disk_create(const char *name, uint32_t n_threads, kvs_disk **disk_p) KVC_MUST_CHECK;
/* Runs what is queued, then joins the threads. NULL is fine. */
void kvs_disk_destroy(kvs_disk *disk);
/* Any thread, does not block. AGAIN: the queue is full; CLOSED. */
kvc_status kvs_disk_submit(kvs_disk *disk, kvs_job *job) KVC_MUST_CHECK;
uint32_t kvs_disk_threads(const kvs_disk *disk);

#endif
