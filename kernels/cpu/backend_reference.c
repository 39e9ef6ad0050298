/*
 * backend_reference.c: the backend that the others are measured against. One thread (the caller's),
 * double accumulation, libm; it keeps no state, so any number of threads may use one.
 */
#include <string.h>

#include "internal.h"

#define ENTRY(op)                                                                                  \
    static kvc_status enter_##op(kvk_backend *be, const kvk_##op##_args *a, kvk_stream *stream)    \
    {                                                                                              \
        kvc_status st = be && a && !stream ? kvki_check_##op(a) : KVC_INVALID;                     \
        return st == KVC_OK ? kvki_ref_##op(a) : st;                                               \
    }
KVK_OPS(ENTRY)
#undef ENTRY

static const kvk_ops ops = {.name = "reference",
#define SLOT(op) .op = enter_##op,
                            KVK_OPS(SLOT)
#undef SLOT
};

static kvc_status reference_open(kvk_backend *be, const kvk_backend_opts *opts)
{
    if (opts->isa && strcmp(opts->isa, "double") != 0)
        return KVC_INVALID;
    be->isa_name = "double";
    return KVC_OK;
}

static void reference_close(kvk_backend *be)
{
    (void)be; /* nothing was taken */
}

const kvki_backend_desc kvki_backend_reference = {
    .name = "reference", .ops = &ops, .open = reference_open, .close = reference_close};
