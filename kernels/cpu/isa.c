/*
 * isa.c: which inner loops this CPU can run. Built for the base machine: nothing here may use an
 * instruction that it is about to look for.
 */
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "isa.h"

typedef struct candidate {
    const char *name;
    const kvki_isa *isa; /* NULL: not in this build */
    bool (*here)(void);
} candidate;

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
#include <cpuid.h>

/* What compilers of some years ago have no name for: leaf 1 ECX, leaf 7 EDX. */
#define CPUID1_ECX_F16C     (1u << 29)
#define CPUID7_EDX_AMX_TILE (1u << 24)
#define CPUID7_EDX_AMX_INT8 (1u << 25)

static bool have_avx2(void)
{
    uint32_t a = 0, b = 0, c = 0, d = 0;

    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &a, &b, &c, &d) && (c & CPUID1_ECX_F16C) != 0;
}

static bool have_avx512(void)
{
    return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_TILE_DATA  18

/* Tiles need the kernel's permission, which then holds for the process and its later threads. */
static bool have_amx(void)
{
    const uint32_t tiles = CPUID7_EDX_AMX_TILE | CPUID7_EDX_AMX_INT8;
    uint32_t a = 0, b = 0, c = 0, d = 0;

    return have_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tiles) == tiles &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}

#define ISA_AVX2   &kvki_isa_avx2
#define ISA_AVX512 &kvki_isa_avx512
#define ISA_AMX    &kvki_isa_amx
#else
#define have_avx2   always
#define have_avx512 always
#define have_amx    always
#define ISA_AVX2    NULL
#define ISA_AVX512  NULL
#define ISA_AMX     NULL
#endif

/* Best first. */
static const candidate candidates[] = {
    {"amx", ISA_AMX, have_amx},
    {"avx512", ISA_AVX512, have_avx512},
    {"avx2", ISA_AVX2, have_avx2},
    {"portable", &kvki_isa_portable, always},
};

kvc_status kvki_isa_pick(const char *name, const kvki_isa **isa_p)
{
    for (size_t i = 0; i < sizeof(candidates) / sizeof(candidates[0]); i++) {
        const candidate *c = &candidates[i];
        if (name && strcmp(name, c->name) != 0)
            continue;
        if (c->isa && c->here()) {
            *isa_p = c->isa;
            return KVC_OK;
        }
        if (name)
            return KVC_UNSUPPORTED;
    }
    return KVC_INVALID;
}
