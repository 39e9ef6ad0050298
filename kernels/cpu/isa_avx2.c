/* isa_avx2.c: the inner loops with AVX2, FMA and F16C. Run only where isa.c found them. */
#include "isa.h"

#if defined(__x86_64__)
#define KVKI_ISA_AVX2
#include "micro/table.h"

const kvki_isa kvki_isa_avx2 = KVKI_TABLE;
#endif
