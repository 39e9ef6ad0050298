/*
 * kernels_few_test.c: which form attend takes, seen from below: the inner loops are those of the
 * best isa, counted on their way. The results of the forms have the same bits, so nothing but this
 * would notice a decode step that packs its keys, or that reads rows without asking for them first.
 */
#include "attend_support.h"
#include "internal.h"
#include "isa.h"

enum { KV_HEADS = 2, DIM = 64, N_KV = 3 * KVKI_ATTEND_KEYS + 5 };

static kvki_isa counted;
static const kvki_isa *real;
static uint32_t n_packed, n_few, n_asked;
static size_t few_at[64];          /* offset of K of each call, in the order of the calls */
static const void *few_row[64];    /* its first row */
static uint32_t asked_times[N_KV]; /* how often each row is in a list of what to ask for */
static const void *const *all_rows;

static void count_pack(const kvki_attend_pack *p)
{
    n_packed++;
    real->attend_pack(p);
}

static void count_few(const kvki_attend_pack *p, const kvki_attend_block *b, kvki_ahead *ahead)
{
    assert_true(n_few < 64);
    few_at[n_few] = p->k_off_bytes;
    few_row[n_few++] = p->rows[0];
    for (uint32_t i = 0; i < ahead->n; i++)
        asked_times[ahead->rows - all_rows + i]++;
    real->attend_few(p, b, ahead);
    if (ahead->n && ahead->row == ahead->n)
        n_asked += ahead->n;
}

static void attend(uint32_t n_q, uint32_t group, uint32_t dim, bool causal)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};
    problem_shape shape = {n_q, group * KV_HEADS, KV_HEADS, dim, N_KV, KVK_BF16, false, causal, 0};
    support_random random = support_seed(8);
    problem p = make_problem(&random, &shape);
    kvk_backend *be = NULL;

    n_packed = n_few = n_asked = 0;
    memset(asked_times, 0, sizeof(asked_times));
    all_rows = p.a.rows;
    assert_ok(kvk_backend_open("cpu", &opts, &be));
    real = be->isa;
    counted = *real;
    counted.attend_pack = count_pack;
    counted.attend_few = count_few;
    be->isa = &counted;
    assert_ok(kvk_backend_ops(be)->attend(be, &p.a, NULL));
    kvk_backend_close(be);
}

/* Nothing is packed, the heads of a block follow each other, rows are asked for once, a block
 * ahead. */
static void test_few_queries_read_rows_where_they_lie(void **state)
{
    (void)state;
    attend(1, 4, DIM, false);
    assert_int_equal(n_packed, 0);
    assert_int_equal(n_few, 4 * KV_HEADS);
    for (uint32_t i = 0; i < n_few; i++) {
        assert_ptr_equal(few_row[i], all_rows[i / KV_HEADS * KVKI_ATTEND_KEYS]);
        assert_int_equal(few_at[i] - few_at[0], i % KV_HEADS * DIM * 2);
    }
    for (uint32_t j = 0; j < N_KV; j++)
        assert_int_equal(asked_times[j], j >= KVKI_ATTEND_KEYS);
    assert_int_equal(n_asked, N_KV - KVKI_ATTEND_KEYS);
    free_all();
}

/* Many queries, those that see different keys, and widths that are not whole vectors are packed. */
static void test_others_are_packed(void **state)
{
    (void)state;
    attend(4, 4, DIM, false);
    assert_int_equal(n_few, 0);
    assert_true(n_packed > 0);
    attend(2, 2, DIM, true);
    assert_int_equal(n_few, 0);
    assert_true(n_packed > 0);
    attend(1, 4, 22, false);
    assert_int_equal(n_packed > 0, 22 % counted.lanes != 0);
    free_all();
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_few_queries_read_rows_where_they_lie),
        cmocka_unit_test(test_others_are_packed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
