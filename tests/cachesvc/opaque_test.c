/*
 * opaque_test.c: opaque values through the protocol: every length, presence of all pieces or none,
 * first put wins for the whole, restarts, and bad input.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "opaque_support.h"

static const size_t lengths[] = {
    0,       1,           63,          4031,         4032,         4033,         4095,
    4096,    4097,        100000,      O_PIECE - 65, O_PIECE - 64, O_PIECE - 63, O_PIECE - 1,
    O_PIECE, O_PIECE + 1, 2 * O_PIECE, 5557453};
#define N_LENGTHS (sizeof(lengths) / sizeof(lengths[0]))

typedef struct rig {
    h_server h;
    h_schema schema;
    h_peer *peer;
    char dir[256];
} rig;

static void rig_start(rig *r)
{
    h_server_start(&r->h);
    r->peer = h_connect(r->h.listen, "default");
    assert_int_equal(h_register(r->peer, &r->schema), KVC_OK);
}

static void rig_stop(rig *r, bool flush)
{
    h_disconnect(r->peer);
    h_server_stop(&r->h, flush);
}

static rig *rig_create(bool lmdb)
{
    rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    o_schema_init(&r->schema, "opaque/model");
    h_server_init(&r->h);
    r->h.settings.dram_bytes = 96 << 20;
    if (lmdb) {
        h_temp_dir(r->dir);
        r->h.settings.lmdb_path = r->dir;
        r->h.settings.lmdb_bytes = 256 << 20;
    }
    return r;
}

static void rig_destroy(rig *r)
{
    h_server_fini(&r->h);
    if (r->dir[0])
        h_remove_dir(r->dir);
    free(r);
}

static void put_and_get_all(rig *r, kvc_promise promise)
{
    for (uint32_t i = 0; i < N_LENGTHS; i++) {
        assert_false(o_there(r->peer, &r->schema, i));
        assert_int_equal(o_put(r->peer, &r->schema, i, 7, lengths[i], promise, 0), KVC_OK);
        assert_true(o_there(r->peer, &r->schema, i));
        o_get_equal(r->peer, &r->schema, i, 7, lengths[i]);
        assert_int_equal(o_put(r->peer, &r->schema, i, 7, lengths[i], promise, 0), KVC_EXISTS);
        assert_int_equal(o_put(r->peer, &r->schema, i, 8, lengths[i] + 1, promise, 0), KVC_EXISTS);
        o_get_equal(r->peer, &r->schema, i, 7, lengths[i]);
    }
    for (uint32_t i = 0; i < N_LENGTHS; i++)
        o_get_equal(r->peer, &r->schema, i, 7, lengths[i]);
}

static void every_length(void **state)
{
    (void)state;
    rig *r = rig_create(false);
    rig_start(r);
    put_and_get_all(r, KVC_PROMISE_MEMORY);
    h_check_caps(&r->h);
    for (uint32_t i = 0; i < N_LENGTHS; i++) {
        assert_int_equal(o_erase(r->peer, &r->schema, i), o_pieces(lengths[i]));
        assert_false(o_there(r->peer, &r->schema, i));
    }
    rig_stop(r, false);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
