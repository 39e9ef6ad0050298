/*
 * index.h: which values the server holds, in which tiers, and who is reading them.
 *
 * A block record (digest, schema) has one small table of the values that it has, sorted by part; a
 * value record holds its slots and links in 64 bytes. One ranked lock guards all of it: a critical
 * section is some 50 ns a value, a fetch takes it once per batch of blocks, and the eviction lists
 * are global anyway; shards would buy little before millions of rows per second and cost that
 * simplicity. No tier is called under the lock. Slots leave the index first and are released
 * afterwards, by whoever took them out, while the value stays invisible and claimed (kvs_evict_*).
 */
#ifndef KVS_INDEX_H
#define KVS_INDEX_H

#include "base/thread.h"
#include "ghost.h"
#include "opaque.h"
#include "slab.h"
#include "tier/tier.h"

/* States of a value; a value without FILLING, DRAM, LMDB and readers does not exist. */
#define KVS_FILLING 1u      /* claimed: a put, or with LEAVING an eviction, owns it; invisible */
#define KVS_DRAM    2u      /* rows readable at the dram slot */
#define KVS_LMDB    4u      /* rows readable at the lmdb slot */
#define KVS_SYNCED  8u      /* the lmdb copy survives power loss */
#define KVS_WRITING 16u     /* a write to lmdb is wanted or under way: the dram copy must stay */
#define KVS_LOADING 32u     /* a promotion to dram is under way */
#define KVS_MAIN    64u     /* its dram queue is the main one, else the small one */
#define KVS_DOOMED  128u    /* bad or erased: invisible, freed when the last reader leaves */
#define KVS_READS   0x600u  /* how often it was read in its queue, up to 3: two bits */
#define KVS_READ    0x200u  /* one of those */
#define KVS_HELD    256u    /* counted in held_bytes: leaves no tier unless another has it */
#define KVS_ERASED  0x800u  /* FILLING or WRITING: invisible, DOOMED once that has ended */
#define KVS_KEPT    0x1000u /* HELD with no copy in lmdb: counted in its class's n_kept */
#define KVS_GPU     0x4000u /* a gpu has a copy too: chain names its entry */
#define KVS_RAISING 0x2000u /* a copy to the gpu is under way: the dram copy must stay */
#define KVS_LEAVING 0x8000u /* FILLING is an eviction's */

typedef struct kvs_value {
    kvs_slot dram, lmdb;           /* lmdb of a queued dirty value: its row sums, and their bytes */
    uint32_t dram_prev, dram_next; /* queue of its class (clean values), or of dirty values */
    uint32_t lmdb_prev, lmdb_next; /* age list of its class */
    uint32_t block;
    uint32_t chain; /* next in the list of dead values; before that, with GPU, its entry there */
    uint16_t part;  /* place in the schema's table, or of a piece (opaque.h) */
    uint16_t refs;  /* readers */
    uint16_t flags;
    uint16_t heat; /* 4 bits of window number, 12 bits of rows read from lmdb in that window */
} kvs_value;

typedef struct kvs_block {
    kvc_digest digest;
    uint32_t schema;        /* id */
    uint32_t hash_next;     /* block id */
    uint32_t contexts;      /* times it stands in open contexts and holds */
    uint32_t holds;         /* of them holds */
    uint32_t n_values : 13; /* at most KVC_MAX_PARTS, or KVC_MAX_PIECES */
    uint32_t n_coming : 13; /* of them claimed by puts: FILLING without LEAVING */
    uint32_t room_log : 6;  /* room is 2^room_log, where there is a table */
    uint32_t set;     /* of an opaque schema: the tag of its pieces, and when the last one came */
    uint32_t *values; /* [room] ids by ascending part, then [room] uint16_t: their parts; or NULL */
} kvs_block;

/* An order in which values give way: from the tail. */
typedef struct kvs_queue {
    uint32_t head, tail; /* head: newest */
    uint64_t n;
} kvs_queue;

/* Values of one size of one tenant share the dram segments and the lmdb environment. */
typedef struct kvs_class {
    kvc_digest tenant;
    uint32_t value_bytes;  /* rounded up to pages */
    uint32_t record_pages; /* in lmdb, with the row sums: its size class there; 0: mixed */
    kvs_queue small, main; /* of dram: on trial; read again since they came */
    uint32_t clock;        /* values that gave way while on trial */
    uint32_t lmdb_head, lmdb_tail;
    uint64_t n_dram, n_lmdb; /* in the queues; in the list */
    uint64_t dram_bytes;     /* of the values in the dram list */
    uint64_t n_kept;         /* KEPT values: of dram they keep kvs_class_segments at least */
    kvs_queue gpu;           /* entries of its copies in a gpu */
} kvs_class;

/* A value's copy in a gpu. */
typedef struct kvs_gpu_entry {
    kvs_slot slot;
    uint32_t value;      /* KVS_NIL: an orphan */
    uint32_t prev, next; /* in its class's queue, or next orphan */
    uint16_t cls;
    uint8_t uses; /* reads since it was spared, a few at most */
    bool bad;     /* nobody is told of it any more */
} kvs_gpu_entry;

#define KVS_MAX_CLASSES     1024u       /* beyond it, values share class 0 */
#define KVS_DIRTY_SUMS      (16u << 20) /* bytes of row sums kept for dirty values */
#define KVS_INDEX_STEP      256u        /* values or digests worked on in one critical section */
#define KVS_HASH_PAGE_SHIFT 14u
#define KVS_HASH_MAX_PAGES  (1u << 16)

typedef struct kvs_index {
    kvc_mutex lock; /* rank INDEX; guards all below; no tier is called under it */
    kvs_schema *const *schemas;
    uint64_t seed;
    kvs_slab blocks, values;
    uint32_t *hash[KVS_HASH_MAX_PAGES]; /* linear hashing: one bucket is split per insertion */
    uint32_t hash_level, hash_split;
    uint32_t schema_blocks[KVS_MAX_SCHEMAS + 1]; /* block records of each schema, by its id */
    kvs_class classes[KVS_MAX_CLASSES];
    uint32_t n_classes;
    kvs_ghosts ghosts;                        /* names of values that gave way while on trial */
    uint32_t dirty_head, dirty_tail;          /* values that want a write to lmdb, oldest first */
    uint64_t n_dirty, sums_bytes;             /* of the dirty values' row sums */
    bool write_used;                          /* see kvs_index_write_used */
    uint32_t dead_head;                       /* doomed values without readers */
    bool gpu_on;                              /* there is a gpu tier, and it has not failed */
    kvs_slab gpu;                             /* kvs_gpu_entry */
    uint32_t gpu_orphans;                     /* entries whose slots are to be released */
    uint64_t n_visible;                       /* values that a read can find */
    uint64_t held_bytes[KVS_MAX_SCHEMAS + 1]; /* of HELD values, by schema */
    uint32_t held_max_schema;                 /* no id above it has ever been held */
    uint64_t held_total, max_held, max_held_total; /* caps: of one tenant, of all of them */
    uint64_t segment_bytes;                        /* of dram's; 0: they are not counted */
    uint64_t max_kept, max_kept_total;             /* segments that KEPT values may need */
} kvs_index;

/* NULL when memory is out. schemas: by id, borrowed, as in kvs_schemas. */
kvs_index *kvs_index_create(kvs_schema *const *schemas);
void kvs_index_destroy(kvs_index *index);

/* The class of a value shape; as kvs_schemas_add wants it (arg: the index). Any thread. */
uint32_t kvs_index_class(void *arg, const kvc_digest *tenant, uint32_t value_bytes,
                         uint32_t n_rows);

/* What a put found. */
typedef enum kvs_claim {
    KVS_CLAIM_MINE,      /* new: fill it, then publish or abandon */
    KVS_CLAIM_EXISTS,    /* there, and the promise asked for holds */
    KVS_CLAIM_WRITE,     /* in dram only, DURABLE wanted: now WRITING; write its rows, then wrote */
    KVS_CLAIM_SYNC,      /* in lmdb, perhaps not synced, DURABLE wanted: referenced; then synced */
    KVS_CLAIM_BUSY,      /* somebody else is filling, writing or removing it: retry */
    KVS_CLAIM_NO_MEMORY, /* the index cannot grow */
    KVS_CLAIM_ABSENT,    /* not there, and only what is there was wanted */
    KVS_CLAIM_REST, /* pieces of another value that nobody completed: erased now; reap, retry */
} kvs_claim;

/* One value that a put brings; the caller fills in the first line. */
typedef struct kvs_want {
    const kvc_digest *digest; /* borrowed */
    uint32_t part;            /* place */
    kvs_claim claim;
    uint32_t value;
    kvs_slot slot; /* with WRITE the dram slot, with SYNC the lmdb slot */
} kvs_want;

/*
 * Claims wants [n], n > 0, in their order; only_old: what is not there is ABSENT, and nothing is
 * claimed. Returns how many have their answer, at least one: whoever is BUSY after one of the same
 * call that is MINE may be that same value, so it is left to another call, once that is settled.
 */
uint32_t kvs_index_claim_each(kvs_index *index, const kvs_schema *schema, kvs_want *wants,
                              uint32_t n, bool durable, bool only_old);
static inline kvs_claim kvs_index_claim(kvs_index *index, const kvs_schema *schema, uint32_t part,
                                        const kvc_digest *digest, bool durable, uint32_t *value_p,
                                        kvs_slot *slot_p)
{
    kvs_want want = {.digest = digest, .part = part};
    (void)kvs_index_claim_each(index, schema, &want, 1, durable, false);
    *value_p = want.value;
    *slot_p = want.slot;
    return want.claim;
}
/* Gives up a claim: the value is gone. Also that of a piece. */
void kvs_index_abandon(kvs_index *index, uint32_t id);

/* A claimed value that is in dram now. */
typedef struct kvs_filled {
    uint32_t value, n_rows;
    kvs_slot slot;
    uint32_t *sums; /* [n_rows], of what came, malloc'd; or NULL */
} kvs_filled;

/* Makes filled [n] visible. dirty: they want a write to lmdb and are queued for it. Takes the sums,
   which are kept for dirty values, KVS_DIRTY_SUMS of them at most. */
void kvs_index_publish_each(kvs_index *index, kvs_filled *filled, uint32_t n, bool dirty);
static inline void kvs_index_publish_dram(kvs_index *index, uint32_t id, kvs_slot slot, bool dirty)
{
    kvs_index_publish_each(index, &(kvs_filled){.value = id, .slot = slot}, 1, dirty);
}
static inline void kvs_index_publish_dirty(kvs_index *index, uint32_t id, kvs_slot slot,
                                           uint32_t *sums, uint32_t n_rows)
{
    kvs_filled filled = {.value = id, .n_rows = n_rows, .slot = slot, .sums = sums};
    kvs_index_publish_each(index, &filled, 1, true);
}
/* A claimed value is in lmdb, and in dram too where dram is not NULL. */
void kvs_index_publish_lmdb(kvs_index *index, uint32_t id, kvs_slot lmdb, bool synced,
                            const kvs_slot *dram);
/* The write of a WRITING value ended. ok false: it stays in dram only, and may be dropped. */
void kvs_index_wrote(kvs_index *index, uint32_t id, bool ok, kvs_slot lmdb, bool synced);
/* The sync that KVS_CLAIM_SYNC asked for ended; drops the reference. */
void kvs_index_synced(kvs_index *index, uint32_t id, bool ok);
/* Whether a read of a value that is only in dram queues it as dirty, from now on. */
void kvs_index_write_used(kvs_index *index, bool yes);
/* The oldest queued dirty value; KVS_NIL: none. It stays WRITING. Gives its row sums or NULL. */
uint32_t kvs_index_next_dirty(kvs_index *index, kvs_slot *dram_p, uint32_t **sums_p);
uint64_t kvs_index_dirty_count(kvs_index *index);

/* The full name of a value, for a tier. The value must be claimed, referenced or WRITING. */
void kvs_index_key(kvs_index *index, uint32_t id, kvs_value_key *key_p);
const kvs_schema *kvs_index_schema(kvs_index *index, uint32_t id, uint32_t *part_p);

/* Puts a value found by recover into the index. EXISTS: it is there already. NO_MEMORY. */
kvc_status kvs_index_recovered(kvs_index *index, const kvs_schema *schema, uint32_t part,
                               const kvc_digest *digest, kvs_slot lmdb) KVC_MUST_CHECK;

/* Leading digests for which every part of parts [n_parts] (places) is there; windowed: a part
   whose window ended before the last hits is not asked for. tiers [n] (may be NULL): for each hit
   the kvc_tier of the slowest part, read from the fastest of its copies. TIMED_OUT: deadline_ns (0:
   none) came first; NO_MEMORY. */
kvc_status kvs_index_match(kvs_index *index, const kvs_schema *schema, const uint16_t *parts,
                           uint32_t n_parts, bool windowed, const kvc_digest *digests, uint32_t n,
                           uint64_t deadline_ns, uint8_t *tiers, uint32_t *hits_p) KVC_MUST_CHECK;

/* Block ids for a context, created where unknown, each counted once per mention. NO_MEMORY: none
   is held. */
kvc_status kvs_index_hold_blocks(kvs_index *index, const kvs_schema *schema,
                                 const kvc_digest *digests, uint32_t n,
                                 uint32_t *blocks) KVC_MUST_CHECK;
/* The same for blocks that somebody else holds already. */
void kvs_index_share_blocks(kvs_index *index, const uint32_t *blocks, uint32_t n);
void kvs_index_drop_blocks(kvs_index *index, const uint32_t *blocks, uint32_t n);
/* Whether a value or a context needs the schema; as kvs_schemas_retire wants it. */
bool kvs_index_uses_schema(void *index, uint32_t schema);
bool kvs_index_block_is(kvs_index *index, uint32_t block, const kvc_digest *digest);

/* ---- index_keep.c: what may not be dropped, and what must be ---- */

/*
 * Holds blocks [n] that a context has. *tenant_bytes_p: of all HELD values of the schema's tenant,
 * also on failure. NO_SPACE: a cap is reached, of bytes or of segments; nothing was changed.
 */
kvc_status kvs_index_hold(kvs_index *index, const kvs_schema *schema, const uint32_t *blocks,
                          uint32_t n, uint64_t *tenant_bytes_p) KVC_MUST_CHECK;
void kvs_index_unhold(kvs_index *index, const uint32_t *blocks, uint32_t n);
uint64_t kvs_index_held(kvs_index *index, const kvs_schema *schema);
/* What became of the values of one block that were to be erased. */
typedef struct kvs_erased {
    uint64_t values, bytes; /* invisible from now on */
    uint64_t pending;       /* erased now or before, but not gone yet: ask again */
} kvs_erased;
/* Erases parts [n_parts] (places; NULL: all) of a block, adding to *erased. The caller reaps what
   is dead. */
void kvs_index_erase(kvs_index *index, const kvs_schema *schema, const kvc_digest *digest,
                     const uint16_t *parts, uint32_t n_parts, kvs_erased *erased);
/* The same by the id of a block that a context has. */
void kvs_index_erase_block(kvs_index *index, uint32_t block, const uint16_t *parts,
                           uint32_t n_parts, kvs_erased *erased);

typedef enum kvs_where { KVS_NOWHERE = 0, KVS_IN_DRAM, KVS_IN_LMDB, KVS_BUSY } kvs_where;

/* One value that a fetch reads; the caller fills the first line. */
typedef struct kvs_read {
    uint32_t block, n_rows; /* rows wanted, for the heat */
    uint32_t value;         /* referenced if where is DRAM or LMDB */
    uint8_t where;
    bool promote; /* LOADING was set and one more reference taken: load it to dram, then loaded */
    /* By the caller: it sees to copies for the gpu. Then: RAISING was set and one more reference
       taken: copy it there, then kvs_gpu_raised. */
    bool raise;
    bool gpu; /* a gpu has it too, at gpu_slot */
    kvs_slot slot, gpu_slot;
} kvs_read;

/*
 * Looks up and references n values of one part. promote_rows: how many rows read from lmdb within a
 * window make a value worth loading (0: never); window: number of the current window.
 */
void kvs_index_ref(kvs_index *index, const kvs_schema *schema, uint32_t part, uint32_t promote_rows,
                   uint32_t window, kvs_read *reads, uint32_t n);
/* The same by name: value i is part parts[i] (a place) of the block digests[i]; the caller fills in
 * nothing. Nothing is promoted, and unknown blocks are not created. */
void kvs_index_ref_named(kvs_index *index, const kvs_schema *schema,
                         const kvc_digest *const *digests, const uint16_t *parts, kvs_read *reads,
                         uint32_t n);
/* One reference more of a value that the caller has referenced. False: it has too many. */
bool kvs_index_ref_again(kvs_index *index, uint32_t value);
void kvs_index_unref(kvs_index *index, const uint32_t *values, uint32_t n);
/* The caller, who holds a reference, found the lmdb copy bad: no lookup finds it any more. False:
   somebody else said so before, or a good copy in dram keeps serving. */
bool kvs_index_doom(kvs_index *index, uint32_t id);
/* Whether any of values, which the caller references, was erased or found bad. */
bool kvs_index_any_doomed(kvs_index *index, const uint32_t *values, uint32_t n);
/* A promotion ended (slot NULL: in vain); drops its reference. False: the slot was not taken. */
bool kvs_index_loaded(kvs_index *index, uint32_t id, const kvs_slot *slot);

/* ---- index_gpu.c: copies in a gpu, of values that dram or lmdb have ---- */

/* Whether reads are told of copies, and values become worth one by use. */
void kvs_gpu_on(kvs_index *index, bool yes);
/* Marks a referenced value RAISING, with one more reference, where dram has it and the gpu has not
   and nobody else is at it; then kvs_gpu_raised. */
bool kvs_gpu_want(kvs_index *index, uint32_t id, kvs_slot *dram_p);
/* The copy ended (slot NULL: in vain); drops its reference. False: the slot was not taken. */
bool kvs_gpu_raised(kvs_index *index, uint32_t id, const kvs_slot *slot);
/* The slot of a copy whose value is no more, to be released. False: there is none. */
bool kvs_gpu_orphan(kvs_index *index, kvs_slot *slot_p);
/* A copy that has left the index: its slot is to be released. demote: dram has not got the value:
   LOADING was set and a reference taken, so load it there first, then kvs_index_loaded. */
typedef struct kvs_gpu_victim {
    uint32_t value;
    bool demote;
    kvs_slot slot;
} kvs_gpu_victim;
/* The gpu thread's: the oldest copy of the class that was not read lately and is not in use. */
bool kvs_gpu_evict(kvs_index *index, uint32_t cls, kvs_gpu_victim *victim_p);
/* As kvs_evict_starved. */
bool kvs_gpu_starved(kvs_index *index, uint32_t cls);
/* The gpu thread's: a segment of other classes' of which no copy is in use, of the largest class if
   that has one, the least read, and the next copy there (*cursor_p: 0 at first). False: there is
   none. */
bool kvs_gpu_find_segment(kvs_index *index, uint32_t cls, uint32_t *segment_p);
bool kvs_gpu_evict_from(kvs_index *index, uint32_t segment, uint32_t *cursor_p,
                        kvs_gpu_victim *victim_p);
uint64_t kvs_gpu_count(kvs_index *index); /* copies */
/* A reader, who has a reference, found the copy corrupt. False: it was known, or there is none. */
bool kvs_gpu_bad(kvs_index *index, uint32_t id);

/* ---- index_opaque.c: values of opaque schemas, which are there once all their pieces are ---- */

/* A piece that nobody followed up for so long belongs to a value that others may replace. */
#define KVS_OPAQUE_REST_S 10u

/*
 * Claims a piece, as kvs_index_claim does. The first piece that comes decides whose value it is.
 * Pieces of another value under that name get EXISTS once all pieces of the first are there (its
 * promise stays what it is), BUSY while they may still come, and REST where they rested for
 * KVS_OPAQUE_REST_S. tag 0: any value; only_old only. now_s: of a clock that goes on.
 */
kvs_claim kvs_index_claim_piece(kvs_index *index, const kvs_schema *schema, uint32_t place,
                                uint32_t tag, const kvc_digest *digest, bool durable, bool only_old,
                                uint64_t now_s, uint32_t *value_p, kvs_slot *slot_p);
/* With the index lock held: whether it is a piece of a block of which another is being put. */
bool kvs_opaque_coming_locked(const kvs_index *index, const kvs_value *value);
/* The places of all pieces of a value, at most KVC_MAX_PIECES; 0: not all are there. */
uint32_t kvs_index_pieces(kvs_index *index, const kvs_schema *schema, const kvc_digest *digest,
                          uint16_t *places);
/* What the pieces of a referenced one's block have in common: the tag in the first
   KVS_OPAQUE_TAG_BITS bits, which stays while the reference does, and then when the last of them
   was claimed. Pieces met under one such number at two times are of one lot. */
uint32_t kvs_index_piece_set(kvs_index *index, uint32_t id);
/*
 * As kvs_index_match for values: tiers [n] (may be NULL) gets that of the slowest piece, 0 for a
 * value that is not there. each: also what comes after the first that is not. TIMED_OUT.
 */
kvc_status kvs_index_match_opaque(kvs_index *index, const kvs_schema *schema,
                                  const kvc_digest *digests, uint32_t n, bool each,
                                  uint64_t deadline_ns, uint8_t *tiers,
                                  uint32_t *hits_p) KVC_MUST_CHECK;
/* As kvs_index_recovered. INVALID: the block has pieces of another value. */
kvc_status kvs_index_recovered_piece(kvs_index *index, const kvs_schema *schema, uint32_t place,
                                     uint32_t tag, const kvc_digest *digest,
                                     kvs_slot lmdb) KVC_MUST_CHECK;

/* ---- between the files of the index and evict.c, with the lock held
 * ---------------------------------------------------- */
static inline kvs_value *kvs_value_at(const kvs_index *index, uint32_t id)
{
    return kvs_slab_at(&index->values, id);
}
static inline kvs_block *kvs_block_at(const kvs_index *index, uint32_t id)
{
    return kvs_slab_at(&index->blocks, id);
}
static inline uint32_t kvs_block_room(const kvs_block *block)
{
    return block->values ? 1u << block->room_log : 0;
}
static inline uint16_t *kvs_block_parts(const kvs_block *block)
{
    return (uint16_t *)(block->values + kvs_block_room(block));
}
/* Where a part's value is or would be inserted. A part is never further back than its number, and
   exactly there where every part before it has a value. */
static inline uint32_t kvs_block_place(const kvs_block *block, uint32_t part)
{
    uint32_t lo = 0, hi = part < block->n_values ? part : block->n_values;
    if (block->n_values == 0)
        return 0;
    const uint16_t *parts = kvs_block_parts(block);
    if (hi < block->n_values && parts[hi] == part)
        return hi;
    while (lo < hi) {
        uint32_t mid = (lo + hi) / 2;
        if (parts[mid] < part)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}
static inline uint32_t kvs_value_find(const kvs_index *index, uint32_t block_id, uint32_t part)
{
    const kvs_block *block = kvs_block_at(index, block_id);
    uint32_t at = kvs_block_place(block, part);
    return at < block->n_values && kvs_block_parts(block)[at] == part ? block->values[at] : KVS_NIL;
}
/* Whether a read finds it. */
static inline bool kvs_value_visible(const kvs_value *value)
{
    return (value->flags & (KVS_DRAM | KVS_LMDB)) &&
           !(value->flags & (KVS_FILLING | KVS_DOOMED | KVS_ERASED));
}
/* Values of a class that a segment of dram has room for; one where their sizes are mixed. */
static inline uint64_t kvs_class_slots(const kvs_index *index, const kvs_class *cls)
{
    return cls->value_bytes && cls->value_bytes < index->segment_bytes
               ? index->segment_bytes / cls->value_bytes
               : 1;
}
/* The segments that n of its values need where they lie together. */
static inline uint64_t kvs_class_segments(const kvs_index *index, const kvs_class *cls, uint64_t n)
{
    uint64_t slots = kvs_class_slots(index, cls);
    return (n + slots - 1) / slots;
}
/* The fastest tier that has it; 0: none. */
static inline uint8_t kvs_value_tier(const kvs_index *index, const kvs_value *value)
{
    return !kvs_value_visible(value)                 ? 0
           : value->flags & KVS_GPU && index->gpu_on ? KVC_TIER_GPU
           : value->flags & KVS_DRAM                 ? KVC_TIER_DRAM
                                                     : KVC_TIER_LMDB;
}
/* The value's copy in the gpu, if it has one, is an orphan. */
void kvs_gpu_forget_locked(kvs_index *index, uint32_t id);
/* Whether it has one that can be read, which counts as a use. */
bool kvs_gpu_used_locked(kvs_index *index, const kvs_value *value, kvs_slot *slot_p);
/* As kvs_gpu_want, for a value that was read often. */
bool kvs_gpu_hot_locked(const kvs_index *index, kvs_value *value);
bool kvs_blocks_init(kvs_index *index); /* false: no memory */
void kvs_blocks_fini(kvs_index *index);
/* KVS_NIL: not there. */
uint32_t kvs_block_find(kvs_index *index, uint32_t schema, const kvc_digest *digest);
/* Finds or adds; KVS_NIL: no memory. */
uint32_t kvs_block_get(kvs_index *index, uint32_t schema, const kvc_digest *digest);
/* A put claims a value that is there, in the block's table, or has ended. */
void kvs_block_coming(kvs_index *index, uint32_t value, bool begins);
/* Puts a value that is not there into the block's table. False: no memory. */
bool kvs_block_add_value(kvs_block *block, uint32_t part, uint32_t value);
/* Takes one that is there out. */
void kvs_block_remove_value(kvs_block *block, uint32_t part);
/* Frees a block that nothing needs any more. */
void kvs_block_settle(kvs_index *index, uint32_t id);
/* Queues a value that was made WRITING. */
void kvs_index_dirty_locked(kvs_index *index, uint32_t id);
/* Adds a value that is not there; KVS_NIL: no memory. */
uint32_t kvs_value_create_locked(kvs_index *index, const kvs_schema *schema, uint32_t part,
                                 const kvc_digest *digest);
/* kvs_index_recovered with the lock held. */
kvc_status kvs_recovered_locked(kvs_index *index, const kvs_schema *schema, uint32_t part,
                                const kvc_digest *digest, kvs_slot lmdb) KVC_MUST_CHECK;
/* What a put of a value that is there finds. */
kvs_claim kvs_claim_old_locked(kvs_index *index, uint32_t id, bool durable, kvs_slot *slot_p);
/* Erases it, adding to *erased; see kvs_index_erase. */
void kvs_erase_value_locked(kvs_index *index, uint32_t id, kvs_erased *erased);
/* The tag of a block of an opaque schema. */
static inline uint32_t kvs_block_tag(const kvs_block *block)
{
    return block->set >> (32 - KVS_OPAQUE_TAG_BITS);
}
/* Takes a WRITING value out of the queue, with its row sums or NULL. False: it is not in it. */
bool kvs_index_undirty_locked(kvs_index *index, uint32_t id, uint32_t **sums_p);
/* What kept an ERASED value is over: it is doomed. Others stay as they are. */
void kvs_index_erased_locked(kvs_index *index, uint32_t id);
void kvs_value_unref_locked(kvs_index *index, uint32_t id);
/* A value became visible: HELD where its block is and the caps allow. */
void kvs_hold_admit_locked(kvs_index *index, uint32_t id);
/* A HELD value came to lmdb: it keeps no segment of dram any more. */
void kvs_hold_release_segment_locked(kvs_index *index, uint32_t id);
/* A value is about to leave: HELD no more. */
void kvs_hold_forget_locked(kvs_index *index, uint32_t id);
const kvs_part *kvs_value_part(const kvs_index *index, const kvs_value *value);
kvs_class *kvs_value_class(kvs_index *index, const kvs_value *value);
void kvs_key_locked(kvs_index *index, uint32_t id, kvs_value_key *key_p);
/* Frees a value that has no flags and no readers, and its block where nothing needs it. */
void kvs_value_free_locked(kvs_index *index, uint32_t id);

#endif
