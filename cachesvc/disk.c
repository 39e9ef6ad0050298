/*
 * disk.c: a pool of threads over one queue; see disk.h.
 *
 * The threads own nothing between jobs. Invariant: a job that was submitted runs, also
 * during destroy.
 */
#include "disk.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/queue.h"
#include "base/thread.h"

struct kvs_disk {
    kvc_queue *queue;
    uint32_t n_threads;
    kvc_thread threads[];
};

static void disk_main(void *arg)
{
    kvs_disk *disk = arg;
    void *item = NULL;
    while (kvc_queue_pop(disk->queue, 0, &item) == KVC_OK) {
        kvs_job *job = item;
        job->run(job);
    }
}

kvc_status kvs_disk_create(const char *name, uint32_t n_threads, kvs_disk **disk_p)
{
    *disk_p = NULL;
    kvs_disk *disk = calloc(1, sizeof(*disk) + n_threads * sizeof(kvc_thread));
    if (!disk)
        return KVC_NO_MEMORY;
    kvc_status status = kvc_queue_create(KVS_DISK_QUEUE, &disk->queue);
    if (status != KVC_OK) {
        free(disk);
        return status;
    }
    for (uint32_t i = 0; i < n_threads; i++) {
        char full[24];
        snprintf(full, sizeof(full), "kvs-%.7s-%u", name, i % 1000);
        status = kvc_thread_start(&disk->threads[i], full, disk_main, disk);
        if (status != KVC_OK) {
            kvs_disk_destroy(disk);
            return status;
        }
        disk->n_threads++;
    }
    *disk_p = disk;
    return KVC_OK;
}

void kvs_disk_destroy(kvs_disk *disk)
{
    if (!disk)
        return;
    kvc_queue_close(disk->queue);
    for (uint32_t i = 0; i < disk->n_threads; i++)
        kvc_thread_join(&disk->threads[i]);
    kvc_queue_destroy(disk->queue);
    free(disk);
}

kvc_status kvs_disk_submit(kvs_disk *disk, kvs_job *job)
{
    return kvc_queue_push(disk->queue, job);
}

uint32_t kvs_disk_threads(const kvs_disk *disk)
{
    return disk->n_threads;
}
