/* fake_cuda_layers.c: kvk/cuda_layers.h without a GPU: the tests' oracle is the device. */
#include "cuda_layers_oracle.h"
#include "fake_cuda_internal.h"

#define FAKE_LAYER(name)                                                                           \
    kvc_status kvk_cuda_##name(kvk_cuda *cuda, const kvk_cuda_##name##_args *args,                 \
                               kvk_stream *stream)                                                 \
    {                                                                                              \
        (void)cuda;                                                                                \
        (void)stream;                                                                              \
        if (!fake_cuda_take_op())                                                                  \
            return KVC_UNSUPPORTED;                                                                \
        oracle_##name(args);                                                                       \
        return KVC_OK;                                                                             \
    }

FAKE_LAYER(embed)
FAKE_LAYER(rms_norm)
FAKE_LAYER(linear)
FAKE_LAYER(rotate)
FAKE_LAYER(local_attend)
