/* kernels_backend_test.c: the registry, opening and closing, and one backend used by many threads.
 */
#include <pthread.h>
#include <stdatomic.h>

#include "attend_support.h"

static void test_names(void **state)
{
    (void)state;
    assert_string_equal(kvk_backend_name(0), "reference");
    assert_string_equal(kvk_backend_name(1), "cpu");
    assert_null(kvk_backend_name(1000));
    assert_int_equal(kvk_dtype_bytes(KVK_F32), 4);
    assert_int_equal(kvk_dtype_bytes(KVK_BF16), 2);
    assert_int_equal(kvk_dtype_bytes((kvk_dtype)99), 0);
}

static void test_open_refuses(void **state)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .isa = "mmx"};
    kvk_backend *be = (kvk_backend *)(void *)&opts;

    (void)state;
    assert_status(kvk_backend_open("gpu", NULL, &be), KVC_INVALID);
    assert_null(be);
    assert_status(kvk_backend_open(NULL, NULL, &be), KVC_INVALID);
    assert_status(kvk_backend_open("cpu", &opts, &be), KVC_INVALID);
    assert_status(kvk_backend_open("cpu", &opts, NULL), KVC_INVALID);
    opts = (kvk_backend_opts){.size_bytes = 3};
    assert_status(kvk_backend_open("cpu", &opts, &be), KVC_INVALID);
    opts = (kvk_backend_opts){.size_bytes = sizeof(opts), .n_threads = 1000000};
    assert_status(kvk_backend_open("cpu", &opts, &be), KVC_INVALID);
    assert_null(be);
    kvk_backend_close(NULL);
}

static void test_open_best(void **state)
{
    kvk_backend *be = NULL;

    (void)state;
    assert_ok(kvk_backend_open("cpu", NULL, &be));
    assert_string_equal(kvk_backend_ops(be)->name, "cpu");
    print_message("best isa here: %s\n", kvk_backend_isa(be));
    kvk_backend_close(be);
}

/* Whether /proc/cpuinfo lists every one of these, which end with NULL. */
static bool cpu_has(const char *const *flags)
{
    static char line[1 << 14];
    FILE *f = fopen("/proc/cpuinfo", "re");
    bool found = false;

    while (f != NULL && !found && fgets(line, sizeof(line), f) != NULL)
        found = strncmp(line, "flags", 5) == 0;
    if (f != NULL)
        (void)fclose(f);
    line[strcspn(line, "\n")] = ' ';
    for (; found && *flags != NULL; flags++) {
        char word[32];
        (void)snprintf(word, sizeof(word), " %s ", *flags);
        found = strstr(line, word) != NULL;
    }
    return found;
}

/* What the kernel says this CPU has must open, else tests of that isa would pass by not running. */
static void test_every_isa_of_this_cpu_opens(void **state)
{
    static const struct {
        const char *name;
        const char *flags[9];
    } isas[] = {
        {"portable", {NULL}},
        {"avx2", {"avx2", "fma", "f16c", NULL}},
        {"avx512",
         {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
          NULL}},
        {"amx", {"avx512_vnni", "avx512bw", "amx_tile", "amx_int8", NULL}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof(isas) / sizeof(isas[0]); i++) {
        kvk_backend_opts opts = {.size_bytes = sizeof(opts), .isa = isas[i].name};
        kvk_backend *be = NULL;
        bool here = isas[i].flags[0] == NULL || cpu_has(isas[i].flags);
        assert_status(kvk_backend_open("cpu", &opts, &be), here ? KVC_OK : KVC_UNSUPPORTED);
        if (here)
            assert_string_equal(kvk_backend_isa(be), isas[i].name);
        kvk_backend_close(be);
    }
}

/* Angles that a backend keeps serve its first frequencies only, and give the bits of computed ones:
 * two models on one backend, in turns, against a backend of each one's own. */
static void test_two_models_share_a_backend(void **state)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 2};
    problem_shape shape = {3, 4, 2, 32, 200, KVK_F32, true, true, 0};
    support_random random = support_seed(5);
    subject shared = {.label = "shared"};

    (void)state;
    assert_ok(kvk_backend_open("cpu", &opts, &shared.be));
    shared.ops = kvk_backend_ops(shared.be);
    for (int turn = 0; turn < 4; turn++) {
        problem p = make_problem(&random, &shape);
        size_t n_out = (size_t)3 * 4;
        float *o = get_floats(n_out * 32), *lse = get_floats(n_out);
        double freq[16];
        int32_t positions[200];
        kvk_backend *own = NULL;
        for (int i = 0; i < 16; i++)
            freq[i] = 1.0 / (1.0 + (turn % 2 + 1) * i);
        for (int j = 0; j < 200; j++) /* the last turn: some beyond what is kept, one below 0 */
            positions[j] = turn == 3 ? 100 * j - 1 : 7 * (j % 50) + turn;
        p.a.inv_freq = freq;
        p.a.k_positions = positions;
        assert_ok(shared.ops->attend(shared.be, &p.a, NULL));
        memcpy(o, p.a.o, n_out * 32 * sizeof(float));
        memcpy(lse, p.a.lse, n_out * sizeof(float));
        assert_ok(kvk_backend_open("cpu", &opts, &own));
        assert_ok(kvk_backend_ops(own)->attend(own, &p.a, NULL));
        assert_same_bits(&shared, "o", o, p.a.o, n_out * 32 * sizeof(float));
        assert_same_bits(&shared, "lse", lse, p.a.lse, n_out * sizeof(float));
        kvk_backend_close(own);
    }
    kvk_backend_close(shared.be);
    free_all();
}

/* What the ops take from the system; the linker sends their calls of aligned_alloc here. */
static atomic_size_t taken_bytes;
void *__real_aligned_alloc(size_t align, size_t len_bytes);
void *__wrap_aligned_alloc(size_t align, size_t len_bytes);

void *__wrap_aligned_alloc(size_t align, size_t len_bytes)
{
    atomic_fetch_add(&taken_bytes, len_bytes);
    return __real_aligned_alloc(align, len_bytes);
}

/* One row named as often as a request may: what a call takes does not grow with it. Both cuts. */
static void test_attend_memory(void **state)
{
    enum { N_KV = 65536, D = 64, MOST_BYTES = 12 << 20 };
    static const uint32_t n_q[] = {7, 1};
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};
    problem_shape shape = {7, 8, 1, D, 1, KVK_BF16, true, false, 0};
    support_random random = support_seed(6);
    problem p = make_problem(&random, &shape);
    const void **rows = get(N_KV * sizeof(*rows));
    int32_t *positions = get(N_KV * sizeof(*positions));

    (void)state;
    for (size_t j = 0; j < N_KV; j++)
        rows[j] = p.a.rows[0];
    p.a.rows = rows;
    p.a.k_positions = positions;
    p.a.n_kv = N_KV;
    for (size_t i = 0; i < 2; i++) {
        subject s = {.label = "memory"};
        const char *row = (const char *)rows[0] + p.a.v_off_bytes;
        p.a.n_q = n_q[i];
        assert_ok(kvk_backend_open("cpu", &opts, &s.be));
        atomic_store(&taken_bytes, 0);
        assert_ok(kvk_backend_ops(s.be)->attend(s.be, &p.a, NULL));
        size_t taken = atomic_load(&taken_bytes);
        assert_true(taken > 0 && taken <= MOST_BYTES);
        for (size_t t = 0; t < D; t++) { /* the mean of equal values */
            double v = (double)decoded(row, KVK_BF16, t);
            assert_near(&s, "o", t, (double)p.a.o[t], v, 1e-4 * (1 + fabs(v)));
        }
        kvk_backend_close(s.be);
    }
    free_all();
}

typedef struct lender {
    char *memory;
    size_t len_bytes, most_bytes; /* the most that it lends */
    uint32_t n_taken, n_given;
} lender;

static void *lend(void *arg, size_t len_bytes)
{
    lender *l = arg;

    l->len_bytes = len_bytes;
    if (len_bytes > l->most_bytes)
        return NULL;
    l->n_taken++;
    l->memory = __real_aligned_alloc(64, (len_bytes + 63) / 64 * 64);
    return l->memory;
}

static void take_back(void *arg, void *memory)
{
    lender *l = arg;

    assert_ptr_equal(memory, l->memory);
    l->n_given++;
    free(memory);
}

/* Whoever brings the memory of calls sees all of it, and gets it back; without any, NO_MEMORY. */
static void test_borrowed_memory(void **state)
{
    problem_shape shape = {7, 8, 2, 64, 300, KVK_BF16, true, false, 0};
    support_random random = support_seed(7);
    problem p = make_problem(&random, &shape);
    size_t o_bytes = (size_t)7 * 8 * 64 * sizeof(float);
    subject s = {.label = "borrowed"};
    lender l = {.most_bytes = SIZE_MAX};
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 1};

    (void)state;
    assert_ok(kvk_backend_open("cpu", &opts, &s.be));
    assert_ok(kvk_backend_ops(s.be)->attend(s.be, &p.a, NULL));
    kvk_backend_close(s.be);
    float *o = get(o_bytes);
    memcpy(o, p.a.o, o_bytes);
    opts.memory = (kvk_memory){.take = lend, .arg = &l};
    assert_status(kvk_backend_open("cpu", &opts, &s.be), KVC_INVALID);
    opts.memory.give = take_back;
    assert_ok(kvk_backend_open("cpu", &opts, &s.be));
    atomic_store(&taken_bytes, 0);
    assert_ok(kvk_backend_ops(s.be)->attend(s.be, &p.a, NULL));
    assert_same_bits(&s, "o", p.a.o, o, o_bytes);
    assert_int_equal(atomic_load(&taken_bytes), 0);
    assert_true(l.n_taken > 0 && l.n_given == l.n_taken);
    l.most_bytes = l.len_bytes - 1;
    assert_status(kvk_backend_ops(s.be)->attend(s.be, &p.a, NULL), KVC_NO_MEMORY);
    assert_int_equal(l.n_given, l.n_taken);
    kvk_backend_close(s.be);
    free_all();
}

#define CALLERS 4
#define ROUNDS  20

typedef struct caller {
    const subject *s;
    kvk_attend_args a;
    float *o, *lse;
    uint32_t failures;
} caller;

static void *call_often(void *arg)
{
    caller *c = arg;

    c->a.o = c->o;
    c->a.lse = c->lse;
    for (int i = 0; i < ROUNDS; i++)
        c->failures += c->s->ops->attend(c->s->be, &c->a, NULL) != KVC_OK;
    return NULL;
}

/* Callers share the backend's threads or work alone; the bits are the same either way. */
static void test_many_callers(void **state)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = 3};
    problem_shape shape = {20, 9, 3, 64, 300, KVK_BF16, true, true, 0};
    support_random random = support_seed(3);
    subject s = {.label = "shared"};
    problem p = make_problem(&random, &shape);
    size_t n_out = (size_t)20 * 9;
    caller callers[CALLERS];
    pthread_t threads[CALLERS];

    (void)state;
    assert_ok(kvk_backend_open("cpu", &opts, &s.be));
    s.ops = kvk_backend_ops(s.be);
    assert_ok(s.ops->attend(s.be, &p.a, NULL));
    for (size_t i = 0; i < CALLERS; i++) {
        callers[i] = (caller){&s, p.a, get_floats(n_out * 64), get_floats(n_out), 0};
        assert_int_equal(pthread_create(&threads[i], NULL, call_often, &callers[i]), 0);
    }
    for (size_t i = 0; i < CALLERS; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(callers[i].failures, 0);
        assert_same_bits(&s, "o", callers[i].o, p.a.o, n_out * 64 * sizeof(float));
        assert_same_bits(&s, "lse", callers[i].lse, p.a.lse, n_out * sizeof(float));
    }
    kvk_backend_close(s.be);
    free_all();
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_open_refuses),
        cmocka_unit_test(test_open_best),
        cmocka_unit_test(test_every_isa_of_this_cpu_opens),
        cmocka_unit_test(test_two_models_share_a_backend),
        cmocka_unit_test(test_many_callers),
        cmocka_unit_test(test_attend_memory),
        cmocka_unit_test(test_borrowed_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
