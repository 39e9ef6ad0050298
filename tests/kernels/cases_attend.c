/* cases_attend.c: attend against the reference. */
#include "attend_support.h"
#include "cases.h"

static const problem_shape shapes[] = {
    {1, 1, 1, 1, 1, KVK_F32, false, false, 0},
    {3, 2, 1, 8, 0, KVK_F32, false, false, 0},
    {1, 9, 3, 64, 300, KVK_BF16, true, false, 0},
    {8, 9, 3, 64, 129, KVK_BF16, true, true, 0},
    {20, 9, 3, 64, 280, KVK_BF16, true, true, 0},
    {40, 4, 4, 22, 130, KVK_F16, true, true, 0},
    {5, 8, 1, 66, 257, KVK_F32, true, true, 30},
    {30, 6, 2, 128, 140, KVK_F32, false, true, 0},
    {2, 2, 2, 7, 50, KVK_I8, false, true, 0},
    {33, 32, 8, 128, 70, KVK_BF16, false, false, 50},
    {17, 2, 1, 64, 200, KVK_F32, false, true, 1}, /* logits around the cap */
    {60, 2, 1, 64, 20, KVK_BF16, true, true, 0},  /* the first queries see nothing */
    {3, 2, 1, 576, 40, KVK_BF16, true, false, 0},
    {2, 16, 16, 64, 5000, KVK_F16, true, true, 0},   /* keys of two runs */
    {1, 32, 8, 128, 300, KVK_BF16, false, false, 0}, /* few rows: straight from where they lie */
    {1, 7, 1, 64, 140, KVK_F16, true, false, 30},
    {1, 4, 2, 32, 130, KVK_I8, false, false, 0},
    {1, 32, 8, 128, 300, KVK_E4M3_SCALED, false, false, 0}, /* coded, few rows */
    {1, 9, 3, 64, 140, KVK_I8_SCALED, true, false, 30},
    {20, 9, 3, 64, 280, KVK_E4M3_SCALED, true, true, 0}, /* coded, packed */
    {33, 32, 8, 128, 70, KVK_I8_SCALED, false, false, 0},
    {5, 4, 2, 22, 130, KVK_E4M3_SCALED, true, true, 0},
};

static void compare(const subject *s, problem *p)
{
    size_t n_out = (size_t)p->a.n_q * p->a.n_q_heads;
    float *o = p->a.o, *lse = p->a.lse;
    float *want_o = get_floats(n_out * p->a.head_dim), *want_lse = get_floats(n_out);
    kvk_attend_args truth = p->a;

    truth.o = want_o;
    truth.lse = want_lse;
    assert_ok(s->ops->attend(s->be, &p->a, NULL));
    assert_ok(reference()->ops->attend(reference()->be, &truth, NULL));
    compare_attend(s, &p->a, o, lse, want_o, want_lse);
}

static void refuse_bad(const subject *s, support_random *random)
{
    problem_shape shape = {2, 4, 2, 8, 5, KVK_F32, true, true, 0};
    problem p = make_problem(random, &shape);
    const void *rows[5] = {p.a.rows[0], p.a.rows[1], NULL, p.a.rows[3], p.a.rows[4]};
    kvk_attend_args bad[9];

    for (size_t i = 0; i < 9; i++)
        bad[i] = p.a;
    bad[0].n_q_heads = 5;
    bad[1].n_kv_heads = 0;
    bad[2].head_dim = 0;
    bad[3].rows = rows;
    bad[4].dtype = (kvk_dtype)5;
    bad[5].o = NULL;
    bad[6].scale = NAN;
    bad[7].softcap = -1;
    bad[8].head_dim = 7; /* rotation of an odd head */
    for (size_t i = 0; i < 9; i++)
        assert_status(s->ops->attend(s->be, &bad[i], NULL), KVC_INVALID);
    p.visible[0] = 4;
    p.visible[1] = 3; /* falls */
    assert_status(s->ops->attend(s->be, &p.a, NULL), KVC_INVALID);
    p.visible[1] = 6; /* beyond n_kv */
    assert_status(s->ops->attend(s->be, &p.a, NULL), KVC_INVALID);
    for (size_t i = 0; i < 2 * 4 * 8; i++)
        assert_true(p.a.o[i] == 0);
    assert_status(s->ops->attend(s->be, &p.a, (kvk_stream *)(void *)&p), KVC_INVALID);
    assert_status(s->ops->attend(s->be, NULL, NULL), KVC_INVALID);
    p.a.n_q = 0;
    assert_ok(s->ops->attend(s->be, &p.a, NULL));
}

/* An Inf in a value, and a NaN key, behind what a query sees must not reach it. */
static void hide_specials(const subject *s, support_random *random)
{
    problem_shape shape = {20, 6, 2, 64, 150, KVK_F32, true, true, 0};
    problem p = make_problem(random, &shape);
    float *row = get_floats((size_t)2 * 2 * 64);

    fill_floats(random, row, (size_t)2 * 2 * 64);
    row[2 * 64 + 5] = INFINITY;
    row[3] = NAN;
    ((const void **)p.a.rows)[140] = row; /* seen by the last queries only */
    compare(s, &p);
    assert_false(isnan(p.a.o[0]));
    assert_true(isnan(p.a.o[(size_t)20 * 6 * 64 - 64 * 6])); /* the last query, head 0 */
}

/* What a coded row of two heads of 64 may come to hold that encode never writes. */
typedef enum odd_row { NAN_CODE, INF_SCALE, NAN_SCALE, NEGATIVE_SCALE, ODD_ROWS } odd_row;

static void make_odd(char *slice, odd_row odd)
{
    static const uint16_t scales[ODD_ROWS] = {0, 0x7f80, 0x7fc0, 0xbc00}; /* bf16 of head 0 */

    if (odd == NAN_CODE)
        slice[5] = 0x7f; /* the NaN of e4m3; 127 in int8 */
    else
        memcpy(slice + 2 * 64, &scales[odd], sizeof(scales[odd]));
}

/* Bits of the queries that do not see the odd row are those without it; others are as the
 * reference has them where those are finite, and not finite where it says so. */
static void compare_odd(const subject *s, problem *p, uint32_t at, const float *plain)
{
    size_t n = (size_t)p->a.n_q * p->a.n_q_heads, d = p->a.head_dim;
    float *want_o = get_floats(n * d), *want_lse = get_floats(n);
    kvk_attend_args truth = p->a;

    truth.o = want_o;
    truth.lse = want_lse;
    assert_ok(s->ops->attend(s->be, &p->a, NULL));
    assert_ok(reference()->ops->attend(reference()->be, &truth, NULL));
    for (size_t i = 0; i < n * d; i++) {
        bool sees = p->a.visible[i / d / p->a.n_q_heads] > at;
        if (!sees)
            assert_same_bits(s, "unseeing", (const char *)&p->a.o[i], (const char *)&plain[i],
                             sizeof(float));
        assert_true(sees || isfinite(p->a.o[i]));
        assert_int_equal(isfinite(p->a.o[i]) != 0, isfinite(want_o[i]) != 0);
    }
}

/* A coded row that encode did not write: its effect stays in the queries, and the heads, that see
 * it. n_q 20 is packed, 2 goes straight from the rows. */
static void odd_rows(const subject *s, support_random *random, uint32_t n_q, kvk_dtype dtype,
                     bool rope)
{
    problem_shape shape = {n_q, 4, 2, 64, 150, dtype, rope, true, 0};
    problem p = make_problem(random, &shape);
    size_t slice = kvk_slice_bytes(dtype, 2, 64), n = (size_t)n_q * 4 * 64;
    uint32_t at = 150 - n_q / 2; /* half of the queries see it */
    float *plain = get_floats(n);

    assert_ok(s->ops->attend(s->be, &p.a, NULL));
    memcpy(plain, p.a.o, n * sizeof(float));
    for (uint32_t i = 0; i < 2 * ODD_ROWS; i++) {
        char *row = get(2 * slice);
        const void *old = p.a.rows[at];
        memcpy(row, old, 2 * slice);
        make_odd(row + (i % 2) * slice, (odd_row)(i / 2)); /* of K, then of V */
        ((const void **)p.a.rows)[at] = row;
        compare_odd(s, &p, at, plain);
        ((const void **)p.a.rows)[at] = old;
    }
}

void case_attend(const subject *s, support_random *random)
{
    for (size_t t = 0; t < sizeof(shapes) / sizeof(shapes[0]); t++) {
        problem p = make_problem(random, &shapes[t]);
        compare(s, &p);
        free_all();
    }
    hide_specials(s, random);
    free_all();
    for (uint32_t i = 0; i < 8; i++) {
        odd_rows(s, random, i % 2 ? 2 : 20, i / 2 % 2 ? KVK_I8_SCALED : KVK_E4M3_SCALED, i / 4);
        free_all();
    }
    refuse_bad(s, random);
}
