/*
 * saved_record.h: what saved contexts are made of, in lmdb's meta records or, without lmdb, in
 * memory.
 *
 * Records: "context/<tenant hex>/<name>" is the head, a GetContext reply without data;
 * "body/<generation>" says how many pieces a body has, and "piece/<generation>/<n>" is one of them.
 * A body's record is written before its first piece and goes after its last, and a head is written
 * after all pieces; so whatever a crash leaves, a body without a head is found and removed.
 */
#ifndef KVS_SAVED_RECORD_H
#define KVS_SAVED_RECORD_H

#include "server.h"

/* The pieces of one saved context. */
typedef struct kvs_body {
    uint64_t generation;
    uint32_t n_pieces;
    atomic_uint refs;
    void **pieces; /* [n_pieces] without lmdb, else NULL */
} kvs_body;

/* store->ops NULL: in memory. All of these block where there is lmdb: disk threads, the ticker, or
   at start and stop. Errors are the tier's; a full lmdb is NO_SPACE. */

/* With one reference. */
kvc_status kvs_body_create(kvs_store *store, uint64_t generation, uint32_t n_pieces,
                           kvs_body **body_p) KVC_MUST_CHECK;
/* Durable on OK, where there is lmdb. Borrows data. */
kvc_status kvs_body_write(kvs_store *store, kvs_body *body, uint32_t piece, const void *data,
                          size_t len_bytes) KVC_MUST_CHECK;
/* Bytes off .. off + len of a piece. NOT_FOUND, CORRUPT: it is not all there. */
kvc_status kvs_body_read(kvs_store *store, const kvs_body *body, uint32_t piece, size_t off_bytes,
                         size_t len_bytes, void *dst) KVC_MUST_CHECK;
/* Gives up a reference; the last one removes it all. NULL is fine. */
void kvs_body_put(kvs_store *store, kvs_body *body);
/* Frees it and leaves the records, for the next start. NULL is fine. */
void kvs_body_free(kvs_body *body);

/* Durable on OK. In memory: nothing to do. */
kvc_status kvs_head_write(kvs_store *store, const kvc_digest *tenant,
                          const kvc_saved_context *saved) KVC_MUST_CHECK;
kvc_status kvs_head_drop(kvs_store *store, const kvc_digest *tenant,
                         const char *saved) KVC_MUST_CHECK;

/* Each head of lmdb; false stops. Borrows what is passed. Records that make no sense are logged and
   left out. */
typedef bool kvs_head_found(void *arg, const kvc_digest *tenant, const kvc_saved_context *saved);
kvc_status kvs_heads_each(kvs_store *store, kvs_head_found *found, void *arg) KVC_MUST_CHECK;
/* Removes the bodies that wanted does not want; sets *last_p to the largest generation seen. */
kvc_status kvs_bodies_clean(kvs_store *store, bool (*wanted)(void *arg, uint64_t generation),
                            void *arg, uint64_t *last_p) KVC_MUST_CHECK;

#endif
