/*
 * score_i8_amx.h: score_i8 with AMX tiles: 16 query rows by 16 keys by 64 dims.
 *
 * A query value of 16 bits is 256 high + low, high signed and low unsigned, so a dot is 256 times a
 * signed by signed tile product plus an unsigned by signed one, all exact in int32. Keys are turned
 * into the B layout (four bytes of each of 16 keys to a row) once per run of AMX_KEYS and serve all
 * queries. Included by score_i8.h only. The kernel's permission to use tiles is asked for in isa.c.
 */
#define AMX_ROWS_MIN 12u
#define AMX_KEYS     256u
#define AMX_STEPS    (KVKI_I8_DIM_MAX / 64u)

typedef struct amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_config;

/* A run of keys as B tiles [n / 16][steps][16][64], and their scales. */
typedef struct amx_keys {
    _Alignas(64) int8_t b[AMX_KEYS * KVKI_I8_DIM_MAX];
    _Alignas(64) float scale[AMX_KEYS];
} amx_keys;

/* 16 query rows, high and low bytes [steps][16][64]. */
typedef struct amx_queries {
    _Alignas(64) int8_t high[AMX_STEPS][16][64];
    _Alignas(64) uint8_t low[AMX_STEPS][16][64];
} amx_queries;

static void amx_pack_keys(const kvki_score_i8 *s, size_t j0, size_t n, uint32_t steps, amx_keys *k)
{
    for (size_t j = 0; j < (n + 15) / 16 * 16; j++)
        k->scale[j] = j < n ? i8_scale(s, j0 + j) : 0;
    for (size_t tile = 0; tile < (n + 15) / 16; tile++) {
        for (uint32_t step = 0; step < steps; step++) {
            uint32_t left = s->dim - step * 64;
            __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
            int8_t *to = k->b + (tile * steps + step) * 1024;
            vf x[16];
            for (size_t t = 0; t < 16; t++) {
                size_t row = tile * 16 + t < n ? j0 + tile * 16 + t : j0 + n - 1;
                const char *from = s->index + row * s->stride_bytes + s->v_off_bytes + step * 64;
                x[t] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, from));
            }
            vf_transpose(x);
            for (size_t t = 0; t < 16; t++)
                _mm512_store_si512(to + t * 64, _mm512_castps_si512(x[t]));
        }
    }
}

/* Rows beyond n_rows repeat the last one; their scores are not stored. */
static void amx_split_queries(const kvki_score_i8 *s, size_t r, uint32_t steps, amx_queries *q)
{
    for (size_t t = 0; t < 16; t++) {
        size_t row = i8_row(s, r + t < s->n_rows ? r + t : s->n_rows - 1);
        for (size_t at = 0; at < (size_t)steps * 64; at += 32) {
            __m512i x = _mm512_loadu_si512(s->q + row * s->q_stride + at);
            __m256i high = _mm512_cvtepi16_epi8(_mm512_srai_epi16(x, 8));
            __m256i low = _mm512_cvtepi16_epi8(x);
            _mm256_store_si256((__m256i *)(void *)&q->high[at / 64][t][at % 64], high);
            _mm256_store_si256((__m256i *)(void *)&q->low[at / 64][t][at % 64], low);
        }
    }
}

/* Sums of one 16 x 16 tile to scores; n keys of it are there. */
static void amx_finish(const kvki_score_i8 *s, size_t r, size_t j, size_t n, const int32_t *high,
                       const int32_t *low, vf scale)
{
    size_t rows = s->n_rows - r < 16 ? s->n_rows - r : 16;

    for (size_t t = 0; t < rows; t++) {
        size_t row = i8_row(s, r + t);
        float *out = s->out + row * s->out_stride + j;
        __m512i sum = _mm512_slli_epi32(_mm512_load_si512(high + t * 16), 8);
        vf x = _mm512_cvtepi32_ps(_mm512_add_epi32(sum, _mm512_load_si512(low + t * 16)));
        x = vf_mul(vf_mul(x, scale), vf_set1(s->q_scale[row]));
        if (n >= 16)
            vf_store(out, x);
        else
            vf_store_n(out, x, n);
    }
}

/* 16 queries against the run of keys, two key tiles at a time. */
static void amx_rows(const kvki_score_i8 *s, size_t r, size_t j0, size_t n, uint32_t steps,
                     const amx_queries *q, const amx_keys *k)
{
    _Alignas(64) int32_t sums[4][256];

    for (size_t j = 0; j < n; j += 32) {
        const int8_t *b0 = k->b + j / 16 * steps * 1024;
        bool pair = j + 16 < n;
        const int8_t *b1 = pair ? b0 + steps * 1024 : b0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (uint32_t step = 0; step < steps; step++) {
            _tile_loadd(4, q->high[step], 64);
            _tile_loadd(5, q->low[step], 64);
            _tile_loadd(6, b0 + step * 1024, 64);
            _tile_loadd(7, b1 + step * 1024, 64);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbusd(1, 5, 6);
            _tile_dpbssd(2, 4, 7);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        amx_finish(s, r, j0 + j, n - j, sums[0], sums[1], vf_load(k->scale + j));
        if (pair)
            amx_finish(s, r, j0 + j + 16, n - j - 16, sums[2], sums[3], vf_load(k->scale + j + 16));
    }
}

static void score_i8_amx(const kvki_score_i8 *s)
{
    uint32_t steps = (s->dim + 63) / 64;
    amx_config config = {.palette = 1};
    amx_keys keys;
    amx_queries queries;

    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    _tile_loadconfig(&config);
    for (size_t j = 0; j < s->n; j += AMX_KEYS) {
        size_t n = s->n - j < AMX_KEYS ? s->n - j : AMX_KEYS;
        amx_pack_keys(s, j, n, steps, &keys);
        for (size_t r = 0; r < s->n_rows; r += 16) {
            amx_split_queries(s, r, steps, &queries);
            amx_rows(s, r, j, n, steps, &queries, &keys);
        }
    }
    _tile_release(); /* tiles left in use make every context switch dearer */
}
