/*
 * kernels_conformance.c: every op of every backend, isa and thread count against the reference.
 * A new backend is covered by its registration, a new op by its case.
 */
#include "cases.h"

typedef void (*case_fn)(const subject *s, support_random *random);

typedef struct run {
    case_fn fn;
    uint64_t seed;
    size_t subjects;
} run;

static void run_case(const subject *s, void *arg)
{
    run *r = arg;
    support_random random = {r->seed};

    r->fn(s, &random);
    free_all();
    r->subjects++;
}

static void over_subjects(case_fn fn)
{
    run r = {fn, support_seed(11).state, 0};

    for_each_subject(run_case, &r);
    /* reference and portable, with each number of threads */
    assert_true(r.subjects >= (SUBJECT_THREADS_MIN == 1 ? 4 : 2));
}

#define TEST(op)                                                                                   \
    static void test_##op(void **state)                                                            \
    {                                                                                              \
        (void)state;                                                                               \
        over_subjects(case_##op);                                                                  \
    }
KVK_OPS(TEST)
#undef TEST

int main(void)
{
    static const struct CMUnitTest tests[] = {
#define ENTRY(op) cmocka_unit_test(test_##op),
        KVK_OPS(ENTRY)
#undef ENTRY
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
