/*
 * ring.c: the staging rings, one in each direction, through which payloads travel.
 *
 * One end copies a payload in when its frame begins to leave, the other copies it out when the
 * frame has come, so positions are taken and given back in the same order. The server believes
 * nothing that stands in the memory: positions come in frames and are checked, and it sums and
 * serves only what it has copied; a client that lies about what it has taken spoils its own
 * replies. The length is sealed, so that the other end cannot pull pages away. Who writes a ring
 * gives its pages back when it rests: he alone knows that nothing is being put there meanwhile.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "shm_internal.h"

#define PAGE_BYTES 4096u
#define SEALS      (F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)

uint64_t kvti_shm_rest_ns = (uint64_t)10 * 1000000000;

static kvc_status map_ring(int fd, uint64_t len_bytes, kvti_ring *ring_p)
{
    void *base =
        mmap(NULL, PAGE_BYTES + (size_t)len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return KVC_NO_MEMORY;
    *ring_p = (kvti_ring){
        .fd = -1, .page = base, .data = (uint8_t *)base + PAGE_BYTES, .len_bytes = len_bytes};
    return KVC_OK;
}

kvc_status kvti_ring_create(uint64_t len_bytes, kvti_ring *ring_p)
{
    *ring_p = (kvti_ring){.fd = -1};
    len_bytes = (len_bytes + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    int fd = memfd_create("kvasir-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        KVC_LOG_WARN(SHM, "no staging ring: memfd_create: %s", strerror(errno));
        return KVC_UNSUPPORTED;
    }
    kvc_status status = KVC_UNSUPPORTED;
    if (ftruncate(fd, (off_t)(PAGE_BYTES + len_bytes)) == 0 && fcntl(fd, F_ADD_SEALS, SEALS) == 0)
        status = map_ring(fd, len_bytes, ring_p);
    if (status != KVC_OK) {
        KVC_LOG_WARN(SHM, "no staging ring of %llu bytes: %s", (unsigned long long)len_bytes,
                     strerror(errno));
        (void)close(fd);
        return status;
    }
    ring_p->fd = fd;
    return KVC_OK;
}

kvc_status kvti_ring_map(int fd, uint64_t len_bytes, kvti_ring *ring_p)
{
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    *ring_p = (kvti_ring){.fd = -1};
    if (len_bytes == 0 || len_bytes > KVTI_SHM_RING_MAX || seals < 0 || (seals & SEALS) != SEALS ||
        fstat(fd, &info) != 0 || (uint64_t)info.st_size != PAGE_BYTES + len_bytes)
        return KVC_INVALID;
    return map_ring(fd, len_bytes, ring_p);
}

void kvti_ring_unmap(kvti_ring *ring)
{
    if (ring->len_bytes > 0)
        (void)munmap(ring->page, PAGE_BYTES + (size_t)ring->len_bytes);
    if (ring->len_bytes > 0 && ring->fd >= 0)
        (void)close(ring->fd);
    *ring = (kvti_ring){.fd = -1};
}

bool kvti_ring_put(kvti_ring *ring, const struct iovec *data, uint32_t n_data, uint32_t len_bytes,
                   uint64_t *at_p)
{
    if (ring->len_bytes < len_bytes)
        return false;
    uint64_t at = ring->at, off = at % ring->len_bytes;
    if (off + len_bytes > ring->len_bytes) {
        at += ring->len_bytes - off;
        off = 0;
    }
    uint64_t taken = atomic_load_explicit(&ring->page->taken, memory_order_acquire);
    if (at + len_bytes - taken > ring->len_bytes)
        return false;
    for (uint32_t i = 0; i < n_data; i++) {
        if (data[i].iov_len > 0)
            memcpy(ring->data + off, data[i].iov_base, data[i].iov_len);
        off += data[i].iov_len;
    }
    ring->at = at + len_bytes;
    *at_p = at;
    return true;
}

bool kvti_ring_holds_pages(const kvti_ring *ring)
{
    return ring->at != ring->rested_at;
}

void kvti_ring_rest(kvti_ring *ring)
{
    uint64_t taken =
        ring->len_bytes > 0 ? atomic_load_explicit(&ring->page->taken, memory_order_acquire) : 0;
    bool rests = ring->seen_at == ring->at && taken == ring->at;
    ring->seen_at = ring->at;
    if (!rests || !kvti_ring_holds_pages(ring))
        return;
    (void)madvise(ring->data, (size_t)ring->len_bytes, MADV_REMOVE); /* or it keeps them */
    ring->rested_at = ring->at;
}

bool kvti_ring_holds(const kvti_ring *ring, uint64_t at, uint32_t len_bytes)
{
    return len_bytes > 0 && len_bytes <= ring->len_bytes && at >= ring->at &&
           at - ring->at <= ring->len_bytes - len_bytes &&
           at % ring->len_bytes <= ring->len_bytes - len_bytes;
}

void kvti_ring_take(kvti_ring *ring, uint64_t at, uint32_t len_bytes, uint8_t *dst)
{
    if (dst != NULL)
        memcpy(dst, ring->data + at % ring->len_bytes, len_bytes);
    ring->at = at + len_bytes;
    atomic_store_explicit(&ring->page->taken, ring->at, memory_order_release);
}
