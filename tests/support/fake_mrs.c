/*
 * fake_mrs.c: see fake_verbs.h; what is registered, and memory of a GPU that no CPU can touch.
 *
 * The mutex of fake_verbs.c guards everything.
 */
#include "fake_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/assert.h"

#define MAX_MRS 4096u

static struct {
    struct ibv_mr mr;
    int access;
    bool used;
    uint8_t *bytes; /* where its first byte is */
    void *mapped;   /* the dma-buf, unmapped with it; NULL: none */
    size_t map_bytes;
} mrs[MAX_MRS];
static uint32_t stalled;
static fake_gpu gpu; /* len_bytes 0: none */

static bool reg_stalls(const void *addr, size_t len_bytes, int access)
{
    bool open = (access & IBV_ACCESS_REMOTE_WRITE) != 0;
    return (addr != NULL && fake_fault.reg_stalls == addr) ||
           (len_bytes == fake_fault.reg_stalls_bytes && open == fake_fault.reg_stalls_open);
}

/* With the mutex held, which is free while a fault holds it up. False: a fault refuses it. */
static bool may_register(const void *addr, size_t len_bytes, int access)
{
    stalled++;
    while (reg_stalls(addr, len_bytes, access)) {
        pthread_mutex_unlock(&fake_mutex);
        (void)usleep(1000);
        pthread_mutex_lock(&fake_mutex);
    }
    stalled--;
    bool refused = fake_fault.reg_fails_after == 0;
    if (fake_fault.reg_fails_after != UINT32_MAX && !refused)
        fake_fault.reg_fails_after--;
    return !refused;
}

/* With the mutex held: bytes are where the first one really is. NULL: there is no room. */
static struct ibv_mr *add(struct ibv_pd *pd, void *addr, size_t len_bytes, int access,
                          uint8_t *bytes, void *mapped, size_t map_bytes)
{
    uint32_t i = 1;
    while (i < MAX_MRS && mrs[i].used)
        i++;
    if (i == MAX_MRS)
        return NULL;
    mrs[i].used = true;
    mrs[i].access = access;
    mrs[i].bytes = bytes;
    mrs[i].mapped = mapped;
    mrs[i].map_bytes = map_bytes;
    mrs[i].mr = (struct ibv_mr){.context = &fake_context,
                                .pd = pd,
                                .addr = addr,
                                .length = len_bytes,
                                .lkey = i << 8,
                                .rkey = i << 8 | 1};
    fake_now.mrs++;
    return &mrs[i].mr;
}

/* By its address a GPU's memory is had only where there is peer memory. */
static struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t len_bytes, int access)
{
    struct ibv_mr *mr = NULL;
    uint8_t *bytes = addr;
    pthread_mutex_lock(&fake_mutex);
    int error = may_register(addr, len_bytes, access) ? 0 : ENOMEM;
    if (gpu.len_bytes > 0 && bytes >= gpu.base && bytes < gpu.base + gpu.len_bytes) {
        if (!gpu.peer)
            error = EFAULT;
        bytes = gpu.bytes + (bytes - gpu.base);
    }
    if (error == 0)
        mr = add(pd, addr, len_bytes, access, bytes, NULL, 0);
    pthread_mutex_unlock(&fake_mutex);
    errno = error != 0 ? error : ENOMEM;
    return mr;
}

/* As strict as the kernel: the pages must be the buffer's, and begin as the address does. */
static struct ibv_mr *reg_dmabuf_mr(struct ibv_pd *pd, uint64_t off_bytes, size_t len_bytes,
                                    uint64_t iova, int fd, int access)
{
    struct stat file;
    struct ibv_mr *mr = NULL;
    uint64_t in_page = off_bytes & 4095;
    void *addr = (void *)(uintptr_t)iova, *mapped = MAP_FAILED;
    pthread_mutex_lock(&fake_mutex);
    int error = may_register(addr, len_bytes, access) ? gpu.dmabuf_errno : ENOMEM;
    if (error == 0 && fstat(fd, &file) != 0)
        error = EBADF;
    else if (error == 0 &&
             (off_bytes + len_bytes > (uint64_t)file.st_size || (iova & 4095) != in_page))
        error = EINVAL;
    if (error == 0) {
        mapped = mmap(NULL, in_page + len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                      (off_t)(off_bytes - in_page));
        error = mapped == MAP_FAILED ? ENOMEM : 0;
    }
    if (error == 0)
        mr = add(pd, addr, len_bytes, access, (uint8_t *)mapped + in_page, mapped,
                 in_page + len_bytes);
    pthread_mutex_unlock(&fake_mutex);
    errno = error != 0 ? error : ENOMEM;
    return mr;
}

static int dereg_mr(struct ibv_mr *mr)
{
    uint32_t i = mr->lkey >> 8;
    pthread_mutex_lock(&fake_mutex);
    KVC_ASSERT(mrs[i].used);
    mrs[i].used = false;
    if (mrs[i].mapped != NULL)
        (void)munmap(mrs[i].mapped, mrs[i].map_bytes);
    fake_now.mrs--;
    pthread_mutex_unlock(&fake_mutex);
    return 0;
}

uint8_t *fake_reach(const struct ibv_pd *pd, uint32_t key, uint64_t addr, uint64_t len_bytes,
                    int access, bool remote)
{
    uint32_t i = key >> 8;
    if (i == 0 || i >= MAX_MRS || !mrs[i].used || (key & 0xff) != (remote ? 1u : 0u))
        return NULL;
    uint64_t begin = (uintptr_t)mrs[i].mr.addr;
    bool allowed = mrs[i].mr.pd == pd && (mrs[i].access & access) == access && addr >= begin &&
                   len_bytes <= mrs[i].mr.length && addr - begin <= mrs[i].mr.length - len_bytes;
    return allowed ? mrs[i].bytes + (addr - begin) : NULL;
}

bool fake_pd_used(const struct ibv_pd *pd)
{
    for (uint32_t i = 1; i < MAX_MRS; i++) {
        if (mrs[i].used && mrs[i].mr.pd == pd)
            return true;
    }
    return false;
}

void fake_mrs_table(kvtr_verbs *table)
{
    gpu = (fake_gpu){0};
    table->reg_mr = reg_mr;
    table->reg_dmabuf_mr = reg_dmabuf_mr;
    table->dereg_mr = dereg_mr;
}

void fake_verbs_gpu(const fake_gpu *memory)
{
    pthread_mutex_lock(&fake_mutex);
    gpu = *memory;
    pthread_mutex_unlock(&fake_mutex);
}

uint32_t fake_verbs_stalled(void)
{
    pthread_mutex_lock(&fake_mutex);
    uint32_t n = stalled;
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

uint32_t fake_verbs_n_registered(const void *addr)
{
    uint32_t n = 0;
    pthread_mutex_lock(&fake_mutex);
    for (uint32_t i = 1; i < MAX_MRS; i++)
        n += mrs[i].used && mrs[i].mr.addr == addr;
    pthread_mutex_unlock(&fake_mutex);
    return n;
}

bool fake_verbs_registered(const void *addr)
{
    return fake_verbs_n_registered(addr) > 0;
}

uint64_t fake_verbs_bytes(const void *addr, size_t len_bytes)
{
    uint64_t bytes = 0;
    const uint8_t *begin = addr;
    pthread_mutex_lock(&fake_mutex);
    for (uint32_t i = 1; i < MAX_MRS; i++) {
        const uint8_t *at = mrs[i].mr.addr;
        bytes += mrs[i].used && at >= begin && at < begin + len_bytes ? mrs[i].mr.length : 0;
    }
    pthread_mutex_unlock(&fake_mutex);
    return bytes;
}

bool fake_verbs_open(const void *addr)
{
    bool open = false;
    pthread_mutex_lock(&fake_mutex);
    for (uint32_t i = 1; i < MAX_MRS && !open; i++)
        open = mrs[i].used && mrs[i].mr.addr == addr &&
               (mrs[i].access &
                (IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) != 0;
    pthread_mutex_unlock(&fake_mutex);
    return open;
}
