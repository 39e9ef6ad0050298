/*
 * bulk.cuh: copies of whole pieces from device to shared memory by the copy engine, which an
 * mbarrier in shared memory waits for (sm_90 on). Device code; elsewhere these do nothing.
 *
 * One thread asks: expect, then the copies. Others may copy too, even before it expects, while its
 * arrival is the only one that the phase still waits for: bytes that come sooner count below zero
 * (down to 2^20 - 1), so the phase ends with the last byte. Before the next phase the threads must
 * meet. Whoever reads waits for the barrier's phase: the i-th use of a barrier has parity i % 2.
 * Addresses and sizes are multiples of 16 bytes.
 */
#ifndef KVKI_CUDA_BULK_CUH
#define KVKI_CUDA_BULK_CUH

#include "device.cuh"

__device__ static inline uint32_t bulk_address(const void *shared)
{
    return (uint32_t)__cvta_generic_to_shared(shared);
}

/* One thread a barrier, whose phase ends with n arrivals; bulk_begin then makes them known to the
 * copy engine. */
__device__ static inline void bulk_init(uint64_t *barrier, uint32_t n)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bulk_address(barrier)), "r"(n)
                 : "memory");
#endif
}

__device__ static inline void bulk_begin(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/* The barrier's memory may be used otherwise, or bulk_init be called again. */
__device__ static inline void bulk_drop(uint64_t *barrier)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bulk_address(barrier)) : "memory");
#endif
}

/* Starts a phase that ends when these bytes have come. */
__device__ static inline void bulk_expect(uint64_t *barrier, uint32_t bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bulk_address(barrier)),
        "r"(bytes)
        : "memory");
#endif
}

/* Bytes that are read once: they do not displace what is used again in L2. */
__device__ static inline void bulk_copy(void *shared, const void *global, uint32_t bytes,
                                        uint64_t *barrier)
{
#if __CUDA_ARCH__ >= 900
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(bulk_address(shared)),
                 "l"(global), "r"(bytes), "r"(bulk_address(barrier)), "l"(policy)
                 : "memory");
#endif
}

/* Bytes that are read again: by other blocks, or by a later step. */
__device__ static inline void bulk_copy_shared(void *shared, const void *global, uint32_t bytes,
                                               uint64_t *barrier)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(bulk_address(shared)),
                 "l"(global), "r"(bytes), "r"(bulk_address(barrier))
                 : "memory");
#endif
}

/* An arrival without bytes: what the thread wrote before is seen by who waits. */
__device__ static inline void bulk_arrive(uint64_t *barrier)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bulk_address(barrier))
                 : "memory");
#endif
}

/* Whether the phase of this parity has ended; does not wait. */
__device__ static inline bool bulk_ended(uint64_t *barrier, uint32_t parity)
{
    uint32_t done = 0;

#if __CUDA_ARCH__ >= 900
    asm volatile("{\n\t.reg .pred p;\n\t"
                 "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.b32 %0, 1, 0, p;\n\t}"
                 : "=r"(done)
                 : "r"(bulk_address(barrier)), "r"(parity)
                 : "memory");
#endif
    return done != 0;
}

__device__ static inline void bulk_wait(uint64_t *barrier, uint32_t parity)
{
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;

    while (!done) {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.b32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(bulk_address(barrier)), "r"(parity)
                     : "memory");
    }
#endif
}

#endif
