/*
 * cuda_support.h: what the programs that need a GPU share: the device, memory that goes away at the
 * end of a case, made-up data, and checks that end the program with a message. No cmocka, so that
 * they build where only a compiler and CUDA are. Single-threaded.
 */
#ifndef CUDA_SUPPORT_H
#define CUDA_SUPPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvk/cuda.h"

/* What a program exits with where there is no GPU: ctest says SKIPPED. */
#define GPU_SKIPPED 77

/* Ends the program unless x holds. */
#define REQUIRE(x, ...) require((x), __FILE__, __LINE__, #x, __VA_ARGS__)
/* The same for a status that must be KVC_OK. */
#define OK(x)           require_ok((x), __FILE__, __LINE__, #x)

void require(bool holds, const char *file, int line, const char *what, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
void require_ok(kvc_status status, const char *file, int line, const char *what);

/* The first device; prints why and exits with GPU_SKIPPED where there is none. */
kvk_cuda *gpu(void);
kvk_stream *gpu_stream(void);
void gpu_sync(void);

/* The CPU oracles: the reference for up to REFERENCE_MAX elements of work, else the fast backend,
 * which is held to the reference elsewhere. */
void oracle(bool large, kvk_backend **be_p, const kvk_ops **ops_p);
#define CPU(large, op, ...)                                                                        \
    do {                                                                                           \
        kvk_backend *be_;                                                                          \
        const kvk_ops *ops_;                                                                       \
        oracle(large, &be_, &ops_);                                                                \
        OK(ops_->op(be_, &(kvk_##op##_args){__VA_ARGS__}, NULL));                                  \
    } while (0)

/* Memory until release_all: host, device (filled with 0xee), and a device copy of host bytes. */
void *host_bytes(size_t len_bytes);
void *device_bytes(size_t len_bytes);
void *device_copy(const void *host, size_t len_bytes);
void *pinned_bytes(size_t len_bytes);
void release_all(void);
/* Device bytes on the host, after all that is enqueued. */
void *fetched(const void *device, size_t len_bytes);
void upload(void *device, const void *host, size_t len_bytes);

/* A fixed stream of numbers from a seed. */
typedef struct numbers {
    uint64_t state;
} numbers;
uint64_t number(numbers *from);
uint32_t number_below(numbers *from, uint32_t n);
/* About normal(0, 1). */
float normal(numbers *from);
float *normals(numbers *from, size_t n);
uint16_t bf16_of(float x);
float of_bf16(uint16_t bits);
/* Random index rows: any int8 and plausible scales. */
uint8_t *index_rows(numbers *from, uint32_t n, uint32_t n_heads, uint32_t dims);

#endif
