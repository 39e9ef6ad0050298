/*
 * fuzz_projection.c: any bytes through the reader of calibration artefacts.
 *
 * Besides what the sanitizers see: a file that is taken has matrices of the sizes it says, all
 * finite; one that is not taken leaves nothing behind and says why.
 */
#include "fuzz.h"

#include <math.h>
#include <stddef.h>

#include "projection.h"

static void require(int holds)
{
    if (!holds)
        __builtin_trap();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    kvwi_projection *p = NULL;
    const char *why = NULL;
    kvc_status status = kvwi_projection_parse(data, size, &p, &why);
    require((status == KVC_OK) == (p != NULL));
    require(status == KVC_OK || why != NULL);
    if (p == NULL)
        return 0;
    size_t n = (size_t)p->n_layers * p->heads * p->d_in * p->dims;
    require(2 * n * sizeof(float) < size);
    for (size_t i = 0; i < n; i++)
        require(isfinite(p->a[i]) && isfinite(p->b[i]));
    kvwi_projection_free(p);
    return 0;
}
