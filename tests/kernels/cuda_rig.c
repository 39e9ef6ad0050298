/* cuda_rig.c: see cuda_rig.h. */
#include "cuda_rig.h"

#include <string.h>

model model_of(uint32_t n_positions, uint32_t n_slots, uint32_t n_pinned, size_t row_bytes)
{
    model m = {.n_positions = n_positions, .n_slots = n_slots, .n_pinned = n_pinned};
    uint32_t zero = 0;

    m.slot_of = host_bytes(n_positions * 4);
    m.pos_of = host_bytes(n_slots * 4);
    m.used = host_bytes(n_slots * 4);
    m.again = host_bytes(n_slots * 4);
    memset(m.slot_of, 0xff, n_positions * 4);
    memset(m.pos_of, 0xff, n_slots * 4);
    for (uint32_t i = 0; i < n_pinned; i++) {
        m.slot_of[i] = (int32_t)i;
        m.pos_of[i] = i;
    }
    m.res = (kvk_cuda_residency){.slots = device_bytes(n_slots * row_bytes),
                                 .slot_of = device_copy(m.slot_of, n_positions * 4),
                                 .pos_of = device_copy(m.pos_of, n_slots * 4),
                                 .used = device_copy(m.used, n_slots * 4),
                                 .step = device_copy(&zero, 4),
                                 .n_positions = n_positions};
    return m;
}

void distinct_positions(numbers *from, uint32_t *picks, uint32_t n, uint32_t below)
{
    uint8_t *seen = host_bytes(below);

    for (uint32_t i = 0; i < n;) {
        uint32_t position = number_below(from, below);
        if (!seen[position]++)
            picks[i++] = position;
    }
}

static context empty_context(uint32_t n, uint32_t row_bytes)
{
    context c = {.n = n, .block_tokens = 100, .row_bytes = row_bytes};
    const void **blocks = host_bytes((n / 100 + 1) * sizeof(*blocks));

    c.rows = pinned_bytes((size_t)n * row_bytes);
    for (uint32_t b = 0; b * 100 < n; b++)
        blocks[b] = c.rows + (size_t)b * 100 * row_bytes;
    c.source = (kvk_cuda_source){device_copy(blocks, (n / 100 + 1) * sizeof(*blocks)),
                                 (n + 99) / 100, 100};
    return c;
}

context context_of(numbers *from, uint32_t n, uint32_t row_bytes)
{
    context c = empty_context(n, row_bytes);

    for (size_t i = 0; i < (size_t)n * row_bytes / 2; i++) {
        uint16_t bits = bf16_of(normal(from));
        memcpy(c.rows + 2 * i, &bits, 2);
    }
    return c;
}

context kv_context_of(numbers *from, uint32_t n, uint32_t kv_heads, uint32_t dim, kvk_dtype dtype)
{
    uint32_t width = kv_heads * dim, v_off = (uint32_t)kvk_slice_bytes(dtype, kv_heads, dim);
    context c = empty_context(n, 2 * ((v_off + 15) / 16 * 16));

    c.v_off_bytes = c.row_bytes / 2;
    for (uint32_t side = 0; side < 2; side++) {
        uint8_t *out = c.rows + side * c.v_off_bytes;
        float *x = normals(from, (size_t)n * width);
        if (kvk_is_coded(dtype)) {
            CPU(true, encode, {x, width * 4u, KVK_F32}, n, kv_heads, dim, dtype, out, c.row_bytes);
            continue;
        }
        for (uint32_t i = 0; i < n; i++)
            kvk_from_f32(x + (size_t)i * width, width, dtype, out + (size_t)i * c.row_bytes);
    }
    return c;
}
