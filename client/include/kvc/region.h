/*
 * region.h: memory of the caller's that rows land in and values leave from, of the host or of a
 * GPU. A part of client.h, which includes it.
 */
#ifndef KVC_REGION_H
#define KVC_REGION_H

#include <stddef.h>
#include <stdint.h>

#include "kvc/types.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct kvc_client kvc_client;
typedef struct kvc_region kvc_region;

typedef enum kvc_memory_kind { KVC_MEMORY_HOST = 1, KVC_MEMORY_CUDA = 2 } kvc_memory_kind;

/*
 * What the library cannot do itself with memory of a GPU, since it links nothing of CUDA. Both
 * functions run on threads of the library with no lock held, must not call back, and have done
 * their work when they return; anything but OK ends the fetch, once, with DEVICE.
 */
typedef struct kvc_region_gpu {
    size_t size_bytes; /* sizeof(kvc_region_gpu) */
    /* That the GPU's driver exports for the pages around the region, and where the region begins in
     * it; borrowed until kvc_region_register returns. -1: there is none. */
    int64_t dmabuf_fd;
    uint64_t dmabuf_off_bytes;
    /* Copies from memory of the host to the region. */
    kvc_status (*copy_in)(void *arg, void *to, const void *from, size_t len_bytes);
    /* A device has written to the region: what the GPU reads from now on shall see it. NULL: it
     * does by itself. */
    kvc_status (*flush)(void *arg);
    void *arg;
} kvc_region_gpu;

typedef struct kvc_region_desc {
    size_t size_bytes;
    void *base;
    size_t len_bytes;
    kvc_memory_kind kind;
    int device;                /* CUDA ordinal; 0 for host */
    const kvc_region_gpu *gpu; /* of CUDA, not NULL; copied */
} kvc_region_desc;

/*
 * Declares memory that rows may land in or values leave from. It stays the caller's and outlives
 * the region. UNSUPPORTED: this client cannot move bytes there directly; stage it yourself. Over
 * rdma:// it is registered with the device, and so locked, after the first fetch into it, as
 * far as opts.region_bytes and 64 regions go (then those used least recently make room, but none
 * that was used in the last 5 s), and the server of this client, nobody else, may write there; its
 * rows come without a copy then. A region that is larger than region_bytes is registered in pieces,
 * as far as there is room. What cannot be registered, or overlaps another region that is not the
 * same, is copied to.
 *
 * Memory of a GPU (cudaMalloc's, not managed) takes rows and whole values alone: nothing is put
 * from it, and no opaque value got to it (UNSUPPORTED), and rows that are mapped come by request.
 * Over rdma:// it is registered by its dma-buf, or where the driver has peer memory by its address;
 * then the server's rows go there past the host. Over other transports, where neither is to be had,
 * and where sums are asked for, rows come to the host and copy_in moves them.
 */
kvc_status kvc_region_register(kvc_client *client, const kvc_region_desc *desc,
                               kvc_region **region_p) KVC_MUST_CHECK;
typedef enum kvc_region_way {
    KVC_REGION_NOT_YET = 0, /* nobody has tried: no kvc_fetch over rdma:// yet */
    KVC_REGION_DMABUF,
    KVC_REGION_PEER,
    KVC_REGION_COPIED,
} kvc_region_way;

/* How rows reach a region of a GPU, by what the last connection found; NOT_YET of one of the host.
 * *why_p (may be NULL): of COPIED the reason, for people, static; else "". Any thread. */
kvc_region_way kvc_region_gpu_way(const kvc_region *region, const char **why_p);

/* AGAIN while an op still uses it. NULL is fine. */
kvc_status kvc_region_deregister(kvc_client *client, kvc_region *region);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
