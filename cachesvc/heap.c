/*
 * heap.c: limits of glibc's malloc, and its rest; see heap.h.
 *
 * kvs_heap_init on the main thread, kvs_heap_tick on one thread at a time (kvs-ticker; servers of
 * one process share the state, hence the lock). Invariant: no trim comes sooner than REST_TICKS
 * after the one before, so that steady load does not pay for pages again and again.
 */
#include "heap.h"

#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

#define ARENAS     2
#define REST_TICKS 8u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards the two below */
static uint64_t least_free_bytes;
static uint32_t n_ticks;

void kvs_heap_init(void)
{
    (void)mallopt(M_ARENA_MAX, ARENAS);
}

/* Anonymous memory in RAM; 0: not known. */
static uint64_t resident_bytes(void)
{
    unsigned long long total, resident, shared;
    char text[128];
    int fd = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof(text) - 1);
    close(fd);
    text[n > 0 ? n : 0] = '\0';
    if (sscanf(text, "%llu %llu %llu", &total, &resident, &shared) != 3 || shared > resident)
        return 0;
    return (resident - shared) * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t kvs_heap_free_bytes(uint64_t mapped_bytes)
{
    struct mallinfo2 info = mallinfo2();
    uint64_t resident = resident_bytes(), used = info.uordblks + info.hblkhd + mapped_bytes;
    return resident > used ? resident - used : 0;
}

void kvs_heap_tick(uint64_t mapped_bytes)
{
    pthread_mutex_lock(&lock);
    uint64_t free_bytes = kvs_heap_free_bytes(mapped_bytes);
    if (n_ticks == 0 || free_bytes < least_free_bytes)
        least_free_bytes = free_bytes;
    if (++n_ticks >= REST_TICKS) {
        n_ticks = 0;
        if (least_free_bytes > KVS_HEAP_KEEP_BYTES)
            (void)malloc_trim(0);
    }
    pthread_mutex_unlock(&lock);
}
