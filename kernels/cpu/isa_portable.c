/* isa_portable.c: the inner loops in plain C, for any machine. */
#include "micro/table.h"

const kvki_isa kvki_isa_portable = KVKI_TABLE;
