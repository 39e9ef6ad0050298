/*
 * gca.c: the selectors of whole chunks: GCA (arXiv 2410.01651) and HSA (2504.16795). Immutable.
 *
 * They have no scores per token: a retriever (retrieve.c) scores landmarks, one a chunk, and the
 * table only says how the chosen chunks are weighed against each other.
 */
#include "selectors.h"

/* Softmax over the chosen scores. */
const kvw_selector_ops kvw_selector_gca = {
    .name = "gca",
    .default_index = KVW_INDEX_EXACT,
    .default_recent = 512,
    .form = KVWI_SHARED,
    .positions = KVW_FAR_NEAR,
    .fusion = KVK_FUSE_SOFTMAX,
};

/* Stick breaking from the newest chunk down. */
const kvw_selector_ops kvw_selector_hsa = {
    .name = "hsa",
    .default_index = KVW_INDEX_EXACT,
    .default_recent = 512,
    .form = KVWI_SHARED,
    .positions = KVW_FAR_NEAR,
    .fusion = KVK_FUSE_STICK,
};
