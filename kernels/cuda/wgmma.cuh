/*
 * wgmma.cuh: products of a warpgroup on the tensor cores of sm_90a: four warps, the first of which
 * is a multiple of four, hold 64 rows of the left operand and of the sum in registers, 16 a warp,
 * as the 16 x 8 steps of mma.cuh lay them out; the right one is a tile in shared memory. Device
 * code; elsewhere these do nothing.
 *
 * A tile is panels of 64 bf16 columns, one behind the other: rows of 128 bytes, whose pieces of 16
 * bytes are exchanged (tile_piece). It begins at a multiple of 1,024 bytes. What was asked for runs
 * on its own between begin and wait, and its registers are not touched meanwhile.
 */
#ifndef KVKI_CUDA_WGMMA_CUH
#define KVKI_CUDA_WGMMA_CUH

#include "bulk.cuh"

#define PANEL_ROW_BYTES   128u
#define PANEL_GROUP_BYTES 1024u /* eight rows, in which the exchange repeats */

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA_HERE 1
#else
#define WGMMA_HERE 0
#endif

/* Offset of the piece of 16 bytes, 8 columns, of a row in a tile of n_rows. */
__host__ __device__ static inline uint32_t tile_piece(uint32_t n_rows, uint32_t row, uint32_t piece)
{
    return (piece / 8u * n_rows + row) * PANEL_ROW_BYTES + ((piece ^ row) & 7u) * 16u;
}

/*
 * A tile as the right operand. Its rows are columns of the product (keys, for scores: the columns
 * are summed over), or with kTransposed its columns are (values), and panels are panel_bytes apart.
 */
__device__ static inline uint64_t wgmma_tile(const void *shared, uint32_t panel_bytes)
{
    return (uint64_t)1 << 62 | (uint64_t)(PANEL_GROUP_BYTES / 16u) << 32 |
           (uint64_t)(panel_bytes / 16u) << 16 | (bulk_address(shared) / 16u);
}

/* The same tile from so many bytes on. */
__device__ static inline uint64_t wgmma_from(uint64_t tile, uint32_t off_bytes)
{
    return tile + off_bytes / 16u;
}

/* So many registers for each thread of this warpgroup from now on: more than before, or fewer. */
template <int kRegisters, bool kMore> __device__ static inline void wgmma_registers(void)
{
#if WGMMA_HERE
    if (kMore)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

/* Registers that were written before are there for what is asked from now on. */
__device__ static inline void wgmma_begin(void)
{
#if WGMMA_HERE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

/* Closes what was asked since the last one; wait_but returns when all but the last kPending have
 * ended. */
__device__ static inline void wgmma_commit(void)
{
#if WGMMA_HERE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

template <int kPending> __device__ static inline void wgmma_wait_but(void)
{
#if WGMMA_HERE
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

/* wgmma_wait_but<0>, which the compiler takes for another. */
__device__ static inline void wgmma_wait_all(void)
{
#if WGMMA_HERE
    asm volatile("wgmma.wait_group.sync.aligned 0; // all" ::: "memory");
#endif
}

/* The compiler moves no use of these across here: what products read or add to, before they begin
 * and when they have ended. */
template <int kN> __device__ static inline void wgmma_pin(float (&c)[kN][4])
{
#pragma unroll
    for (int t = 0; t < kN; t++)
        asm volatile("" : "+f"(c[t][0]), "+f"(c[t][1]), "+f"(c[t][2]), "+f"(c[t][3])::"memory");
}

template <int kN> __device__ static inline void wgmma_pin(uint32_t (&a)[kN][4])
{
#pragma unroll
    for (int t = 0; t < kN; t++)
        asm volatile("" : "+r"(a[t][0]), "+r"(a[t][1]), "+r"(a[t][2]), "+r"(a[t][3])::"memory");
}

#define WGMMA_4(c, t)  "+f"(c[t][0]), "+f"(c[t][1]), "+f"(c[t][2]), "+f"(c[t][3])
#define WGMMA_16(c, t) WGMMA_4(c, t), WGMMA_4(c, t + 1), WGMMA_4(c, t + 2), WGMMA_4(c, t + 3)
#define WGMMA_32(c, t) WGMMA_16(c, t), WGMMA_16(c, t + 4)

/* Asks for c [64, kN] = a [64, 16] times 16 rows or columns of the tile, plus c if `keep`. */
template <bool kTransposed>
__device__ static inline void wgmma(float (&c)[8][4], const uint32_t (&a)[4], uint64_t tile,
                                    int keep)
{
#if WGMMA_HERE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n\t}"
                 : WGMMA_32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(keep),
                   "n"(kTransposed ? 1 : 0));
#endif
}

template <bool kTransposed>
__device__ static inline void wgmma(float (&c)[16][4], const uint32_t (&a)[4], uint64_t tile,
                                    int keep)
{
#if WGMMA_HERE
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %69, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n\t}"
                 : WGMMA_32(c, 0), WGMMA_32(c, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tile), "r"(keep),
                   "n"(kTransposed ? 1 : 0));
#endif
}

#endif
