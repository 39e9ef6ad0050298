/*
 * lent.h: the process's table of memory that payloads come from or go to for long.
 *
 * Who maps a lot of memory and keeps it (the dram tier's segments, a client's regions) says so here
 * before its first byte is used and takes it back before it is unmapped. A transport that has to
 * prepare memory (register it with a device) watches the table. Ranges never overlap; the same one
 * may be added more than once, and goes with its last remove. Memory of a GPU, which no CPU can
 * touch, is lent with the dma-buf that its driver exports, if it does. Any thread.
 */
#ifndef KVC_BASE_LENT_H
#define KVC_BASE_LENT_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

typedef struct kvc_lent_watch kvc_lent_watch;

/* How a transport came to write to memory of a GPU. */
typedef enum kvc_lent_way {
    KVC_LENT_NOT_YET = 0, /* nobody tried */
    KVC_LENT_DMABUF,
    KVC_LENT_PEER,   /* by its address: the driver has peer memory */
    KVC_LENT_COPIED, /* not at all */
} kvc_lent_way;

/* Of a range of a GPU's memory; the table's, for as long as it is lent. */
typedef struct kvc_lent_gpu {
    int dmabuf_fd;             /* -1: there is none */
    uint64_t dmabuf_off_bytes; /* of the range's first byte in it */
    /* What the transport that tried last says, and why it is COPIED: a static text. */
    _Atomic(kvc_lent_way) way;
    _Atomic(const char *) why;
} kvc_lent_gpu;

/* The caller allocates it and keeps it until kvc_lent_unwatch. Both functions run with the table's
 * lock held (rank LENT): they may take locks of the transports and must not call back. */
struct kvc_lent_watch {
    /* gpu: NULL for memory of the host. */
    void (*added)(kvc_lent_watch *watch, void *base, size_t len_bytes, kvc_lent_gpu *gpu);
    void (*removed)(kvc_lent_watch *watch, void *base, size_t len_bytes);
    kvc_lent_watch *next; /* the table's */
};

/* Adds [base, base + len_bytes). NO_MEMORY; INVALID: it overlaps another. It stays unknown then,
 * which costs a copy and nothing else. */
kvc_status kvc_lent_add(void *base, size_t len_bytes);
/* The same for memory of a GPU. dmabuf_fd (-1: none) is borrowed; *gpu_p is good until the remove.
 * INVALID, too: it is lent already as memory of the host. */
kvc_status kvc_lent_add_gpu(void *base, size_t len_bytes, int dmabuf_fd, uint64_t dmabuf_off_bytes,
                            const kvc_lent_gpu **gpu_p);
/* Takes it back, before it is unmapped: when this returns no watcher uses it any more, unless it
 * was added once more. Nothing where base was never added. */
void kvc_lent_remove(void *base);

/* Tells watch of all there is and of what comes and goes. */
void kvc_lent_watch_begin(kvc_lent_watch *watch);
/* When this returns, no function of watch runs or will. */
void kvc_lent_watch_end(kvc_lent_watch *watch);

#endif
