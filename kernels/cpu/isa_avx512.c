/* isa_avx512.c: the inner loops with AVX-512 F, BW, VL, DQ, VNNI. Run only where isa.c found them.
 */
#include "isa.h"

#if defined(__x86_64__)
#define KVKI_ISA_AVX512
#include "micro/table.h"

const kvki_isa kvki_isa_avx512 = KVKI_TABLE;
#endif
