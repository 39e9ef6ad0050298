/*
 * kernels_subjects.c: the backends under test; see kernels_support.h. Built like what is tested,
 * since a sanitizer decides which ones there are. Single-threaded.
 */
#include "kernels_support.h"

const subject *reference(void)
{
    static subject s;

    if (!s.be) {
        assert_ok(kvk_backend_open("reference", NULL, &s.be));
        s.ops = kvk_backend_ops(s.be);
        (void)snprintf(s.label, sizeof(s.label), "reference");
    }
    return &s;
}

static void try_subject(const char *name, const char *isa, uint32_t threads,
                        void (*fn)(const subject *s, void *arg), void *arg)
{
    kvk_backend_opts opts = {.size_bytes = sizeof(opts), .n_threads = threads, .isa = isa};
    subject s = {.be = NULL};
    kvc_status st = kvk_backend_open(name, &opts, &s.be);

    if (st == KVC_UNSUPPORTED || st == KVC_INVALID) /* not an isa of this backend or machine */
        return;
    assert_ok(st);
    s.ops = kvk_backend_ops(s.be);
    (void)snprintf(s.label, sizeof(s.label), "%s/%s/%u threads", name, kvk_backend_isa(s.be),
                   threads);
    fn(&s, arg);
    kvk_backend_close(s.be);
}

void for_each_subject(void (*fn)(const subject *s, void *arg), void *arg)
{
    static const char *const isas[] = {SUBJECT_ISAS};

    for (uint32_t b = 0; kvk_backend_name(b); b++) {
        for (size_t i = 0; i < sizeof(isas) / sizeof(isas[0]); i++) {
            for (uint32_t threads = SUBJECT_THREADS_MIN; threads <= 3; threads += 2)
                try_subject(kvk_backend_name(b), isas[i], threads, fn, arg);
        }
    }
}
