/*
 * client_unit_test.c: the pure pieces: scatter against a plain model, the retry rules, the sizes
 * that the public header promises.
 */
#include "support.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"
#include "map.h"

static void test_sizes(void **state)
{
    (void)state;
    assert_int_equal(sizeof(kvc_op), 128);
    assert_true(sizeof(kvci_msg) <= 1024);
}

/* A program that was built with an older header passes a shorter struct, with anything behind it.
 */
static void test_older_structs(void **state)
{
    (void)state;
    const size_t first = offsetof(kvc_client_opts, sums), now = sizeof(kvc_client_opts);
    struct {
        kvc_client_opts opts;
        uint64_t behind[2];
    } callers;
    kvc_client_opts taken;
    memset(&callers, 0xa5, sizeof(callers));
    callers.opts.uris = "x";
    callers.opts.n_channels = 7;
    callers.opts.size_bytes = first;
    assert_true(kvci_take_sized(&taken, &callers, first, now));
    assert_int_equal(taken.n_channels, 7);
    assert_string_equal(taken.uris, "x");
    assert_int_equal(taken.sums, 0);
    callers.opts.size_bytes = now;
    assert_true(kvci_take_sized(&taken, &callers, first, now));
    assert_true(taken.sums == callers.opts.sums);
    const size_t wrong[] = {0, first - 8, first + 4, now + 8};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        callers.opts.size_bytes = wrong[i];
        assert_false(kvci_take_sized(&taken, &callers, first, now));
    }
}

/* Nothing that was added lies where an older struct ends in padding. */
static void test_structs_grow_at_their_ends(void **state)
{
    (void)state;
    const size_t word = sizeof(uint64_t);
    assert_int_equal(offsetof(kvc_client_opts, n_channels), 4 * word);
    assert_int_equal(offsetof(kvc_client_opts, sums), 5 * word);
    assert_int_equal(sizeof(kvc_client_opts), 7 * word);
    assert_int_equal(offsetof(kvc_map_opts, keep_ns), 4 * word);
    assert_int_equal(offsetof(kvc_map_opts, gpu_open), 5 * word);
    assert_int_equal(sizeof(kvc_map_opts), 7 * word);
    assert_int_equal(offsetof(kvc_server_stats, size_bytes), 0);
}

/* Cuts bytes into pieces of random length, some of them empty. */
static uint32_t cut_random(support_random *random, uint8_t *bytes, size_t len, struct iovec *iov)
{
    uint32_t n = 0;
    size_t off = 0;
    while (off < len) {
        size_t step = support_below(random, 4) == 0 ? support_below(random, 3)
                                                    : 1 + support_below(random, 200);
        if (step > len - off)
            step = len - off;
        iov[n++] = (struct iovec){.iov_base = bytes + off, .iov_len = step};
        off += step;
    }
    return n;
}

/* Random segments, slots, missing rows and pieces: every destination byte is as the model says. */
static void test_scatter_model(void **state)
{
    (void)state;
    enum { SEGS = 4, MAX_ROWS = 40, SLOTS = 64, MAX_ROW = 50 };
    support_random random = support_seed(3);
    for (int round = 0; round < 2000; round++) {
        static uint8_t dst[SEGS][SLOTS * MAX_ROW], wanted[SEGS][SLOTS * MAX_ROW];
        static uint8_t bytes[SEGS * MAX_ROWS * MAX_ROW];
        static struct iovec iov[2 * sizeof(bytes)];
        uint32_t slots[SEGS][MAX_ROWS], n_missing = 0, index = 0;
        kvc_missing_row missing[SEGS * MAX_ROWS];
        int8_t status[SEGS * MAX_ROWS], wanted_status[SEGS * MAX_ROWS];
        kvci_seg segs[SEGS];
        size_t len = 0;
        memset(dst, 1, sizeof(dst));
        memset(wanted, 1, sizeof(wanted));
        for (uint32_t s = 0; s < SEGS; s++) {
            uint32_t row_bytes = 1 + (uint32_t)support_below(&random, MAX_ROW);
            uint32_t n = (uint32_t)support_below(&random, MAX_ROWS + 1);
            uint32_t start = (uint32_t)support_below(&random, SLOTS - MAX_ROWS);
            bool own_slots = support_below(&random, 2) == 0;
            for (uint32_t i = 0; i < n; i++, index++) {
                slots[s][i] = own_slots ? (start + i * 13) % SLOTS : start + i;
                bool gone = support_below(&random, 6) == 0;
                wanted_status[index] = gone ? KVC_CORRUPT : KVC_OK;
                if (gone) {
                    missing[n_missing++] = (kvc_missing_row){.index = index, .status = KVC_CORRUPT};
                    continue;
                }
                support_fill(&random, bytes + len, row_bytes);
                memcpy(&wanted[s][slots[s][i] * row_bytes], bytes + len, row_bytes);
                len += row_bytes;
            }
            segs[s] = (kvci_seg){
                .base = dst[s],
                .slots = own_slots ? slots[s] : NULL,
                .first_slot = start,
                .n = n,
                .row_bytes = row_bytes,
            };
        }
        kvc_reply reply = {.method = KVC_FETCH_ROWS, .data = iov, .data_bytes = len};
        reply.n_data = cut_random(&random, bytes, len, iov);
        reply.u.fetch_rows.n_missing = n_missing;
        reply.u.fetch_rows.missing = missing;
        const char *why = NULL;
        assert_ok(kvci_scatter(NULL, segs, SEGS, &reply, status, &why));
        assert_memory_equal(dst, wanted, sizeof(dst));
        if (index > 0)
            assert_memory_equal(status, wanted_status, index);
    }
}

static void test_scatter_refuses(void **state)
{
    (void)state;
    uint8_t dst[40] = {0}, zero[40] = {0}, bytes[40];
    memset(bytes, 5, sizeof(bytes));
    kvci_seg seg = {.base = dst, .n = 4, .row_bytes = 10};
    kvc_missing_row missing[3] = {{1, KVC_NOT_FOUND}, {1, KVC_NOT_FOUND}, {2, KVC_NOT_FOUND}};
    struct iovec iov = {.iov_base = bytes, .iov_len = 40};
    kvc_reply reply = {.method = KVC_FETCH_ROWS, .data = &iov, .n_data = 1, .data_bytes = 39};
    const char *why = NULL;
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    assert_non_null(why);
    iov.iov_len = 39;
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    reply.data_bytes = 40; /* what it says and what is there differ */
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    reply.u.fetch_rows.missing = missing;
    reply.u.fetch_rows.n_missing = 2; /* twice the same */
    iov.iov_len = reply.data_bytes = 20;
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    missing[1].index = 4; /* beyond */
    iov.iov_len = reply.data_bytes = 30;
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    missing[1] = (kvc_missing_row){2, KVC_OK}; /* missing, but OK */
    iov.iov_len = reply.data_bytes = 20;
    assert_status(kvci_scatter(NULL, &seg, 1, &reply, NULL, &why), KVC_PROTOCOL);
    assert_memory_equal(dst, zero, sizeof(dst));
}

static void test_backoff(void **state)
{
    (void)state;
    uint64_t seed = 42;
    for (uint32_t failures = 1; failures < 40; failures++) {
        uint64_t full = failures < 6 ? 10ull << (failures - 1) : 200;
        if (full > 200)
            full = 200;
        for (int i = 0; i < 50; i++) {
            uint64_t pause = kvci_backoff_ns(failures, 10, 200, &seed);
            assert_true(pause >= full / 2 && pause <= full);
        }
    }
}

static void test_judge(void **state)
{
    (void)state;
    static kvc_client client;
    kvci_kind kind = {.name = "x", .names_schema = true};
    kvci_call call = {.client = &client, .kind = &kind};
    kvci_msg msg = {.call = &call};
    assert_int_equal(kvci_judge(&msg, KVC_OK), KVCI_FINISH);
    assert_int_equal(kvci_judge(&msg, KVC_AGAIN), KVCI_RETRY);
    assert_int_equal(kvci_judge(&msg, KVC_UNAVAILABLE), KVCI_RELINK);
    assert_int_equal(kvci_judge(&msg, KVC_CLOSED), KVCI_RELINK);
    assert_int_equal(kvci_judge(&msg, KVC_CANCELLED), KVCI_RELINK);
    assert_int_equal(kvci_judge(&msg, KVC_NOT_FOUND), KVCI_FINISH);
    client.n_schemas = 1;
    assert_int_equal(kvci_judge(&msg, KVC_NOT_FOUND), KVCI_RELINK);
    msg.reregistered = true;
    assert_int_equal(kvci_judge(&msg, KVC_NOT_FOUND), KVCI_FINISH);
    assert_int_equal(kvci_judge(&msg, KVC_STALE_HANDLE), KVCI_FINISH);
    msg.n_segs = 1;
    assert_int_equal(kvci_judge(&msg, KVC_STALE_HANDLE), KVCI_REOPEN);
    msg.reopens = KVCI_MAX_REOPENS;
    assert_int_equal(kvci_judge(&msg, KVC_STALE_HANDLE), KVCI_FINISH);
    assert_int_equal(kvci_judge(&msg, KVC_TIMED_OUT), KVCI_FINISH);
    call.once = true;
    assert_int_equal(kvci_judge(&msg, KVC_AGAIN), KVCI_FINISH);
}

static void test_error_ring(void **state)
{
    (void)state;
    uintptr_t first = kvci_error_store("first");
    kvci_error_load(first, KVC_IO);
    assert_string_equal(kvc_last_error(), "first");
    for (int i = 0; i < 64; i++)
        (void)kvci_error_store("other");
    kvci_error_load(first, KVC_IO);
    assert_string_equal(kvc_last_error(), "IO");
    kvci_error_load(0, KVC_CORRUPT);
    assert_string_equal(kvc_last_error(), "CORRUPT");
}

/* Memory is mapped only where its length is the one that the server says, for good. */
static void only_sealed_memory_of_the_right_length_is_mapped(void **state)
{
    (void)state;
    kvc_map_opts opts = {.size_bytes = sizeof(opts)};
    for (int sealed = 0; sealed < 2; sealed++) {
        int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        assert_int_equal(ftruncate(fd, 8192), 0);
        if (sealed)
            assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK), 0);
        assert_null(kvci_epoch_create(&opts, dup(fd), 8193));
        kvci_epoch *epoch = kvci_epoch_create(&opts, dup(fd), 8192);
        assert_int_equal(epoch != NULL, sealed);
        if (sealed) {
            assert_int_equal(kvci_epoch_add(epoch, 1, dup(fd), 12288), KVC_NO_MEMORY);
            assert_int_equal(kvci_epoch_add(epoch, 1, dup(fd), 8192), KVC_OK);
        }
        kvci_epoch_unref(epoch);
        assert_int_equal(close(fd), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_sealed_memory_of_the_right_length_is_mapped),
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_older_structs),
        cmocka_unit_test(test_structs_grow_at_their_ends),
        cmocka_unit_test(test_scatter_model),
        cmocka_unit_test(test_scatter_refuses),
        cmocka_unit_test(test_backoff),
        cmocka_unit_test(test_judge),
        cmocka_unit_test(test_error_ring),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
