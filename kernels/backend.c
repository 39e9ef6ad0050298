/*
 * backend.c: the list of compute backends and the life of one.
 *
 * A backend is registered by one row in `registered`. open refuses a table with an empty slot, so
 * that a missing op shows when the process starts and not in the middle of a step.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu/internal.h"

static const kvki_backend_desc *const registered[] = {
    &kvki_backend_reference,
    &kvki_backend_cpu,
};

#define N_REGISTERED (sizeof(registered) / sizeof(registered[0]))

bool kvki_ops_complete(const kvk_ops *ops)
{
    bool complete = ops && ops->name;
#define SLOT_FILLED(op) complete = complete && ops->op;
    KVK_OPS(SLOT_FILLED)
#undef SLOT_FILLED
    return complete;
}

static const kvki_backend_desc *find(const char *name)
{
    for (size_t i = 0; i < N_REGISTERED; i++) {
        if (strcmp(registered[i]->name, name) == 0)
            return registered[i];
    }
    return NULL;
}

kvc_status kvk_backend_open(const char *name, const kvk_backend_opts *opts, kvk_backend **be_p)
{
    kvk_backend_opts given = {.size_bytes = sizeof(given)};
    const kvki_backend_desc *desc = NULL;
    kvk_backend *be = NULL;
    kvc_status st = KVC_OK;

    if (!be_p)
        return KVC_INVALID;
    *be_p = NULL;
    if (opts && opts->size_bytes != sizeof(given))
        return KVC_INVALID;
    if (opts)
        given = *opts;
    if (given.memory.take && !given.memory.give)
        return KVC_INVALID;
    desc = name ? find(name) : NULL;
    if (!desc)
        return KVC_INVALID;
    if (!kvki_ops_complete(desc->ops))
        return KVC_UNSUPPORTED;
    be = calloc(1, sizeof(*be));
    if (!be)
        return KVC_NO_MEMORY;
    be->desc = desc;
    st = desc->open(be, &given);
    if (st != KVC_OK)
        goto err_free;
    *be_p = be;
    return KVC_OK;

err_free:
    free(be);
    return st;
}

void kvk_backend_close(kvk_backend *be)
{
    if (!be)
        return;
    be->desc->close(be);
    free(be);
}

const kvk_ops *kvk_backend_ops(const kvk_backend *be)
{
    return be->desc->ops;
}

const char *kvk_backend_isa(const kvk_backend *be)
{
    return be->isa_name;
}

const char *kvk_backend_name(uint32_t i)
{
    return i < N_REGISTERED ? registered[i]->name : NULL;
}

size_t kvk_dtype_bytes(kvk_dtype dtype)
{
    switch (dtype) {
    case KVK_F32:
        return 4;
    case KVK_F16:
    case KVK_BF16:
        return 2;
    case KVK_I8:
    case KVK_E4M3_SCALED:
    case KVK_I8_SCALED:
        return 1;
    }
    return 0;
}
