/* cosine.c: cosine of two vectors in double (TokenSelect's Selection Cache test). */
#include "check.h"
#include "internal.h"
#include "isa.h"

kvc_status kvki_check_cosine(const kvk_cosine_args *a)
{
    return a->cos_p && (a->n == 0 || (a->a && a->b)) ? KVC_OK : KVC_INVALID;
}

static double cosine_of(double ab, double aa, double bb)
{
    return aa > 0 && bb > 0 ? ab / (sqrt(aa) * sqrt(bb)) : aa != aa || bb != bb ? NAN : 0;
}

kvc_status kvki_ref_cosine(const kvk_cosine_args *a)
{
    double ab = 0, aa = 0, bb = 0;

    for (size_t i = 0; i < a->n; i++) {
        ab += (double)a->a[i] * (double)a->b[i];
        aa += (double)a->a[i] * (double)a->a[i];
        bb += (double)a->b[i] * (double)a->b[i];
    }
    *a->cos_p = cosine_of(ab, aa, bb);
    return KVC_OK;
}

kvc_status kvki_fast_cosine(kvk_backend *be, const kvk_cosine_args *a)
{
    const kvki_isa *isa = be->isa;

    *a->cos_p = cosine_of(isa->dot_f64(a->a, a->b, a->n), isa->dot_f64(a->a, a->a, a->n),
                          isa->dot_f64(a->b, a->b, a->n));
    return KVC_OK;
}
