/*
 * internal.h: what the CPU backends share: the backend object, the three functions that every op
 * file defines, the thread pool and the scratch store.
 *
 * An op is one file, cpu/<op>.c, with
 *   kvki_check_<op>  every check of the arguments; runs before anything is written;
 *   kvki_ref_<op>    the reference: one thread, double accumulation, no cleverness;
 *   kvki_fast_<op>   the fast form: shares out tiles over the pool, calls the isa's inner loops.
 * The entries in the op tables are made from these by the backends, from KVK_OPS.
 */
#ifndef KVKI_INTERNAL_H
#define KVKI_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvk/compute.h"

typedef struct kvki_isa kvki_isa;
typedef struct kvki_pool kvki_pool;
typedef struct kvki_scratch kvki_scratch;
typedef struct kvki_angles kvki_angles;

/* What a registered backend brings. open fills be->isa, pool, scratch and angles; close undoes it.
 */
typedef struct kvki_backend_desc {
    const char *name;                                                  /* REQ */
    const kvk_ops *ops;                                                /* REQ, every slot */
    kvc_status (*open)(kvk_backend *be, const kvk_backend_opts *opts); /* REQ */
    void (*close)(kvk_backend *be);                                    /* REQ */
} kvki_backend_desc;

struct kvk_backend {
    const kvki_backend_desc *desc;
    const char *isa_name;
    const kvki_isa *isa;   /* NULL in the reference */
    kvki_pool *pool;       /* NULL in the reference */
    kvki_scratch *scratch; /* NULL in the reference */
    kvki_angles *angles;   /* NULL in the reference */
};

extern const kvki_backend_desc kvki_backend_reference;
extern const kvki_backend_desc kvki_backend_cpu;

/* True where every slot of the table is filled. */
bool kvki_ops_complete(const kvk_ops *ops);

#define KVKI_DECLARE_OP(op)                                                                        \
    kvc_status kvki_check_##op(const kvk_##op##_args *a) KVC_MUST_CHECK;                           \
    kvc_status kvki_ref_##op(const kvk_##op##_args *a) KVC_MUST_CHECK;                             \
    kvc_status kvki_fast_##op(kvk_backend *be, const kvk_##op##_args *a) KVC_MUST_CHECK;
KVK_OPS(KVKI_DECLARE_OP)
#undef KVKI_DECLARE_OP

/*
 * pool.c: n_threads threads counting the caller. kvki_pool_run calls fn(arg, item, worker) once for
 * each item in [0, n_items), in any order, worker < kvki_pool_threads, never twice at once with the
 * same worker; it returns when all are done. Where another caller is using the pool, the items run
 * on the calling thread (worker 0): results must depend on the item alone.
 */
typedef void (*kvki_item_fn)(void *arg, size_t item, uint32_t worker);
kvc_status kvki_pool_create(uint32_t n_threads, kvki_pool **pool_p) KVC_MUST_CHECK;
void kvki_pool_destroy(kvki_pool *pool);
uint32_t kvki_pool_threads(const kvki_pool *pool);
void kvki_pool_run(kvki_pool *pool, size_t n_items, kvki_item_fn fn, void *arg);

/*
 * scratch.c: memory of one call, 64-byte aligned: the caller's (memory->take), or recycled between
 * calls. take gives a buffer of at
 * least len_bytes (NULL: no memory); give takes it back (NULL is fine). Any thread.
 */
kvc_status kvki_scratch_create(const kvk_memory *memory, kvki_scratch **scratch_p) KVC_MUST_CHECK;
void kvki_scratch_destroy(kvki_scratch *scratch);
void *kvki_scratch_take(kvki_scratch *scratch, size_t len_bytes);
void kvki_scratch_give(kvki_scratch *scratch, void *buf);

/*
 * angles.c: the isa's angles of positions 0 .. n - 1, as [n, 2, half] (cos, sin), kept for the
 * backend's life; NULL where they are not kept, so that the caller computes its own. Any thread.
 */
kvc_status kvki_angles_create(kvki_angles **angles_p) KVC_MUST_CHECK;
void kvki_angles_destroy(kvki_angles *angles);
const float *kvki_angles_of(kvk_backend *be, const double *freq, uint32_t half, uint32_t n);

#endif
