/*
 * isa_amx.c: AVX-512 with AMX int8 tiles for many queries against the int8 index. Everything else,
 * and every bit, is as in isa_avx512.c. Run only where isa.c found tiles and may use them.
 */
#include "isa.h"

#if defined(__x86_64__)
#define KVKI_ISA_AVX512
#define KVKI_ISA_AMX
#include "micro/table.h"

const kvki_isa kvki_isa_amx = KVKI_TABLE;
#endif
