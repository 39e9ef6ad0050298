/*
 * backend_cpu.c: the fast backend. Picks the best isa that this CPU has (or the one asked for),
 * starts the pool, and enters each op through its checks. An open backend never changes, so calls
 * need no lock; pool, scratch and angles have their own.
 */
#include "internal.h"
#include "isa.h"

#define ENTRY(op)                                                                                  \
    static kvc_status enter_##op(kvk_backend *be, const kvk_##op##_args *a, kvk_stream *stream)    \
    {                                                                                              \
        kvc_status st = be && a && !stream ? kvki_check_##op(a) : KVC_INVALID;                     \
        return st == KVC_OK ? kvki_fast_##op(be, a) : st;                                          \
    }
KVK_OPS(ENTRY)
#undef ENTRY

static const kvk_ops ops = {.name = "cpu",
#define SLOT(op) .op = enter_##op,
                            KVK_OPS(SLOT)
#undef SLOT
};

static kvc_status cpu_open(kvk_backend *be, const kvk_backend_opts *opts)
{
    kvc_status st = kvki_isa_pick(opts->isa, &be->isa);

    if (st != KVC_OK)
        return st;
    be->isa_name = be->isa->name;
    st = kvki_scratch_create(&opts->memory, &be->scratch);
    if (st != KVC_OK)
        return st;
    st = kvki_angles_create(&be->angles);
    if (st != KVC_OK)
        goto err_scratch;
    st = kvki_pool_create(opts->n_threads, &be->pool);
    if (st != KVC_OK)
        goto err_angles;
    return KVC_OK;

err_angles:
    kvki_angles_destroy(be->angles);
    be->angles = NULL;
err_scratch:
    kvki_scratch_destroy(be->scratch);
    be->scratch = NULL;
    return st;
}

static void cpu_close(kvk_backend *be)
{
    kvki_pool_destroy(be->pool);
    kvki_angles_destroy(be->angles);
    kvki_scratch_destroy(be->scratch);
}

const kvki_backend_desc kvki_backend_cpu = {
    .name = "cpu", .ops = &ops, .open = cpu_open, .close = cpu_close};
