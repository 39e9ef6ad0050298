/*
 * cuda_cases_rows.c: resolve against a plain model of what leaves a slot first, gather against the
 * source, encode against the table's.
 */
#include <math.h>
#include <string.h>

#include "cuda_cases.h"
#include "cuda_rig.h"

/* The step by which a slot's row counts as used: each time that it was picked again, up to three,
 * is four steps. */
static uint32_t counts_as(const model *m, uint32_t slot)
{
    return m->used[slot] == 0 ? 0 : m->used[slot] + 4 * (m->again[slot] < 3 ? m->again[slot] : 3);
}

/* Marks the n slots that count as used first, and not in this step. */
static void choose_victims(const model *m, uint32_t n, uint8_t *victim)
{
    while (n-- > 0) {
        uint32_t best = UINT32_MAX;
        for (uint32_t i = m->n_pinned; i < m->n_slots; i++) {
            if (!victim[i] && m->used[i] != m->step &&
                (best == UINT32_MAX || counts_as(m, i) < counts_as(m, best)))
                best = i;
        }
        REQUIRE(best != UINT32_MAX, "no slot");
        victim[best] = 1;
    }
}

/* One step of the model; fills list and fetch. */
static uint32_t model_step(model *m, const uint32_t *picks, uint32_t n, int32_t *list,
                           uint32_t *fetch)
{
    uint8_t *victim = host_bytes(m->n_slots);
    uint32_t n_misses = 0, slot = 0;

    m->step++;
    for (uint32_t i = 0; i < n; i++) {
        list[i] = picks[i] < m->n_positions ? m->slot_of[picks[i]] : -1;
        fetch[i] = list[i] < 0 && picks[i] < m->n_positions ? picks[i] : KVK_CUDA_RESIDENT;
        n_misses += fetch[i] != KVK_CUDA_RESIDENT;
        if (list[i] >= 0) {
            m->used[list[i]] = m->step;
            m->again[list[i]]++;
        }
    }
    choose_victims(m, n_misses, victim);
    for (uint32_t i = 0; i < n; i++) {
        if (fetch[i] == KVK_CUDA_RESIDENT)
            continue;
        while (!victim[slot])
            slot++;
        if (m->pos_of[slot] != UINT32_MAX)
            m->slot_of[m->pos_of[slot]] = -1;
        m->pos_of[slot] = picks[i];
        m->slot_of[picks[i]] = (int32_t)slot;
        m->used[slot] = m->step;
        m->again[slot] = 0;
        list[i] = (int32_t)slot++;
    }
    return n_misses;
}

static void resolve_steps(numbers *from, uint32_t k, uint32_t n_slots, uint32_t n_pinned,
                          uint32_t n_positions)
{
    enum { SEQS = 3, OFF = 5, STEPS = 12 };
    model m[SEQS];
    kvk_cuda_residency res[SEQS];
    uint32_t stride = k + OFF, n_picks[SEQS], *picks = host_bytes(SEQS * (size_t)k * 4);
    int32_t *list = host_bytes(stride * 4);
    uint32_t *fetch = host_bytes(stride * 4);
    kvk_cuda_resolve_args a = {.n_seqs = SEQS,
                               .k = k,
                               .n_slots = n_slots,
                               .n_pinned = n_pinned,
                               .list = device_bytes(SEQS * (size_t)stride * 4),
                               .fetch = device_bytes(SEQS * (size_t)stride * 4),
                               .stride = stride,
                               .off = OFF,
                               .n_list = device_bytes(SEQS * 4),
                               .n_misses = device_bytes(SEQS * 4)};

    for (int s = 0; s < SEQS; s++) {
        m[s] = model_of(n_positions, n_slots, n_pinned, 16);
        res[s] = m[s].res;
    }
    a.res = device_copy(res, sizeof(res));
    for (uint32_t t = 0; t < STEPS; t++) {
        for (uint32_t s = 0; s < SEQS; s++) {
            n_picks[s] = t == 3 ? 0 : t == 4 ? 1 : k - number_below(from, k / 2 + 1);
            distinct_positions(from, picks + s * k, n_picks[s],
                               t % 2 ? n_positions : n_positions / 3);
            if (t == 6 && n_picks[s])
                picks[s * k] = n_positions + s; /* not a position */
        }
        a.picks = device_copy(picks, SEQS * (size_t)k * 4);
        a.n_picks = device_copy(n_picks, sizeof(n_picks));
        OK(kvk_cuda_resolve(gpu(), &a, gpu_stream()));
        const int32_t *got_list = fetched(a.list, SEQS * (size_t)stride * 4);
        const uint32_t *got_fetch = fetched(a.fetch, SEQS * (size_t)stride * 4);
        const uint32_t *n_list = fetched(a.n_list, SEQS * 4);
        const uint32_t *n_misses = fetched(a.n_misses, SEQS * 4);
        for (uint32_t s = 0; s < SEQS; s++) {
            uint32_t misses = model_step(&m[s], picks + s * k, n_picks[s], list, fetch);
            size_t at = s * (size_t)stride + OFF;
            REQUIRE(n_list[s] == OFF + n_picks[s] && n_misses[s] == misses,
                    "step %u: %u listed, %u missing, wanted %u", t, n_list[s], n_misses[s], misses);
            REQUIRE(memcmp(got_list + at, list, n_picks[s] * 4u) == 0 &&
                        memcmp(got_fetch + at, fetch, n_picks[s] * 4u) == 0,
                    "step %u, seq %u, k %u: other slots than the model's", t, s, k);
            REQUIRE(
                memcmp(fetched(m[s].res.slot_of, n_positions * 4), m[s].slot_of, n_positions * 4) ==
                        0 &&
                    memcmp(fetched(m[s].res.pos_of, n_slots * 4), m[s].pos_of, n_slots * 4) == 0,
                "step %u: the tables differ", t);
        }
    }
    release_all();
}

void cuda_case_resolve(numbers *from)
{
    resolve_steps(from, 2048, 4096, 64, 60000);
    resolve_steps(from, 2048, 2048, 0, 60000);
    resolve_steps(from, 4096, 5000, 3, 30001);
    resolve_steps(from, 7, 9, 1, 40);
    resolve_steps(from, 1000, 70000, 5, 200000);
}

void cuda_case_gather(numbers *from)
{
    static const uint32_t widths[] = {16, 528, 4096, 9216};

    for (size_t w = 0; w < 4; w++) {
        enum { N = 700, SLOTS = 900 };
        uint32_t row = widths[w], n_list = N, *fetch = host_bytes(N * 4);
        int32_t *list = host_bytes(N * 4);
        context c = context_of(from, 1000, row);
        model m = model_of(1000, SLOTS, 0, row);
        uint8_t *want = fetched(m.res.slots, (size_t)SLOTS * row);
        for (uint32_t i = 0; i < N; i++) {
            list[i] = i % 50 == 7 ? -1 : (int32_t)(SLOTS - 1 - i);
            fetch[i] = i % 3 == 0    ? KVK_CUDA_RESIDENT
                       : i % 50 == 8 ? 100000 /* beyond the source */
                                     : number_below(from, 1000);
            if (list[i] >= 0 && fetch[i] < 1000)
                memcpy(want + (size_t)list[i] * row, c.rows + (size_t)fetch[i] * row, row);
        }
        kvk_cuda_gather_args a = {.n_seqs = 1,
                                  .stride = N,
                                  .list = device_copy(list, N * 4),
                                  .fetch = device_copy(fetch, N * 4),
                                  .n_list = device_copy(&n_list, 4),
                                  .res = device_copy(&m.res, sizeof(m.res)),
                                  .source = device_copy(&c.source, sizeof(c.source)),
                                  .row_bytes = row};
        OK(kvk_cuda_gather(gpu(), &a, gpu_stream()));
        REQUIRE(memcmp(fetched(m.res.slots, (size_t)SLOTS * row), want, (size_t)SLOTS * row) == 0,
                "rows of %u bytes", row);
        a.row_bytes = 8;
        REQUIRE(kvk_cuda_gather(gpu(), &a, gpu_stream()) == KVC_INVALID, "8 bytes");
        release_all();
    }
}

static void run_encode(numbers *from, uint32_t n, uint32_t heads, uint32_t dim, kvk_dtype dtype)
{
    size_t width = (size_t)heads * dim, slice = kvk_slice_bytes(dtype, heads, dim);
    uint32_t v_off = (uint32_t)(slice + 15) / 16 * 16, row = 2 * v_off;
    uint16_t *in[2] = {host_bytes(n * width * 2), host_bytes(n * width * 2)};
    uint8_t *want = host_bytes((size_t)n * row);
    kvk_cuda_encode_args a = {.n = n,
                              .n_heads = heads,
                              .head_dim = dim,
                              .dtype = dtype,
                              .row_bytes = row,
                              .v_off_bytes = v_off,
                              .out = device_bytes((size_t)n * row)};

    memset(want, 0xee, (size_t)n * row);
    for (uint32_t side = 0; side < 2; side++) {
        for (size_t i = 0; i < n * width; i++) /* sizes from tiny to huge, within a head too */
            in[side][i] = bf16_of(
                ldexpf(normal(from), (int)(i / width % 40 * 5) - 110 - (i % 3 == 0 ? 9 : 0)));
        memset(in[side], 0, dim * 2u); /* a zero head */
        CPU(false, encode, {in[side], width * 2, KVK_BF16}, n, heads, dim, dtype,
            want + side * v_off, row);
    }
    a.k = device_copy(in[0], n * width * 2);
    a.v = device_copy(in[1], n * width * 2);
    OK(kvk_cuda_fill(gpu(), a.out, 0xee, (size_t)n * row, gpu_stream()));
    OK(kvk_cuda_encode(gpu(), &a, gpu_stream()));
    REQUIRE(memcmp(fetched(a.out, (size_t)n * row), want, (size_t)n * row) == 0,
            "%u rows of %u heads of %u: other bytes than encode's", n, heads, dim);
    in[0][(n - 1) * width + 1] = 0x7f80; /* Inf: a NaN scale, and no other head is touched */
    upload((void *)(uintptr_t)a.k, in[0], n * width * 2);
    OK(kvk_cuda_encode(gpu(), &a, gpu_stream()));
    uint16_t scale = 0;
    uint8_t *last = want + (size_t)(n - 1) * row, *got = fetched(a.out, (size_t)n * row);
    memcpy(&scale, got + (size_t)(n - 1) * row + width, 2);
    REQUIRE(isnan(of_bf16(scale)), "the scale of a head with Inf is %g", (double)of_bf16(scale));
    memcpy(got + (size_t)(n - 1) * row, last, dim);
    memcpy(got + (size_t)(n - 1) * row + width, last + width, 2);
    REQUIRE(memcmp(got, want, (size_t)n * row) == 0, "an Inf reached other heads");
    release_all();
}

void cuda_case_encode(numbers *from)
{
    kvk_cuda_encode_args bad = {
        .n_heads = 2, .head_dim = 32, .dtype = KVK_I8_SCALED, .row_bytes = 160, .v_off_bytes = 80};

    for (int i = 0; i < 2; i++) {
        kvk_dtype dtype = i ? KVK_I8_SCALED : KVK_E4M3_SCALED;
        run_encode(from, 1, 8, 128, dtype);
        run_encode(from, 300, 8, 128, dtype);
        run_encode(from, 41, 3, 64, dtype);
        run_encode(from, 5, 1, 256, dtype);
        run_encode(from, 77, 5, 33, dtype);
    }
    OK(kvk_cuda_encode(gpu(), &bad, gpu_stream()));
    bad.row_bytes = 147;
    REQUIRE(kvk_cuda_encode(gpu(), &bad, gpu_stream()) == KVC_INVALID, "V leaves the row");
    bad.row_bytes = 160;
    bad.v_off_bytes = 60;
    REQUIRE(kvk_cuda_encode(gpu(), &bad, gpu_stream()) == KVC_INVALID, "V lies over K");
    bad.v_off_bytes = 80;
    bad.dtype = KVK_BF16;
    REQUIRE(kvk_cuda_encode(gpu(), &bad, gpu_stream()) == KVC_INVALID, "not a code");
    bad.dtype = KVK_I8_SCALED;
    bad.n = 1;
    REQUIRE(kvk_cuda_encode(gpu(), &bad, gpu_stream()) == KVC_INVALID, "no rows");
}
