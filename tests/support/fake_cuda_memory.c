/*
 * fake_cuda_memory.c: device and pinned memory of the fake device, as host memory; see fake_cuda.h.
 *
 * Any thread; memory_lock guards the list of what was given out. Device memory of whole units lies
 * in memfds, so that other processes, and this one, can open it by where its owner has the file.
 */
#include "fake_cuda_internal.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvk/cuda.h"

/* Of an allocation, so that large ones that are hardly used cost no memory. */
enum { MAX_DIRT = 16 << 20 };

typedef struct given {
    struct given *next;
    void *base;
    size_t len_bytes;
    int fd; /* -1: malloc'd, or opened here and another's */
    bool opened, device;
} given;

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static given *memories; /* guarded by memory_lock */
static atomic_bool no_sharing, no_export;
static atomic_uint flushes, n_registers, registers_at;
static atomic_int registers = KVC_OK;
static void (*before_unregister)(void *arg);
static void *before_unregister_arg;
static atomic_ullong device_bytes;
static atomic_uint held, left = UINT32_MAX;

void fake_cuda_allocations(uint32_t n)
{
    atomic_store(&left, n);
}

uint32_t fake_cuda_held(void)
{
    return atomic_load(&held);
}

/* Remembers memory; false: it cannot. */
static bool remember(void *base, size_t len_bytes, int fd, bool opened, bool device)
{
    given *m = calloc(1, sizeof(*m));
    if (m == NULL)
        return false;
    *m = (given){.base = base, .len_bytes = len_bytes, .fd = fd, .opened = opened};
    m->device = device;
    pthread_mutex_lock(&memory_lock);
    m->next = memories;
    memories = m;
    pthread_mutex_unlock(&memory_lock);
    return true;
}

/* Takes what begins there out of the list; NULL: nothing does. */
static given *forget_memory(const void *base)
{
    pthread_mutex_lock(&memory_lock);
    given **link = &memories;
    while (*link != NULL && (*link)->base != base)
        link = &(*link)->next;
    given *m = *link;
    if (m != NULL)
        *link = m->next;
    pthread_mutex_unlock(&memory_lock);
    return m;
}

/* Memory that other processes can open; NULL: none. */
static void *alloc_units(size_t len_bytes)
{
    void *base = MAP_FAILED;
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)len_bytes) == 0)
        base = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base != MAP_FAILED && remember(base, len_bytes, fd, false, true))
        return base;
    if (base != MAP_FAILED)
        (void)munmap(base, len_bytes);
    if (fd >= 0)
        (void)close(fd);
    return NULL;
}

static void *alloc_some(size_t len_bytes, bool device)
{
    void *p = NULL;
    if (posix_memalign(&p, 256, len_bytes) != 0)
        return NULL;
    if (remember(p, len_bytes, -1, false, device))
        return p;
    free(p);
    return NULL;
}

kvc_status kvk_cuda_alloc(kvk_cuda *cuda, kvk_cuda_memory kind, size_t len_bytes, void **memory_p)
{
    (void)cuda;
    *memory_p = NULL;
    if (!fake_cuda_take(&left))
        return KVC_NO_MEMORY;
    bool units = kind == KVK_CUDA_DEVICE && len_bytes > 0 && len_bytes % KVK_CUDA_SHARE_UNIT == 0;
    void *p = units ? alloc_units(len_bytes) : alloc_some(len_bytes, kind == KVK_CUDA_DEVICE);
    if (p == NULL)
        return KVC_NO_MEMORY;
    memset(p, 0xee, len_bytes < MAX_DIRT ? len_bytes : MAX_DIRT);
    atomic_fetch_add(&held, 1);
    atomic_fetch_add(&device_bytes, kind == KVK_CUDA_DEVICE ? len_bytes : 0);
    *memory_p = p;
    return KVC_OK;
}

void kvk_cuda_free(kvk_cuda *cuda, kvk_cuda_memory kind, void *memory)
{
    given *m = memory == NULL ? NULL : forget_memory(memory);
    (void)cuda;
    if (m == NULL)
        return;
    atomic_fetch_sub(&held, 1);
    atomic_fetch_sub(&device_bytes, kind == KVK_CUDA_DEVICE ? m->len_bytes : 0);
    if (m->fd >= 0) {
        (void)munmap(m->base, m->len_bytes);
        (void)close(m->fd);
    } else {
        free(m->base);
    }
    free(m);
}

uint64_t fake_cuda_device_bytes(void)
{
    return atomic_load(&device_bytes);
}

void fake_cuda_damage(void)
{
    pthread_mutex_lock(&memory_lock);
    for (const given *m = memories; m != NULL; m = m->next)
        for (size_t i = 0; m->device && i < m->len_bytes; i += 64)
            ((uint8_t *)m->base)[i] ^= 1;
    pthread_mutex_unlock(&memory_lock);
}

void fake_cuda_no_sharing(bool none)
{
    atomic_store(&no_sharing, none);
}

kvc_status kvk_cuda_memory_info(kvk_cuda *cuda, size_t *free_bytes_p, size_t *total_bytes_p)
{
    (void)cuda;
    *total_bytes_p = (size_t)1 << 34;
    *free_bytes_p = *total_bytes_p - atomic_load(&device_bytes);
    return KVC_OK;
}

/* What stands in a handle: where the owner has the memory's file. */
typedef struct fake_share {
    int64_t pid;
    int32_t fd;
    uint64_t len_bytes;
} fake_share;

kvc_status kvk_cuda_share(kvk_cuda *cuda, void *memory, kvk_cuda_shared *shared_p)
{
    fake_share share = {.pid = getpid(), .fd = -1};
    (void)cuda;
    pthread_mutex_lock(&memory_lock);
    for (const given *m = memories; m != NULL; m = m->next) {
        if (m->base == memory && m->fd >= 0 && !m->opened) {
            share.fd = m->fd;
            share.len_bytes = m->len_bytes;
        }
    }
    pthread_mutex_unlock(&memory_lock);
    memset(shared_p, 0, sizeof(*shared_p));
    memcpy(shared_p->bytes, &share, sizeof(share));
    return share.fd >= 0 ? KVC_OK : KVC_INVALID;
}

kvc_status kvk_cuda_share_open(kvk_cuda *cuda, const kvk_cuda_shared *shared, void **memory_p)
{
    fake_share share;
    char path[64];
    (void)cuda;
    *memory_p = NULL;
    if (atomic_load(&no_sharing))
        return KVC_UNSUPPORTED;
    memcpy(&share, shared->bytes, sizeof(share));
    (void)snprintf(path, sizeof(path), "/proc/%lld/fd/%d", (long long)share.pid, share.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    void *base = fd < 0 ? MAP_FAILED
                        : mmap(NULL, share.len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0)
        (void)close(fd);
    if (base == MAP_FAILED)
        return KVC_INVALID;
    if (!remember(base, share.len_bytes, -1, true, false)) {
        (void)munmap(base, share.len_bytes);
        return KVC_NO_MEMORY;
    }
    atomic_fetch_add(&held, 1);
    *memory_p = base;
    return KVC_OK;
}

kvc_status kvk_cuda_export(kvk_cuda *cuda, void *memory, size_t len_bytes, int *fd_p,
                           uint64_t *off_bytes_p)
{
    (void)cuda;
    *fd_p = -1;
    *off_bytes_p = 0;
    if (atomic_load(&no_export))
        return KVC_UNSUPPORTED;
    pthread_mutex_lock(&memory_lock);
    for (const given *m = memories; m != NULL; m = m->next) {
        if (m->base == memory && m->fd >= 0 && len_bytes <= m->len_bytes)
            *fd_p = fcntl(m->fd, F_DUPFD_CLOEXEC, 0);
    }
    pthread_mutex_unlock(&memory_lock);
    return *fd_p >= 0 ? KVC_OK : KVC_UNSUPPORTED;
}

void kvk_cuda_export_close(kvk_cuda *cuda, int fd)
{
    (void)cuda;
    if (fd >= 0)
        (void)close(fd);
}

kvc_status kvk_cuda_flush_writes(kvk_cuda *cuda)
{
    (void)cuda;
    atomic_fetch_add(&flushes, 1);
    return KVC_OK;
}

void fake_cuda_no_export(bool none)
{
    atomic_store(&no_export, none);
}

uint32_t fake_cuda_flushes(void)
{
    return atomic_load(&flushes);
}

void kvk_cuda_share_close(kvk_cuda *cuda, void *memory)
{
    given *m = memory == NULL ? NULL : forget_memory(memory);
    (void)cuda;
    if (m == NULL)
        return;
    atomic_fetch_sub(&held, 1);
    (void)munmap(m->base, m->len_bytes);
    free(m);
}

void fake_cuda_registers(kvc_status status)
{
    atomic_store(&registers, (int)status);
}

void fake_cuda_registers_at(uint32_t off_bytes)
{
    atomic_store(&registers_at, off_bytes);
}

uint32_t fake_cuda_asked_to_register(void)
{
    return atomic_load(&n_registers);
}

void fake_cuda_before_unregister(void (*fn)(void *arg), void *arg)
{
    before_unregister = fn;
    before_unregister_arg = arg;
}

kvc_status kvk_cuda_register(kvk_cuda *cuda, void *host, size_t len_bytes, int read_only,
                             void **device_p)
{
    kvc_status status = (kvc_status)atomic_load(&registers);
    (void)cuda;
    (void)len_bytes;
    (void)read_only;
    atomic_fetch_add(&n_registers, 1);
    if (status != KVC_OK)
        return status;
    atomic_fetch_add(&held, 1);
    *device_p = (uint8_t *)host + atomic_load(&registers_at);
    return KVC_OK;
}

void kvk_cuda_unregister(kvk_cuda *cuda, void *host)
{
    (void)cuda;
    (void)host;
    if (before_unregister != NULL)
        before_unregister(before_unregister_arg);
    atomic_fetch_sub(&held, 1);
}
