/*
 * memory_test.c: the arena, and sums of rows and values.
 */
#include "support.h"

#include "base/arena.h"
#include "base/sum.h"

static void arena_keeps_its_bound(void **state)
{
    (void)state;
    kvc_arena arena;
    kvc_arena_init(&arena, 64);
    char *first = kvc_arena_alloc(&arena, 1), *second = kvc_arena_alloc(&arena, 33);
    assert_non_null(first);
    assert_non_null(second);
    assert_int_equal((uintptr_t)first % 16, 0);
    assert_int_equal((uintptr_t)second % 16, 0);
    assert_int_equal(arena.used_bytes, 64);
    assert_null(kvc_arena_alloc(&arena, 1));
    assert_null(kvc_arena_alloc(&arena, 0));
    kvc_arena_reset(&arena);
    assert_int_equal(arena.used_bytes, 0);
    assert_null(kvc_arena_alloc(&arena, 65));
    assert_null(kvc_arena_alloc(&arena, SIZE_MAX));
    assert_null(kvc_arena_calloc(&arena, SIZE_MAX / 16 + 2, 16));
    assert_null(kvc_arena_strndup(&arena, "x", SIZE_MAX));
    assert_non_null(kvc_arena_alloc(&arena, 64));
    kvc_arena_reset(&arena);
}

static void arena_pieces_do_not_overlap(void **state)
{
    (void)state;
    support_random random = support_seed(1);
    unsigned char *pieces[300];
    size_t sizes[300];
    kvc_arena arena;
    kvc_arena_init(&arena, SIZE_MAX);
    for (int i = 0; i < 300; i++) {
        sizes[i] = support_below(&random, 9000);
        pieces[i] = kvc_arena_alloc(&arena, sizes[i]);
        assert_non_null(pieces[i]);
        memset(pieces[i], i & 255, sizes[i]);
    }
    for (int i = 0; i < 300; i++) {
        for (size_t j = 0; j < sizes[i]; j++)
            assert_int_equal(pieces[i][j], i & 255);
    }
    kvc_arena_reset(&arena);
}

static void arena_copies_and_clears(void **state)
{
    (void)state;
    static const unsigned char zeros[800];
    kvc_arena arena;
    kvc_arena_init(&arena, 4096);
    char *text = kvc_arena_strndup(&arena, "abcdef", 3);
    assert_string_equal(text, "abc");
    assert_string_equal(kvc_arena_strndup(&arena, NULL, 0), "");
    memset(kvc_arena_alloc(&arena, 800), 255, 800);
    kvc_arena_reset(&arena);
    assert_memory_equal(kvc_arena_calloc(&arena, 100, 8), zeros, 800);
    kvc_arena_reset(&arena);
}

/* Known XXH3-64s, one for each way it treats lengths, whatever version the CPU gets; and one sum
 * for both widths. */
static void sums_are_xxh3(void **state)
{
    static const struct {
        size_t len_bytes;
        uint64_t sum;
    } known[] = {
        {100, 0x6dbb812cf19d012eull},
        {241, 0x541b19226f0052e8ull},
        {768, 0x37b03e920e9445efull},
        {4096, 0x5c722d9ceb6f9064ull},
    };
    unsigned char pattern[4096];
    (void)state;
    for (unsigned i = 0; i < sizeof(pattern); i++)
        pattern[i] = (unsigned char)(i * 7 + (i >> 8));
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        assert_true(kvc_value_sum(pattern, known[i].len_bytes) == known[i].sum);
    assert_true(kvc_value_sum("", 0) == 0x2d06800538d394c2ull);
    assert_true(kvc_pieces_sum(NULL, 0) == 0x2d06800538d394c2ull);
    for (size_t cut = 0; cut <= sizeof(pattern); cut += 131) { /* as one run of bytes */
        const struct iovec pieces[] = {
            {pattern, cut / 2}, {NULL, 0}, {pattern + cut / 2, sizeof(pattern) - cut / 2}};
        assert_true(kvc_pieces_sum(pieces, 3) == kvc_value_sum(pattern, sizeof(pattern)));
    }
    support_random random = support_seed(2);
    unsigned char rows[16 * 96];
    uint32_t sums[16];
    support_fill(&random, rows, sizeof(rows));
    kvc_row_sums(rows, 96, 16, sums);
    for (size_t i = 0; i < 16; i++) {
        assert_int_equal(sums[i], kvc_row_sum(rows + i * 96, 96));
        assert_int_equal(sums[i], (uint32_t)kvc_value_sum(rows + i * 96, 96));
        rows[i * 96 + 95] ^= 1;
        assert_int_not_equal(sums[i], kvc_row_sum(rows + i * 96, 96));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(arena_keeps_its_bound),
        cmocka_unit_test(arena_pieces_do_not_overlap),
        cmocka_unit_test(arena_copies_and_clears),
        cmocka_unit_test(sums_are_xxh3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
