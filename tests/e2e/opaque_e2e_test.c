/*
 * opaque_e2e_test.c: the C library's opaque values against a real cachesvc: every length over
 * several channels, many at once, first put wins, room that is too small, and a restart.
 */
#include "store.h"

#include <signal.h>
#include <stdlib.h>

#include "base/clock.h"

#define MIB    (1u << 20)
#define N_MANY 60u

static const size_t lengths[] = {0, 1, 4032, 4033, MIB - 1, MIB, MIB + 1, 3 * MIB + 77, 5557453};
#define N (sizeof(lengths) / sizeof(lengths[0]))

typedef struct rig {
    store s;
    kvc_digest schema;
    kvc_region *region;
    uint8_t *memory;
    size_t memory_bytes;
    kvc_opaque_value values[N_MANY];
    int8_t status[N_MANY];
} rig;

static uint64_t soon(void)
{
    return kvc_deadline_ns(60000000000ull);
}

static void fill(uint8_t *bytes, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++)
        bytes[i] = (uint8_t)((i * 2654435761u >> 13) + seed * 37 + n);
}

static bool is_filled(const uint8_t *bytes, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++)
        if (bytes[i] != (uint8_t)((i * 2654435761u >> 13) + seed * 37 + n))
            return false;
    return true;
}

static int setup(void **state)
{
    rig *r = calloc(1, sizeof(*r));
    const kvc_schema schema = {
        .model = "m", .revision = "", .recipe = "engine", .tp_size = 1, .opaque = 1};
    assert_non_null(r);
    store_open(&r->s, "256MiB", true);
    assert_int_equal(kvc_schema_register(r->s.client, &schema, soon(), &r->schema), KVC_OK);
    r->memory_bytes = 64u * MIB;
    r->memory = malloc(r->memory_bytes);
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = r->memory,
                            .len_bytes = r->memory_bytes,
                            .kind = KVC_MEMORY_HOST};
    assert_int_equal(kvc_region_register(r->s.client, &desc, &r->region), KVC_OK);
    *state = r;
    return 0;
}

static int teardown(void **state)
{
    rig *r = *state;
    assert_int_equal(kvc_region_deregister(r->s.client, r->region), KVC_OK);
    store_close(&r->s);
    free(r->memory);
    free(r);
    return 0;
}

/* One value of each length, back to back, under keys that begin so. */
static void name_all(rig *r, char first)
{
    size_t at = 0;
    for (uint32_t i = 0; i < N; i++) {
        char key[3] = {first, 'k', (char)('a' + i)};
        r->values[i] = (kvc_opaque_value){.off_bytes = at, .len_bytes = lengths[i]};
        assert_int_equal(kvc_opaque_key(&r->schema, key, 3, &r->values[i].digest), KVC_OK);
        at += lengths[i] + 64;
    }
    assert_true(at <= r->memory_bytes);
}

/* Whether any of them is to be put again; the others are as wanted, or were put before. */
static bool put_once(rig *r, uint32_t n, kvc_promise promise, kvc_status wanted, bool again)
{
    kvc_op op;
    bool left = false;
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(kvc_opaque_put(r->s.client, &r->schema, promise, 0, r->values, n, r->region,
                                    r->status, soon(), &op),
                     KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    for (uint32_t i = 0; i < n; i++) {
        if (r->status[i] == KVC_AGAIN)
            left = true;
        else if (r->status[i] != wanted && !(again && r->status[i] == KVC_EXISTS))
            fail_msg("value %u: %s", i, kvc_status_name((kvc_status)r->status[i]));
    }
    return left;
}

/* A value that is being written to lmdb is AGAIN for a DURABLE put, so it may take some rounds. */
static void put_all(rig *r, uint32_t n, kvc_promise promise, kvc_status wanted)
{
    uint64_t until_ns = soon();
    for (bool again = false; put_once(r, n, promise, wanted, again); again = true)
        assert_true(kvc_now_ns() < until_ns);
}

static void get(rig *r, uint32_t n)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(
        kvc_opaque_get(r->s.client, &r->schema, r->values, n, r->region, r->status, soon(), &op),
        KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
}

static void get_all(rig *r, uint32_t seed)
{
    memset(r->memory, 0xee, r->memory_bytes);
    get(r, N);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(r->status[i], KVC_OK);
        assert_int_equal(r->values[i].len_bytes, lengths[i]);
        assert_true(is_filled(r->memory + r->values[i].off_bytes, lengths[i], seed));
        assert_int_equal(r->memory[r->values[i].off_bytes + lengths[i]], 0xee);
    }
}

static void fill_all(rig *r, uint32_t seed)
{
    for (uint32_t i = 0; i < N; i++)
        fill(r->memory + r->values[i].off_bytes, lengths[i], seed);
}

static void every_length(void **state)
{
    rig *r = *state;
    name_all(r, 'a');
    get(r, N);
    for (uint32_t i = 0; i < N; i++)
        assert_int_equal(r->status[i], KVC_NOT_FOUND);
    fill_all(r, 1);
    put_all(r, N, KVC_PROMISE_MEMORY, KVC_OK);
    get_all(r, 1);
    put_all(r, N, KVC_PROMISE_DURABLE, KVC_EXISTS);
    fill_all(r, 2);
    r->values[0].len_bytes = 5; /* not the empty value again */
    put_all(r, N, KVC_PROMISE_MEMORY, KVC_EXISTS);
    r->values[0].len_bytes = 0;
    get_all(r, 1);
}

static void too_little_room(void **state)
{
    rig *r = *state;
    name_all(r, 'b');
    fill_all(r, 3);
    put_all(r, N, KVC_PROMISE_MEMORY, KVC_OK);
    for (uint32_t i = 1; i < N; i += 2)
        r->values[i].len_bytes--;
    get(r, N);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(r->status[i], i % 2 ? KVC_NO_SPACE : KVC_OK);
        assert_int_equal(r->values[i].len_bytes, lengths[i]);
        if (i % 2 == 0)
            assert_true(is_filled(r->memory + r->values[i].off_bytes, lengths[i], 3));
    }
    r->values[0].off_bytes = r->memory_bytes + 1;
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(
        kvc_opaque_get(r->s.client, &r->schema, r->values, 1, r->region, r->status, soon(), &op),
        KVC_INVALID);
}

static void many_keys(void **state)
{
    rig *r = *state;
    const size_t len = 700000;
    kvc_digest digests[2 * N_MANY];
    uint8_t tiers[2 * N_MANY];
    kvc_op op;
    for (uint32_t i = 0; i < 2 * N_MANY; i++)
        assert_int_equal(kvc_opaque_key(&r->schema, &i, sizeof(i), &digests[i]), KVC_OK);
    for (uint32_t i = 0; i < N_MANY; i++) {
        r->values[i] =
            (kvc_opaque_value){.digest = digests[2 * i], .off_bytes = i * len, .len_bytes = len};
        fill(r->memory + i * len, len, i);
    }
    put_all(r, N_MANY, KVC_PROMISE_MEMORY, KVC_OK);
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(
        kvc_opaque_match(r->s.client, &r->schema, digests, 2 * N_MANY, tiers, soon(), &op), KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    for (uint32_t i = 0; i < 2 * N_MANY; i++)
        assert_int_equal(tiers[i], i % 2 ? 0 : KVC_TIER_DRAM);
    memset(r->memory, 0, N_MANY * len);
    get(r, N_MANY);
    for (uint32_t i = 0; i < N_MANY; i++) {
        assert_int_equal(r->status[i], KVC_OK);
        assert_true(is_filled(r->memory + i * len, len, i));
    }
}

static void keep_and_load(void **state)
{
    rig *r = *state;
    kvc_hold_info hold;
    kvc_prefetch_info loaded;
    kvc_digest digests[N];
    uint64_t bytes = 0;
    kvc_op op;
    name_all(r, 'd');
    fill_all(r, 5);
    put_all(r, N, KVC_PROMISE_MEMORY, KVC_OK);
    for (uint32_t i = 0; i < N; i++) {
        digests[i] = r->values[i].digest;
        bytes += lengths[i];
    }
    kvc_op_init(&op, NULL, NULL);
    assert_int_equal(
        kvc_hold_blocks(r->s.client, &r->schema, digests, N, 60000, &hold, soon(), &op), KVC_OK);
    memset(digests, 0, sizeof(digests)); /* they were borrowed */
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    assert_int_equal(hold.n_blocks, N);
    assert_int_equal(hold.ttl_ms, 60000);
    assert_true(hold.tenant_bytes >= bytes && hold.tenant_bytes <= hold.max_bytes);
    for (uint32_t i = 0; i < N; i++)
        digests[i] = r->values[i].digest;
    assert_int_equal(kvc_prefetch_blocks(r->s.client, &r->schema, digests, N, NULL, 0,
                                         KVC_TIER_DRAM, &loaded, soon(), &op),
                     KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    assert_true(loaded.there >= N && loaded.missing == 0);
    assert_int_equal(kvc_release(r->s.client, hold.hold, soon(), &op), KVC_OK);
    assert_int_equal(kvc_op_wait(&op, 0), KVC_OK);
    assert_int_equal(kvc_hold_blocks(r->s.client, &r->schema, digests, 0, 0, &hold, soon(), &op),
                     KVC_INVALID);
    assert_int_equal(kvc_prefetch_blocks(r->s.client, &r->schema, digests,
                                         kvc_client_limits(r->s.client)->max_digests + 1, NULL, 0,
                                         KVC_TIER_DRAM, &loaded, soon(), &op),
                     KVC_INVALID);
}

static void kill_and_restart(void **state)
{
    rig *r = *state;
    name_all(r, 'c');
    fill_all(r, 4);
    put_all(r, N, KVC_PROMISE_DURABLE, KVC_OK);
    store_end(&r->s, SIGKILL);
    store_start(&r->s);
    get_all(r, 4); /* the client registers the schema again where that is needed */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length),     cmocka_unit_test(too_little_room),
        cmocka_unit_test(many_keys),        cmocka_unit_test(keep_and_load),
        cmocka_unit_test(kill_and_restart),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
