/*
 * schemas.h: which tenants and schemas this server knows.
 *
 * A schema belongs to the tenant that registered it, since no answer may cross tenants. An entry
 * stays while somebody holds it or a block record of the index names its id; one that nobody has
 * used for long is retired and removed. Ids go from 1 and are given again.
 */
#ifndef KVS_SCHEMAS_H
#define KVS_SCHEMAS_H

#include "base/thread.h"
#include "kvc/types.h"

#define KVS_MAX_SCHEMAS 4096u /* of all tenants; a Describe reply lists no more */

/* One part as the server uses it; sorted by id, so its place is its number inside a block. */
typedef struct kvs_part {
    uint32_t id;
    uint32_t row_bytes;
    uint32_t n_rows; /* of a value */
    uint32_t value_bytes;
    uint32_t cls; /* eviction class: values of equal size, with and without sums, of one tenant */
    uint32_t window_blocks; /* leading blocks further behind than this are not needed; 0: all are */
    bool is_index;          /* compressed keys: optional in a prefix match */
    const kvc_part *info;   /* in the schema's own table */
} kvs_part;

/* A place in an opaque schema names a piece of a value: its number, and by these bits its room,
   which is a place in the table; see opaque.h. */
#define KVS_OPAQUE_CODES 32u

typedef struct kvs_schema {
    uint32_t id;
    kvc_digest tenant; /* SHA-256 of its name */
    kvc_digest digest;
    uint32_t block_tokens, n_parts;
    uint32_t piece_bytes; /* opaque: of each piece of a value but the last; else 0 */
    kvs_part *parts;
    kvc_schema *schema;
} kvs_schema;

/* What a place in a block means. */
static inline const kvs_part *kvs_part_at(const kvs_schema *schema, uint32_t place)
{
    return &schema->parts[schema->piece_bytes ? place % KVS_OPAQUE_CODES : place];
}

typedef struct kvs_schemas {
    uint32_t piece_bytes; /* of opaque schemas that are added */
    kvc_mutex lock;       /* guards all below; what an entry holds never changes */
    kvs_schema *by_id[KVS_MAX_SCHEMAS + 1]; /* [0] unused; NULL: free */
    struct {
        uint32_t users;
        uint64_t used_ns; /* when it was last held */
        bool retired;     /* on its way out: not found any more */
    } use[KVS_MAX_SCHEMAS + 1];
    uint32_t n, n_top; /* entries; the highest id ever given */
} kvs_schemas;

/* The place of a part id in schema->parts, or -1. */
int kvs_schema_part(const kvs_schema *schema, uint32_t part_id);

/* Opaque values are cut at KVC_MAX_VALUE_BYTES unless piece_bytes is changed before the first add.
 */
kvs_schemas *kvs_schemas_create(void);
void kvs_schemas_destroy(kvs_schemas *schemas);
/* The tenant's schema, held for kvs_schemas_put, or NULL. Any thread. */
const kvs_schema *kvs_schemas_find(kvs_schemas *schemas, const kvc_digest *tenant,
                                   const kvc_digest *digest);
/* Holds it once more; it is held or in use already. */
void kvs_schemas_hold(kvs_schemas *schemas, const kvs_schema *schema);
/* Lets go; NULL is fine. */
void kvs_schemas_put(kvs_schemas *schemas, const kvs_schema *schema);
/*
 * A schema that nobody holds, that was last held before idle_ns and that in_use (called under the
 * table's lock) denies; NULL: none. It is found no more; then remove frees it, or keep takes it
 * back.
 */
const kvs_schema *kvs_schemas_retire(kvs_schemas *schemas, uint64_t idle_ns,
                                     bool (*in_use)(void *arg, uint32_t id), void *arg);
void kvs_schemas_remove(kvs_schemas *schemas, const kvs_schema *schema);
void kvs_schemas_keep(kvs_schemas *schemas, const kvs_schema *schema);
/*
 * Adds a checked schema (copied) or finds it there; held for kvs_schemas_put. *new_p (may be NULL)
 * says which. class_of gives the eviction class of a value shape. NO_SPACE: KVS_MAX_SCHEMAS
 * reached. AGAIN: it is just being removed. NO_MEMORY, INVALID, IO.
 */
kvc_status kvs_schemas_add(kvs_schemas *schemas, const kvc_digest *tenant, const kvc_schema *schema,
                           uint32_t (*class_of)(void *arg, const kvc_digest *tenant,
                                                uint32_t value_bytes, uint32_t n_rows),
                           void *arg, const kvs_schema **schema_p, bool *new_p) KVC_MUST_CHECK;
/* Digests of the tenant's schemas, at most max, and 1 for each that is opaque, else 0; returns how
   many were written. */
uint32_t kvs_schemas_list(kvs_schemas *schemas, const kvc_digest *tenant, kvc_digest *out,
                          uint8_t *opaque, uint32_t max);
uint32_t kvs_schemas_count(kvs_schemas *schemas);

#endif
