/*
 * cuda_layers_bench.c: the layer ops of kvk/cuda_layers.h on a GPU, at the sizes of the GCA
 * example's decoder in passes of 16,384 tokens: time, multiply-adds and bytes a second, and what
 * all of a token's ops take together. Medians over batches of launches. Argument: --quick (a small
 * pass, a smoke test). Single-threaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_support.h"
#include "kvk/cuda_layers.h"

enum { H = 128, MLP = 256, HEADS = 4, WINDOW = 128, CHUNK = 64, TAPS = 8, BATCH = 20, REPEATS = 9 };

typedef struct world {
    uint32_t n;
    float *x, *wide, *out, *weight, *small;
    uint32_t *tokens;
} world;

typedef void launch(const world *w);

static void embed(const world *w)
{
    const kvk_cuda_embed_args a = {.tokens = w->tokens,
                                   .n = w->n,
                                   .n_taps = TAPS,
                                   .vocab = 256,
                                   .dim = H,
                                   .table = w->weight,
                                   .taps = w->small,
                                   .out = w->out};
    OK(kvk_cuda_embed(gpu(), &a, gpu_stream()));
}

static void norm(const world *w)
{
    const kvk_cuda_rms_norm_args a = {
        .x = w->x, .n = w->n, .dim = H, .stride = H, .weight = w->small, .out = w->out};
    OK(kvk_cuda_rms_norm(gpu(), &a, gpu_stream()));
}

static void linear(const world *w, const float *in, uint32_t n_in, uint32_t n_out,
                   kvk_cuda_linear_form form)
{
    const kvk_cuda_linear_args a = {.in = in,
                                    .n = w->n,
                                    .n_in = n_in,
                                    .n_out = n_out,
                                    .weight = w->weight,
                                    .form = form,
                                    .out = w->out};
    OK(kvk_cuda_linear(gpu(), &a, gpu_stream()));
}

static void linear_qkv(const world *w)
{
    linear(w, w->x, H, 3 * H, KVK_CUDA_STORE);
}

static void linear_square(const world *w)
{
    linear(w, w->x, H, H, KVK_CUDA_ADD);
}

static void linear_up(const world *w)
{
    linear(w, w->x, H, MLP, KVK_CUDA_GELU);
}

static void linear_down(const world *w)
{
    linear(w, w->wide, MLP, H, KVK_CUDA_ADD);
}

static void rotate(const world *w)
{
    const kvk_cuda_rotate_args a = {.x = w->wide,
                                    .n = w->n,
                                    .stride = 3 * H,
                                    .n_heads = 2 * HEADS,
                                    .head_dim = H / HEADS,
                                    .period = CHUNK,
                                    .cos = w->small,
                                    .sin = w->small};
    OK(kvk_cuda_rotate(gpu(), &a, gpu_stream()));
}

static void attend(const world *w, uint32_t window)
{
    const kvk_cuda_local_attend_args a = {.q = w->wide,
                                          .k = w->wide + H,
                                          .v = w->wide + 2 * H,
                                          .n = w->n,
                                          .n_keys = w->n,
                                          .n_heads = HEADS,
                                          .head_dim = H / HEADS,
                                          .q_stride = 3 * H,
                                          .kv_stride = 3 * H,
                                          .window = window,
                                          .chunk = CHUNK,
                                          .slopes = w->small,
                                          .scale = 0.177f,
                                          .out = w->out};
    OK(kvk_cuda_local_attend(gpu(), &a, gpu_stream()));
}

static void attend_window(const world *w)
{
    attend(w, WINDOW);
}

static void attend_chunks(const world *w)
{
    attend(w, 0);
}

/* An op, how often a token of the body goes through it, and what it takes of a row at least. */
typedef struct op {
    const char *name;
    launch *fn;
    uint32_t times;
    double mul_adds, bytes;
} op;

static const op ops[] = {
    {"embed", embed, 1, (TAPS + 1) * H, 4.0 * H},
    {"rms_norm", norm, 7, 2 * H, 8.0 * H},
    {"linear 128 x 384", linear_qkv, 3, 3.0 * H *H, 16.0 * H},
    {"linear 128 x 128 add", linear_square, 5, (double)H *H, 12.0 * H},
    {"linear 128 x 256 gelu", linear_up, 3, (double)H *MLP, 4.0 * (H + MLP)},
    {"linear 256 x 128 add", linear_down, 3, (double)H *MLP, 4.0 * (2 * H + MLP)},
    {"rotate", rotate, 1, 4.0 * H, 16.0 * H},
    {"attend window 128", attend_window, 2, 2.0 * H *WINDOW, 16.0 * H},
    {"attend chunks of 64", attend_chunks, 1, 2.0 * H *CHUNK, 16.0 * H},
};

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Of one launch, in microseconds. */
static double time_of(const world *w, launch *fn)
{
    kvk_cuda_event *from = NULL, *to = NULL;
    float ms[REPEATS];
    OK(kvk_cuda_event_create(gpu(), &from));
    OK(kvk_cuda_event_create(gpu(), &to));
    fn(w);
    for (size_t i = 0; i < REPEATS; i++) {
        OK(kvk_cuda_event_record(gpu(), from, gpu_stream()));
        for (size_t j = 0; j < BATCH; j++)
            fn(w);
        OK(kvk_cuda_event_record(gpu(), to, gpu_stream()));
        gpu_sync();
        OK(kvk_cuda_event_elapsed(gpu(), from, to, &ms[i]));
    }
    kvk_cuda_event_destroy(gpu(), from);
    kvk_cuda_event_destroy(gpu(), to);
    qsort(ms, REPEATS, sizeof(ms[0]), by_value);
    return (double)ms[REPEATS / 2] * 1e3 / BATCH;
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    world w = {.n = quick ? 1024 : 16384};
    numbers from = {7};
    size_t rows = (size_t)w.n * 3 * H;
    double total_us = 0, mul_adds = 0;
    w.x = device_copy(normals(&from, rows), rows * sizeof(float));
    w.wide = device_copy(normals(&from, rows), rows * sizeof(float));
    w.out = device_bytes(rows * sizeof(float));
    w.weight = device_copy(normals(&from, (size_t)3 * H * H), sizeof(float) * 3 * H * H);
    w.small = device_copy(normals(&from, (size_t)CHUNK * H), sizeof(float) * CHUNK * H);
    uint32_t *tokens = host_bytes(w.n * sizeof(*tokens));
    for (size_t i = 0; i < w.n; i++)
        tokens[i] = number_below(&from, 256);
    w.tokens = device_copy(tokens, w.n * sizeof(*tokens));
    printf("%-22s %8s %8s %8s %5s\n", "op", "us", "TFLOP/s", "GB/s", "times");
    for (size_t i = 0; i < sizeof(ops) / sizeof(ops[0]); i++) {
        const op *o = &ops[i];
        double us = time_of(&w, o->fn);
        printf("%-22s %8.1f %8.2f %8.0f %5u\n", o->name, us, 2 * o->mul_adds * w.n / us / 1e6,
               o->bytes * w.n / us / 1e3, o->times);
        total_us += us * o->times;
        mul_adds += o->mul_adds * o->times;
    }
    printf("a pass of %u tokens: %.0f us, %.1f M tokens/s, %.2f TFLOP/s\n", w.n, total_us,
           w.n / total_us, 2 * mul_adds * w.n / total_us / 1e6);
    release_all();
    return 0;
}
