/*
 * gpu_pins_test.c: which segments of dram a GPU reads in place, over a fake of kvk/cuda.h.
 *
 * One thread; the memory is this program's, in the table of base/lent.h where a case says so.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "base/metrics.h"
#include "fake_cuda.h"
#include "gpu_pins.h"

#define SEGMENT 4096u
#define EVER_NS (UINT64_C(1) << 60)

static uint8_t memory[4][SEGMENT];

typedef struct fixture {
    kvk_cuda *cuda;
    kvsi_gpu_pins pins;
    uint32_t n_found; /* by look */
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof(*f));
    assert_int_equal(kvk_cuda_open(0, &f->cuda), KVC_OK);
    assert_int_equal(kvc_lent_add(memory[0], SEGMENT), KVC_OK); /* before there are pins */
    kvsi_gpu_pins_init(&f->pins, f->cuda, 2 * SEGMENT, SEGMENT);
    assert_int_equal(kvc_lent_add(memory[1], SEGMENT), KVC_OK);
    assert_int_equal(kvc_lent_add(memory[2], SEGMENT), KVC_OK);
    fake_cuda_registers(KVC_OK);
    fake_cuda_before_unregister(NULL, NULL);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    fake_cuda_before_unregister(NULL, NULL);
    kvsi_gpu_pins_fini(&f->pins);
    for (uint32_t i = 0; i < 4; i++)
        kvc_lent_remove(memory[i]);
    kvk_cuda_close(f->cuda);
    int bad = fake_cuda_held() != 0 || kvc_metric_get(KVC_M_attend_gpu_pinned_bytes) != 0;
    free(f);
    return bad;
}

static const void *find(fixture *f, uint32_t number, bool *may_claim_p)
{
    return kvsi_gpu_pins_find(&f->pins, number, memory[number] + 100, may_claim_p);
}

static bool may_claim(fixture *f, uint32_t number)
{
    bool may;
    assert_null(find(f, number, &may));
    return may;
}

static bool claim(fixture *f, uint32_t number)
{
    return kvsi_gpu_pins_claim(&f->pins, number, memory[number], SEGMENT);
}

static void pin(fixture *f, uint32_t number)
{
    bool may;
    assert_true(may_claim(f, number));
    assert_true(claim(f, number));
    assert_false(may_claim(f, number));
    assert_int_equal(kvsi_gpu_pins_settle(&f->pins, number, true), KVC_OK);
    assert_non_null(find(f, number, &may));
    assert_false(may);
}

/* Who looks for rows is told whether a claim is worth the way, as long as there is room. */
static void within_the_limit(void **state)
{
    fixture *f = *state;
    bool may;
    fake_cuda_registers_at(2 * SEGMENT); /* rows are where the device has them */
    pin(f, 0);
    assert_ptr_equal(find(f, 0, &may), memory[2] + 100);
    assert_null(kvsi_gpu_pins_find(&f->pins, 0, memory[1], &may));
    fake_cuda_registers_at(0);
    pin(f, 1);
    assert_false(may_claim(f, 2));
    assert_false(claim(f, 2));
    assert_int_equal(kvc_metric_get(KVC_M_attend_gpu_pinned_bytes), 2 * SEGMENT);
    kvc_lent_remove(memory[0]);
    assert_true(may_claim(f, 2) && claim(f, 2));
    assert_int_equal(kvsi_gpu_pins_settle(&f->pins, 2, false), KVC_CANCELLED);
    pin(f, 2);
}

/* Of memory that the table of lent memory does not have, nobody would hear that it goes. */
static void what_is_not_lent_is_not_pinned(void **state)
{
    fixture *f = *state;
    uint32_t asked = fake_cuda_asked_to_register();
    assert_true(may_claim(f, 3));
    assert_false(claim(f, 3));
    assert_false(may_claim(f, 3)); /* it is asked for once */
    kvc_lent_remove(memory[0]);
    assert_false(claim(f, 0));
    assert_int_equal(fake_cuda_asked_to_register(), asked);
    pin(f, 1);
}

static void look(void *arg)
{
    fixture *f = arg;
    bool may;
    f->n_found += find(f, 0, &may) != NULL || may;
    f->n_found += find(f, 1, &may) == NULL;
    assert_false(claim(f, 0));
}

/* Nobody who looks for rows waits for an unregistration, and what leaves is not found. */
static void a_segment_goes(void **state)
{
    fixture *f = *state;
    pin(f, 0);
    pin(f, 1);
    fake_cuda_before_unregister(look, f);
    kvc_lent_remove(memory[0]);
    fake_cuda_before_unregister(NULL, NULL);
    assert_int_equal(f->n_found, 0);
    assert_int_equal(fake_cuda_held(), 1);
    assert_int_equal(kvc_metric_get(KVC_M_attend_gpu_pinned_bytes), SEGMENT);
    assert_int_equal(kvc_lent_add(memory[0], SEGMENT), KVC_OK);
    pin(f, 0);
}

/* Memory that cannot be locked now may be later; what a device does not take stays so. */
static void registrations_fail(void **state)
{
    fixture *f = *state;
    f->pins.rest_ns = EVER_NS;
    assert_true(claim(f, 0));
    fake_cuda_registers(KVC_NO_MEMORY);
    assert_int_equal(kvsi_gpu_pins_settle(&f->pins, 0, true), KVC_NO_MEMORY);
    assert_false(may_claim(f, 0) || claim(f, 0));
    assert_false(may_claim(f, 1) || claim(f, 1));
    f->pins.rest_until_ns = 1;
    assert_true(may_claim(f, 0) && claim(f, 0));
    fake_cuda_registers(KVC_UNSUPPORTED);
    assert_int_equal(kvsi_gpu_pins_settle(&f->pins, 0, true), KVC_UNSUPPORTED);
    fake_cuda_registers(KVC_OK);
    assert_false(may_claim(f, 0) || claim(f, 0));
    pin(f, 1);
    kvc_lent_remove(memory[0]); /* another segment has its number */
    assert_int_equal(kvc_lent_add(memory[0], SEGMENT), KVC_OK);
    pin(f, 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(within_the_limit),
        TEST(what_is_not_lent_is_not_pinned),
        TEST(a_segment_goes),
        TEST(registrations_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
