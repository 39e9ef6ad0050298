/*
 * rdma_check.h: what on this machine stands in the way of rdma://, in plain words.
 *
 * Facts are gathered from the system and explained apart, so that every obstacle can be had in a
 * test. Needs no header of the RDMA libraries; there only where the RDMA transport is built.
 */
#ifndef KVT_RDMA_CHECK_H
#define KVT_RDMA_CHECK_H

#include <stdbool.h>
#include <stdint.h>

#define KVT_RDMA_MAX_PORTS  16u
#define KVT_RDMA_NAME_BYTES 64u
#define KVT_RDMA_TEXT_BYTES 320u

/* One port of one device. */
typedef struct kvt_rdma_port {
    char device[KVT_RDMA_NAME_BYTES], netdev[KVT_RDMA_NAME_BYTES]; /* netdev "": none known */
    uint32_t number;
    int open_errno;     /* 0: the device opens; what follows is known only then */
    int register_errno; /* of 1 MiB */
    bool active, iwarp, infiniband;
    uint32_t n_gids; /* that an IP address gave */
    uint32_t mtu_bytes, max_mtu_bytes;
    uint32_t netdev_mtu_bytes; /* 0: not known */
    int dmabuf_errno; /* of registering a dma-buf that is none; EBADF: the device takes them */
} kvt_rdma_port;

/* What the driver of this machine's GPU says; filled in by whoever asks it. */
typedef enum kvt_rdma_gpu {
    KVT_RDMA_GPU_NONE = 0,
    KVT_RDMA_GPU_PLAIN, /* it exports no dma-buf */
    KVT_RDMA_GPU_DMABUF,
} kvt_rdma_gpu;

typedef struct kvt_rdma_facts {
    uint32_t n_kernel; /* devices that the kernel has */
    uint32_t n_verbs;  /* of those, which the library finds */
    bool has_uverbs;   /* /dev/infiniband/uverbs* */
    bool has_cm;       /* /dev/infiniband/rdma_cm */
    uint64_t memlock_bytes;
    bool has_peer_memory; /* nvidia_peermem, or the older nv_peer_mem */
    kvt_rdma_gpu gpu;     /* not kvt_rdma_gather's */
    uint32_t n_ports;
    kvt_rdma_port ports[KVT_RDMA_MAX_PORTS];
} kvt_rdma_facts;

typedef enum kvt_rdma_level { KVT_RDMA_OK, KVT_RDMA_INFO, KVT_RDMA_WARN } kvt_rdma_level;

/* fix "": nothing to do. Both are valid until report returns. */
typedef void kvt_rdma_report(void *arg, kvt_rdma_level level, const char *text, const char *fix);

/* Asks kernel and libraries; opens each device and closes it again. Blocks for milliseconds. */
void kvt_rdma_gather(kvt_rdma_facts *facts_p);
/* Pure: calls report once or more. */
void kvt_rdma_explain(const kvt_rdma_facts *facts, kvt_rdma_report *report, void *arg);

#endif
