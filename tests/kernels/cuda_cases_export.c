/*
 * cuda_cases_export.c: device memory for other devices to write to: a dma-buf of it, where the
 * driver exports one, and that their writes can be flushed.
 */
#include <stdio.h>
#include <sys/stat.h>

#include "cuda_cases.h"

void cuda_case_export(numbers *from)
{
    void *memory = NULL;
    struct stat file;
    (void)from;
    OK(kvk_cuda_alloc(gpu(), KVK_CUDA_DEVICE, KVK_CUDA_SHARE_UNIT, &memory));
    uint64_t off_bytes = 7;
    int fd = 7;
    kvc_status st = kvk_cuda_export(gpu(), memory, KVK_CUDA_SHARE_UNIT, &fd, &off_bytes);
    if (st == KVC_OK) {
        REQUIRE(fd > 2 && fstat(fd, &file) == 0, "descriptor %d", fd);
        REQUIRE(off_bytes == 0, "it begins %llu bytes in", (unsigned long long)off_bytes);
    } else {
        REQUIRE(st == KVC_UNSUPPORTED && fd == -1, "status %d, descriptor %d", (int)st, fd);
    }
    kvk_cuda_export_close(gpu(), fd);
    kvc_status flushed = kvk_cuda_flush_writes(gpu());
    REQUIRE(flushed == KVC_OK || flushed == KVC_UNSUPPORTED, "status %d", (int)flushed);
    (void)printf("export: %s dma-buf, writes of other devices %s\n", st == KVC_OK ? "a" : "no",
                 flushed == KVC_OK ? "can be flushed" : "cannot be flushed");
    kvk_cuda_free(gpu(), KVK_CUDA_DEVICE, memory);
}
