/*
 * projection.h: the calibration artefact of a compressed index (format: worker/README.md).
 *
 * A loaded projection is immutable and may be read from any thread. The file is untrusted input:
 * every length is checked before it is used.
 */
#ifndef KVWI_PROJECTION_H
#define KVWI_PROJECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/types.h"

#define KVWI_PROJECTION_RAW      (-1) /* rope=raw */
#define KVWI_PROJECTION_MAX_DIMS 4096u
#define KVWI_PROJECTION_MAX_TEXT 4096u /* header bytes, empty line included */

typedef enum kvwi_form {
    KVWI_SHARED = 1,   /* one matrix over the concatenated kv heads */
    KVWI_PER_HEAD = 2, /* one matrix per kv head */
} kvwi_form;

typedef struct kvwi_projection {
    char selector[32];
    char model[KVC_MAX_NAME_BYTES + 1];
    uint32_t n_layers, n_kv_heads, head_dim, dims;
    kvwi_form form;
    int32_t rope; /* position at which queries were rotated, or KVWI_PROJECTION_RAW */
    bool nested;  /* a prefix of the columns is a valid smaller projection */
    kvc_digest digest;
    /* derived */
    uint32_t heads, d_in; /* of one matrix [heads, d_in, dims] */
    float *a, *b;         /* [n_layers, heads, d_in, dims] each */
} kvwi_projection;

/*
 * Reads a projection from memory. INVALID with *why_p (static text, may be NULL) naming the rule;
 * NO_MEMORY. *proj_p is given to the caller: kvwi_projection_free.
 */
kvc_status kvwi_projection_parse(const void *data, size_t len_bytes, kvwi_projection **proj_p,
                                 const char **why_p) KVC_MUST_CHECK;
/* The same from a file. NOT_FOUND, IO. */
kvc_status kvwi_projection_load(const char *path, kvwi_projection **proj_p,
                                const char **why_p) KVC_MUST_CHECK;
void kvwi_projection_free(kvwi_projection *proj);
/* Frees a and b once they have been copied; the rest stays. */
void kvwi_projection_drop_matrices(kvwi_projection *proj);

/*
 * Writes proj (digest and derived counts are ignored; a, b as above) to path, whole or not at all.
 * INVALID: a field out of range; IO.
 */
kvc_status kvwi_projection_write(const char *path, const kvwi_projection *proj) KVC_MUST_CHECK;

#endif
