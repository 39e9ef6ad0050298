/* cuda_support.c: see cuda_support.h. Single-threaded. */
#include "cuda_support.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MEMORIES_MAX 4096

typedef struct memory {
    int kind; /* 0: malloc; else kvk_cuda_memory */
    void *at;
} memory;

static memory memories[MEMORIES_MAX];
static size_t n_memories;

void require(bool holds, const char *file, int line, const char *what, const char *format, ...)
{
    va_list args;

    if (holds)
        return;
    (void)fprintf(stderr, "%s:%d: %s: ", file, line, what);
    va_start(args, format);
    (void)vfprintf(stderr, format, args);
    va_end(args);
    (void)fprintf(stderr, "\n");
    exit(1);
}

void require_ok(kvc_status status, const char *file, int line, const char *what)
{
    require(status == KVC_OK, file, line, what, "%s", kvc_status_name(status));
}

kvk_cuda *gpu(void)
{
    static kvk_cuda *cuda;
    kvk_cuda_info info;
    kvc_status st = KVC_OK;

    if (cuda)
        return cuda;
    st = kvk_cuda_open(0, &cuda);
    if (st == KVC_UNSUPPORTED) {
        printf("SKIPPED: this machine has no CUDA device that this build can use\n");
        exit(GPU_SKIPPED);
    }
    OK(st);
    kvk_cuda_describe(cuda, &info);
    printf("# %s, sm_%u, %u multiprocessors, %zu MiB, L2 %zu MiB\n", info.name, info.sm,
           info.n_multiprocessors, info.memory_bytes >> 20, info.l2_bytes >> 20);
    return cuda;
}

kvk_stream *gpu_stream(void)
{
    static kvk_stream *stream;

    if (!stream)
        OK(kvk_cuda_stream_create(gpu(), &stream));
    return stream;
}

void gpu_sync(void)
{
    OK(kvk_cuda_stream_sync(gpu(), gpu_stream()));
}

void oracle(bool large, kvk_backend **be_p, const kvk_ops **ops_p)
{
    static kvk_backend *backends[2];

    if (!backends[large])
        OK(kvk_backend_open(large ? "cpu" : "reference", NULL, &backends[large]));
    *be_p = backends[large];
    *ops_p = kvk_backend_ops(backends[large]);
}

static void *keep(int kind, void *at)
{
    REQUIRE(at && n_memories < MEMORIES_MAX, "no memory");
    memories[n_memories++] = (memory){kind, at};
    return at;
}

void *host_bytes(size_t len_bytes)
{
    return keep(0, calloc(len_bytes ? len_bytes : 1, 1));
}

void *device_bytes(size_t len_bytes)
{
    void *at = NULL;

    OK(kvk_cuda_alloc(gpu(), KVK_CUDA_DEVICE, len_bytes ? len_bytes : 1, &at));
    OK(kvk_cuda_fill(gpu(), at, 0xee, len_bytes, gpu_stream()));
    return keep(KVK_CUDA_DEVICE, at);
}

void *pinned_bytes(size_t len_bytes)
{
    void *at = NULL;

    OK(kvk_cuda_alloc(gpu(), KVK_CUDA_PINNED, len_bytes, &at));
    return keep(KVK_CUDA_PINNED, at);
}

void upload(void *device, const void *host, size_t len_bytes)
{
    OK(kvk_cuda_copy(gpu(), device, host, len_bytes, gpu_stream()));
    gpu_sync();
}

void *device_copy(const void *host, size_t len_bytes)
{
    void *at = device_bytes(len_bytes);

    upload(at, host, len_bytes);
    return at;
}

void *fetched(const void *device, size_t len_bytes)
{
    void *at = host_bytes(len_bytes);

    OK(kvk_cuda_copy(gpu(), at, device, len_bytes, gpu_stream()));
    gpu_sync();
    return at;
}

void release_all(void)
{
    gpu_sync();
    while (n_memories > 0) {
        memory m = memories[--n_memories];
        if (m.kind == 0)
            free(m.at);
        else
            kvk_cuda_free(gpu(), (kvk_cuda_memory)m.kind, m.at);
    }
}

uint64_t number(numbers *from)
{
    uint64_t x = from->state += 0x9e3779b97f4a7c15u;

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint32_t number_below(numbers *from, uint32_t n)
{
    return (uint32_t)((number(from) >> 32) * n >> 32);
}

float normal(numbers *from)
{
    uint64_t x = number(from);
    float sum = 0;

    for (int i = 0; i < 4; i++)
        sum += (float)((x >> (16 * i)) & 0xffffu) * 0x1p-16f - 0.5f;
    return sum * 1.7f;
}

float *normals(numbers *from, size_t n)
{
    float *x = host_bytes(n * sizeof(*x));

    for (size_t i = 0; i < n; i++)
        x[i] = normal(from);
    return x;
}

uint16_t bf16_of(float x)
{
    uint32_t bits;

    memcpy(&bits, &x, sizeof(bits));
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float of_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float x;

    memcpy(&x, &wide, sizeof(x));
    return x;
}

uint8_t *index_rows(numbers *from, uint32_t n, uint32_t n_heads, uint32_t dims)
{
    size_t row = kvk_index_row_bytes(n_heads, dims);
    uint8_t *rows = host_bytes((size_t)n * row + 8);

    for (uint32_t j = 0; j < n; j++) {
        uint8_t *at = rows + j * row;
        for (size_t i = 0; i < (size_t)n_heads * dims; i += 8) {
            uint64_t x = number(from);
            memcpy(at + i, &x, sizeof(x)); /* the tail is overwritten below */
        }
        for (uint32_t h = 0; h < n_heads; h++) {
            uint16_t scale = bf16_of(0.01f + 0.00001f * (float)number_below(from, 1000));
            memcpy(at + (size_t)n_heads * dims + 2 * h, &scale, 2);
        }
        for (size_t i = 0; i < (size_t)n_heads * dims; i++) /* quantize never gives -128 */
            at[i] = at[i] == 0x80 ? 0x81 : at[i];
    }
    return rows;
}
