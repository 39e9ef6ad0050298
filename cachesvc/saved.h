/*
 * saved.h: the contexts that tenants saved by name.
 *
 * A table of heads in memory; the bodies are in records (saved_record.h). A body is put in pieces,
 * as an upload that its client numbers: repeated pieces are recognised by their offset. The last
 * piece makes the context visible in place of what had the name. A saved context holds its schema.
 */
#ifndef KVS_SAVED_H
#define KVS_SAVED_H

#include "server.h"

#define KVS_SAVED_MEMORY_BYTES (64u << 20) /* of all bodies, without lmdb */
#define KVS_SAVED_UPLOADS      16u         /* of one tenant */
#define KVS_SAVED_UPLOAD_NS    60000000000ull
#define KVS_SAVED_WHY_BYTES    200u

/* One piece of a PutContext; borrows all of it. */
typedef struct kvs_saved_piece {
    const kvs_schema *schema; /* of the tenant */
    const kvc_saved_context *context;
    uint64_t upload, offset, if_generation;
    bool replace;
    const struct iovec *data;
    uint32_t n_data;
    uint64_t len_bytes;
} kvs_saved_piece;

typedef struct kvs_saved_got {
    kvc_saved_context context; /* name and tail_parts in the arena that was given */
    struct kvs_body *body;     /* referenced */
} kvs_saved_got;

/* NULL: no memory. The server's schemas and record_lock must be there, and lmdb's store. */
kvs_saved *kvs_saved_create(kvs_server *server);
void kvs_saved_destroy(kvs_saved *saved); /* NULL is fine */
/* Finds what lmdb has, and removes what was not finished. At start, after the schemas. */
kvc_status kvs_saved_load(kvs_saved *saved) KVC_MUST_CHECK;
/* Bytes of saved contexts that a tenant may have. */
uint64_t kvs_saved_tenant_cap(const kvs_server *server);
/* Drops uploads that rest. */
void kvs_saved_sweep(kvs_saved *saved, uint64_t now_ns);

/*
 * Takes a piece; may block on the disk. *received_p: of the body; *generation_p is not 0 once it is
 * complete and visible. INVALID, EXISTS, NOT_FOUND (by if_generation, or an upload that is not
 * here), AGAIN (the same upload is being written), NO_SPACE, and the tier's; why says it.
 */
kvc_status kvs_saved_put(kvs_saved *saved, const kvs_saved_piece *piece, uint64_t *received_p,
                         uint64_t *generation_p, char why[KVS_SAVED_WHY_BYTES]) KVC_MUST_CHECK;
/* generation 0: any. NOT_FOUND, NO_MEMORY. Does not block. */
kvc_status kvs_saved_get(kvs_saved *saved, const kvc_digest *tenant, const char *name,
                         uint64_t generation, kvc_arena *arena, kvs_saved_got *got_p,
                         char why[KVS_SAVED_WHY_BYTES]) KVC_MUST_CHECK;
/* Bytes of a body; may block. Errors of kvs_body_read. */
kvc_status kvs_saved_read(kvs_saved *saved, const kvs_saved_got *got, uint64_t off_bytes,
                          size_t len_bytes, void *dst) KVC_MUST_CHECK;
/* Gives back what kvs_saved_get gave; may block. */
void kvs_saved_put_back(kvs_saved *saved, kvs_saved_got *got);
/* Up to max heads behind the name after, without tail_parts, names in arena; *more_p: there are
   others. NO_MEMORY. Does not block. */
kvc_status kvs_saved_list(kvs_saved *saved, const kvc_digest *tenant, const char *after,
                          uint32_t max, kvc_arena *arena, kvc_saved_context **list_p, uint32_t *n_p,
                          bool *more_p) KVC_MUST_CHECK;
/* May block. NOT_FOUND, EXISTS (another generation), and the tier's. */
kvc_status kvs_saved_delete(kvs_saved *saved, const kvc_digest *tenant, const char *name,
                            uint64_t if_generation, char why[KVS_SAVED_WHY_BYTES]) KVC_MUST_CHECK;

#endif
