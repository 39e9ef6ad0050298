/*
 * registry.c: the selectors that are built in. One line adds one. Immutable.
 */
#include <string.h>

#include "base/assert.h"
#include "selectors.h"

static const kvw_selector_ops *const selectors[] = {
    &kvw_selector_esa,
    &kvw_selector_tokenselect,
};

/* Selectors of whole chunks, which retrieve.c works for. */
static const kvw_selector_ops *const chunk_selectors[] = {
    &kvw_selector_gca,
    &kvw_selector_hsa,
};

enum { N_CHUNK_SELECTORS = sizeof(chunk_selectors) / sizeof(chunk_selectors[0]) };
enum { N_SELECTORS = sizeof(selectors) / sizeof(selectors[0]) };

/* REQ slots are filled, or the entry is a bug of ours. */
static const kvw_selector_ops *checked(const kvw_selector_ops *ops)
{
    KVC_ASSERT(ops->name != NULL);
    KVC_ASSERT(ops->fusion != 0 || (ops->prepare != NULL && ops->aggregate != NULL));
    KVC_ASSERT(ops->default_recent != 0 && ops->default_index != 0);
    KVC_ASSERT(ops->form != 0 && ops->positions != 0);
    return ops;
}

const kvw_selector_ops *kvw_selector_at(uint32_t i)
{
    return i < N_SELECTORS ? checked(selectors[i]) : NULL;
}

const kvw_selector_ops *kvw_selector_find(const char *name)
{
    for (uint32_t i = 0; i < N_SELECTORS; i++) {
        if (strcmp(selectors[i]->name, name) == 0) {
            return checked(selectors[i]);
        }
    }
    for (uint32_t i = 0; i < N_CHUNK_SELECTORS; i++) {
        if (strcmp(chunk_selectors[i]->name, name) == 0) {
            return checked(chunk_selectors[i]);
        }
    }
    return NULL;
}
