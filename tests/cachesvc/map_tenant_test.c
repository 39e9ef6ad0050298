/*
 * map_tenant_test.c: which tenant a process of this host is, and that none maps another's bytes.
 *
 * One thread. The test's own user is the tenant alice over shm; bob comes over inproc, where a
 * client says who it is. As root the test is other users too.
 */
#include "map_rig.h"

#include "tenants.h"

#define BOB 50000u /* blocks from there on are his */

/* The rig's peer is alice; gives bob's. */
static h_peer *start_both(map_rig *r)
{
    static char tenants[64];
    char inproc[64];
    size_t used = strlen(r->h.listen);
    snprintf(inproc, sizeof(inproc), "inproc://map-tenants-%d", (int)getpid());
    snprintf(r->h.listen + used, sizeof(r->h.listen) - used, ",%s", inproc);
    snprintf(tenants, sizeof(tenants), "%u: alice, @4000000000:nobody", (unsigned)geteuid());
    r->h.settings.shm_tenants = tenants;
    h_server_start(&r->h);
    r->h.listen[used] = '\0';
    r->v.peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->v.peer, &r->schema), KVC_OK);
    h_peer *bob = h_connect(inproc, "bob");
    assert_int_equal(h_register(bob, &r->schema), KVC_OK);
    return bob;
}

static uint32_t put_some(map_rig *r, h_peer *peer, uint64_t first, uint32_t n)
{
    uint32_t n_good = 0;
    for (uint32_t b = 0; b < n; b++)
        if (h_put(peer, &r->schema, first + b, PART_IDS, 2, KVC_PROMISE_MEMORY) == KVC_OK)
            n_good += (peer->status[0] == KVC_OK) + (peer->status[1] == KVC_OK);
    return n_good;
}

/* Nothing that alice has mapped, pinned or not, has a row of bob's. */
static void assert_none_of_bobs(const view *v, uint8_t (*rows)[ROW_BYTES], uint32_t n)
{
    for (uint32_t id = 0; id < SEGMENTS; id++)
        for (uint64_t at = 0; v->segments[id] != NULL && at < v->len_bytes[id]; at += VALUE_BYTES)
            for (uint32_t i = 0; i < n; i++)
                assert_memory_not_equal(v->segments[id] + at, rows[i], ROW_BYTES);
}

/* The first rows of bob's blocks, as he reads them. */
static void read_first_rows(map_rig *r, h_peer *bob, uint32_t n, uint8_t (*rows)[ROW_BYTES])
{
    for (uint32_t i = 0; i < n; i++) {
        uint64_t context;
        uint32_t picks[1] = {0};
        assert_int_equal(h_open(bob, &r->schema, BOB + i, 1, 0, &context), KVC_OK);
        h_fetch_equal(bob, &r->schema, context, BOB + i, PART_IDS[0], picks, 1);
        memcpy(rows[i], bob->data, ROW_BYTES);
        assert_int_equal(h_close(bob, context), KVC_OK);
    }
}

static void nobody_maps_anothers_bytes(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    static uint8_t rows[16][ROW_BYTES];
    uint64_t context, bobs;
    uint32_t hits;
    h_peer *bob = start_both(r);
    assert_int_equal(put_some(r, bob, BOB, 16), 32);
    read_first_rows(r, bob, 16, rows);
    assert_int_equal(h_open(bob, &r->schema, BOB, 16, 0, &bobs), KVC_OK);
    /* By his handle, and by his digests. */
    assert_int_equal(call_map(v, bobs, 0, 0, 0), KVC_STALE_HANDLE);
    assert_int_equal(h_match(v->peer, &r->schema, BOB, 16, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 0);
    assert_int_equal(h_open(v->peer, &r->schema, BOB, 16, 0, &context), KVC_OK);
    assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
    for (uint32_t b = 0; b < 16; b++)
        assert_null(map_entry(v, b, b % 2));
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    /* Whatever either puts meanwhile: their segments are their own. */
    for (uint64_t round = 0; round < 30; round++) {
        uint64_t first = 100 + 8 * round;
        (void)put_some(r, v->peer, first, 8);
        (void)put_some(r, bob, BOB + 16 * (1 + round), 16);
        assert_int_equal(h_open(v->peer, &r->schema, first, 8, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        assert_int_equal(h_close(v->peer, context), KVC_OK);
        if (round % 3 > 0)
            map_release(v);
        (void)put_some(r, bob, BOB, 16); /* where they were evicted */
        assert_none_of_bobs(v, rows, 16);
    }
    assert_true(kvc_metric_get(KVC_M_mapped_segments) > 0);
    h_disconnect(bob);
}

/* What alice has mapped and lets go of is bob's to use. */
static void segments_given_back_go_to_others(void **state)
{
    map_rig *r = *state;
    view *v = &r->v;
    uint64_t context;
    uint32_t hits;
    r->h.settings.max_mapped_bytes = 7 * MIB;
    h_peer *bob = start_both(r);
    assert_int_equal(put_some(r, v->peer, 0, 112),
                     224); /* 7 of 8 segments, for h_put's two parts */
    for (uint64_t b = 0; b < 112; b += 16) {
        assert_int_equal(h_open(v->peer, &r->schema, b, 16, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        map_release(v);
    }
    assert_int_equal(kvc_metric_get(KVC_M_map_pins), 0);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), 7 * MIB);
    kvc_digest digests[112];
    kvc_request req = {.method = KVC_ERASE};
    for (uint32_t b = 0; b < 112; b++)
        digests[b] = h_digest(b);
    req.u.erase.schema = r->schema.digest;
    req.u.erase.digests = digests;
    req.u.erase.n_digests = 112;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
    /* Nothing is in them, but they are mapped: one segment is left to bob, for 16 blocks. */
    (void)put_some(r, bob, BOB, 64);
    assert_int_equal(h_match(bob, &r->schema, BOB, 64, PART_IDS, 2, &hits), KVC_OK);
    assert_true(hits <= 16);
    map_give_back(v);
    assert_int_equal(kvc_metric_get(KVC_M_mapped_bytes), 0);
    (void)put_some(r, bob, BOB, 64);
    assert_int_equal(h_match(bob, &r->schema, BOB, 64, PART_IDS, 2, &hits), KVC_OK);
    assert_int_equal(hits, 64);
    h_disconnect(bob);
}

static void lists_are_read_as_they_are_meant(void **state)
{
    (void)state;
    kvs_tenants *t = kvs_tenants_create(" 7:seven,@7: the group ,4294967295:last,@0:root:0");
    assert_non_null(t);
    assert_string_equal(kvs_tenants_find(t, 7, 7), "seven");
    assert_string_equal(kvs_tenants_find(t, 8, 7), "the group");
    assert_string_equal(kvs_tenants_find(t, 4294967295u, 7), "last");
    assert_string_equal(kvs_tenants_find(t, 9, 0), "root:0");
    assert_string_equal(kvs_tenants_find(t, 0, 9), "default");
    kvs_tenants_destroy(t);
    assert_true(kvs_tenants_check("") && kvs_tenants_check("1:a") && kvs_tenants_check("1:a,@1:b"));
    const char *bad[] = {"1",       "a:b",  "1:",    "1: ",  ":a",   "@:a",  "4294967296:a",
                         "1:a,1:b", "1:a;", "1:a,b", "1:\n", "-1:a", "@@1:a"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        if (kvs_tenants_check(bad[i]) != (i == 8)) /* ';' may be in a name */
            fail_msg("\"%s\"", bad[i]);
}

/* A process is who it was when it connected, by its user, else by its group. */
static void users_are_their_tenants(void **state)
{
    map_rig *r = *state;
    uint64_t context;
    uint32_t hits;
    const char *who[] = {"65534", "65533", "65532"};
    if (geteuid() != 0)
        skip(); /* only root can be another user */
    r->h.settings.shm_tenants = "65534:alice,@65533:alice";
    r->h.settings.shm_map_uids = "65534,65533,65532";
    map_start(r);
    assert_int_equal(chmod(r->dir, 0755), 0);
    assert_int_equal(chmod(r->h.listen + strlen("shm://"), 0666), 0);
    for (uint32_t i = 0; i < 3; i++) {
        view *v = calloc(1, sizeof(*v));
        uint32_t id = (uint32_t)strtoul(who[i], NULL, 10);
        v->peer = h_connect(r->h.listen, NULL);
        assert_int_equal(setegid(id), 0);
        assert_int_equal(seteuid(id), 0);
        kvc_status registered = h_register(v->peer, &r->schema);
        assert_int_equal(seteuid(0), 0);
        assert_int_equal(setegid(0), 0);
        assert_int_equal(registered, KVC_OK);
        if (i == 0)
            assert_int_equal(put_some(r, v->peer, 1, 2), 4);
        assert_int_equal(h_match(v->peer, &r->schema, 1, 2, PART_IDS, 2, &hits), KVC_OK);
        assert_int_equal(hits, i < 2 ? 2 : 0); /* the third is "default" */
        assert_int_equal(h_open(v->peer, &r->schema, 1, 2, 0, &context), KVC_OK);
        assert_int_equal(call_map(v, context, 0, 0, 0), KVC_OK);
        assert_true((map_entry(v, 1, 0) != NULL) == (i < 2));
        map_forget(v);
        h_disconnect(v->peer);
        free(v);
    }
}

int main(void)
{
#define CASE(fn) cmocka_unit_test_setup_teardown(fn, map_setup, map_teardown)
    const struct CMUnitTest tests[] = {
        CASE(nobody_maps_anothers_bytes),
        CASE(segments_given_back_go_to_others),
        cmocka_unit_test(lists_are_read_as_they_are_meant),
        CASE(users_are_their_tenants),
    };
    return cmocka_run_group_tests_name("map_tenant", tests, NULL, NULL);
}
