/*
 * hold_rig.c: see hold_rig.h.
 */
#include "hold_rig.h"

#include <stdlib.h>

#include "base/fault.h"

int start(void **state, bool has_lmdb)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_non_null(f);
    h_server_init(&f->h);
    h_schema_init(&f->schema, "model", 1, ROW, false);
    h_schema_init(&f->other, "other", 1, 2 * ROW, false);
    if (has_lmdb) {
        h_temp_dir(f->folder);
        f->h.settings.lmdb_path = f->folder;
        f->h.settings.lmdb_bytes = 64u << 20;
    }
    f->h.settings.dram_bytes = (uint64_t)N_SEGMENTS << 20;
    f->h.settings.transport_threads = 1; /* so calls are looked at in their order */
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    assert_int_equal(h_register(f->peer, &f->schema), KVC_OK);
    assert_int_equal(h_register(f->peer, &f->other), KVC_OK);
    *state = f;
    return 0;
}

int setup(void **state)
{
    return start(state, false);
}

int teardown(void **state)
{
    fixture *f = *state;
    assert_int_equal(kvc_fault_arm(NULL), KVC_OK);
    h_disconnect(f->peer);
    h_server_fini(&f->h);
    if (f->folder[0])
        h_remove_dir(f->folder);
    free(f);
    return 0;
}

uint64_t evictions(const fixture *f)
{
    return atomic_load(&f->h.server->dram.evictions);
}

kvc_status hold(fixture *f, uint64_t context, uint64_t *hold_p)
{
    kvc_request req = {.method = KVC_HOLD};
    req.u.hold.context = context;
    kvc_status status = h_call(f->peer, &req);
    *hold_p = status == KVC_OK ? f->peer->xfer.reply.u.hold.hold : 0;
    return status;
}

void put(fixture *f, const h_schema *schema, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++)
        assert_int_equal(h_put1(f->peer, schema, first + b, 0, KVC_PROMISE_MEMORY), KVC_OK);
}

uint32_t present(fixture *f, const h_schema *schema, uint64_t first, uint32_t n)
{
    uint32_t found = 0, hits, part = 0;
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_match(f->peer, schema, first + b, 1, &part, 1, &hits), KVC_OK);
        found += hits;
    }
    return found;
}

uint64_t held_block(uint32_t i)
{
    return (uint64_t)i * PER_SEGMENT + i;
}

uint64_t hold_one_of_each(fixture *f, uint64_t *context_p)
{
    kvc_digest digests[N_SEGMENTS];
    uint64_t handle;
    put(f, &f->schema, 0, N_ALL);
    assert_int_equal(present(f, &f->schema, 0, N_ALL), N_ALL);
    for (uint32_t i = 0; i < N_SEGMENTS; i++)
        digests[i] = h_digest(held_block(i));
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    req.u.open_context.schema = f->schema.digest;
    req.u.open_context.digests = digests;
    req.u.open_context.n_digests = N_SEGMENTS;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    *context_p = f->peer->xfer.reply.u.open_context.context;
    assert_int_equal(hold(f, *context_p, &handle), KVC_OK);
    return handle;
}

bool held_is_right(h_peer *peer, uint64_t context)
{
    uint32_t picks[N_SEGMENTS];
    for (uint32_t i = 0; i < N_SEGMENTS; i++)
        picks[i] = i * H_TOKENS + 7 * i;
    bool right = h_fetch(peer, context, 0, picks, N_SEGMENTS) == KVC_OK && peer->n_missing == 0;
    for (uint32_t i = 0; right && i < N_SEGMENTS; i++)
        right = h_row_is(held_block(i), 0, 7 * i, ROW, peer->data + (size_t)i * ROW);
    return right;
}
