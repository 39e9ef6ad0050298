/*
 * attend_rig.c: see attend_rig.h.
 */
#include "attend_rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

const a_shape a_plain = {.n_q = 1,
                         .n_q_heads = 8,
                         .kv_heads = 2,
                         .dim = 64,
                         .dtype = KVC_DTYPE_BF16,
                         .q_dtype = KVC_DTYPE_BF16,
                         .o_dtype = KVC_DTYPE_F32,
                         .rope = KVC_ROPE_PLAIN,
                         .n_picks = 300};

/* ---- numbers --------------------------------------------------------------------------------- */

/* Rows of one-byte values and a scale for each head. */
static bool coded(kvc_dtype dtype)
{
    return dtype == KVC_DTYPE_I8 || dtype == KVC_DTYPE_E4M3;
}

static uint32_t size_of(kvc_dtype dtype)
{
    return coded(dtype) ? 1 : dtype == KVC_DTYPE_F32 ? 4 : 2;
}

static double read_number(kvc_dtype dtype, const char *at)
{
    uint16_t half;
    float x;
    if (dtype == KVC_DTYPE_F32) {
        memcpy(&x, at, sizeof(x));
        return (double)x;
    }
    memcpy(&half, at, sizeof(half));
    if (dtype == KVC_DTYPE_BF16) {
        uint32_t u = (uint32_t)half << 16;
        memcpy(&x, &u, sizeof(x));
        return (double)x;
    }
    int exponent = half >> 10 & 31;
    double m = exponent ? 1 + (half & 0x3ff) / 1024.0 : (half & 0x3ff) / 1024.0;
    return ldexp(m, exponent ? exponent - 15 : -14) * (half & 0x8000 ? -1 : 1);
}

/* Any number about -1 to 1, as it comes back from the dtype; at says which. */
static double number(kvc_dtype dtype, uint64_t at, void *bytes)
{
    uint64_t state = at * 0x9e3779b97f4a7c15ull + 12345;
    (void)h_random(&state);
    float x = (float)((double)(h_random(&state) % 20011) / 10005.0 - 1.0);
    char raw[4];
    kvk_from_f32(&x, 1, (kvk_dtype)dtype, raw);
    if (bytes)
        memcpy(bytes, raw, size_of(dtype));
    return read_number(dtype, raw);
}

/* Any byte but a NaN, as its code has it. */
static double code(kvc_dtype dtype, uint64_t at, void *byte)
{
    uint64_t state = at * 0x9e3779b97f4a7c15ull + 12345;
    uint8_t x = (uint8_t)h_random(&state);
    x = (x & 0x7f) == 0x7f ? 0x7e : x;
    if (byte)
        memcpy(byte, &x, 1);
    if (dtype == KVC_DTYPE_I8)
        return x < 128 ? x : x - 256.0;
    int exponent = x >> 3 & 15;
    double size = exponent ? ldexp(1 + (x & 7) / 8.0, exponent - 7) : ldexp((x & 7) / 8.0, -6);
    return x & 0x80 ? -size : size;
}

/* The scale of a head's K (or V), a bf16 that keeps its elements about -1 to 1. */
static double scale_of(const a_shape *s, uint32_t pos, bool v, uint32_t head, void *to)
{
    uint16_t bits = (uint16_t)((s->dtype == KVC_DTYPE_I8 ? 0x3b80u : 0x3a80u) +
                               (pos * 37 + head * 11 + v) % 128);
    if (to)
        memcpy(to, &bits, sizeof(bits));
    return read_number(KVC_DTYPE_BF16, (const char *)&bits);
}

/* Element t of the K (or V) of one kv head in the row at a token position. */
static double row_number(const a_shape *s, uint32_t pos, bool v, uint32_t head, uint32_t t,
                         void *to)
{
    uint64_t at = ((((uint64_t)pos * 2 + v) * 64 + head) << 8) + t;
    if (coded(s->dtype))
        return code(s->dtype, at, to) * scale_of(s, pos, v, head, NULL);
    return number(s->dtype, at, to);
}

static double q_number(const a_shape *s, uint32_t q, uint32_t head, uint32_t t, void *to)
{
    return number(s->q_dtype, (1ull << 40) + (((uint64_t)q * 64 + head) << 8) + t, to);
}

/* ---- the oracle ------------------------------------------------------------------------------ */

static double logit(const a_shape *s, const double *freq, uint32_t q, uint32_t head, uint32_t pos,
                    double angle_at)
{
    uint32_t kv = head / (s->n_q_heads / s->kv_heads), half = s->dim / 2;
    double x = 0;
    for (uint32_t t = 0; t < half; t++) {
        double a = row_number(s, pos, false, kv, t, NULL);
        double b = row_number(s, pos, false, kv, half + t, NULL);
        double c = s->ranks ? cos(angle_at * freq[t]) : 1,
               d = s->ranks ? sin(angle_at * freq[t]) : 0;
        double q_a = q_number(s, q, head, t, NULL), q_b = q_number(s, q, head, half + t, NULL);
        double e = s->q_moved ? cos((40.0 + 7 * q) * freq[t]) : 1;
        double g = s->q_moved ? sin((40.0 + 7 * q) * freq[t]) : 0;
        x += (q_a * e - q_b * g) * (a * c - b * d);
        x += (q_b * e + q_a * g) * (b * c + a * d);
    }
    x *= s->scale != 0 ? s->scale : 1 / sqrt((double)s->dim);
    return s->softcap != 0 ? s->softcap * tanh(x / s->softcap) : x;
}

static void frequencies(const a_shape *s, double *freq)
{
    const kvk_rope_params params = {.type = s->rope == KVC_ROPE_LLAMA3,
                                    .theta = 10000,
                                    .factor = 8,
                                    .low_freq_factor = 1,
                                    .high_freq_factor = 4,
                                    .original_max_position = 64};
    assert_int_equal(kvk_rope_inv_freq(&params, s->dim, freq), KVC_OK);
}

/* Attention in double over picks [n], those for which here says no left out. */
void a_oracle(const a_shape *s, const uint32_t *picks, const uint32_t *ranks, uint32_t n,
              const bool *here, a_partial *out)
{
    static double x[MAX_PICKS];
    double freq[MAX_DIM / 2];
    frequencies(s, freq);
    for (uint32_t i = 0; i < s->n_q * s->n_q_heads; i++) {
        double max = -INFINITY, sum = 0;
        uint32_t head = i % s->n_q_heads, kv = head / (s->n_q_heads / s->kv_heads);
        double *o = out->o + (size_t)i * s->dim;
        for (uint32_t j = 0; j < n; j++) {
            bool counts = !here || here[j];
            x[j] = counts ? logit(s, freq, i / s->n_q_heads, head, picks[j], ranks ? ranks[j] : 0)
                          : -INFINITY;
            max = x[j] > max ? x[j] : max;
        }
        memset(o, 0, s->dim * sizeof(*o));
        for (uint32_t j = 0; j < n; j++) {
            if (x[j] == -INFINITY)
                continue;
            double p = exp(x[j] - max);
            sum += p;
            for (uint32_t t = 0; t < s->dim; t++)
                o[t] += p * row_number(s, picks[j], true, kv, t, NULL);
        }
        for (uint32_t t = 0; t < s->dim && sum > 0; t++)
            o[t] /= sum;
        out->lse[i] = sum > 0 ? max + log(sum) : -INFINITY;
    }
}

/* The definition that proto/kvasir.proto gives, in double. */
void a_merge(const a_shape *s, a_partial *a, const a_partial *b)
{
    for (uint32_t i = 0; i < s->n_q * s->n_q_heads; i++) {
        double m = fmax(a->lse[i], b->lse[i]);
        if (m == -INFINITY)
            continue;
        double wa = exp(a->lse[i] - m), wb = exp(b->lse[i] - m);
        for (uint32_t t = 0; t < s->dim; t++) {
            size_t at = (size_t)i * s->dim + t;
            a->o[at] = (wa * a->o[at] + wb * b->o[at]) / (wa + wb);
        }
        a->lse[i] = m + log(wa + wb);
    }
}

/* Within kernels/README.md's bound (values are at most 1, logits small), and o's own rounding. */
void a_check_equal(const a_shape *s, const a_partial *got, const a_partial *want, const char *what)
{
    double round = s->o_dtype == KVC_DTYPE_F32 ? 0 : s->o_dtype == KVC_DTYPE_F16 ? 0x1p-12 : 0x1p-9;
    for (uint32_t i = 0; i < s->n_q * s->n_q_heads; i++) {
        if (!(fabs(got->lse[i] - want->lse[i]) <= 1e-4) && got->lse[i] != want->lse[i])
            fail_msg("%s: lse %u is %.9g, not %.9g", what, i, got->lse[i], want->lse[i]);
        for (uint32_t t = 0; t < s->dim; t++) {
            double a = got->o[(size_t)i * s->dim + t], b = want->o[(size_t)i * s->dim + t];
            if (!(fabs(a - b) <= 1e-4 + 2 * round * fabs(b)))
                fail_msg("%s: o %u.%u is %.9g, not %.9g", what, i, t, a, b);
        }
    }
}

/* ---- server ---------------------------------------------------------------------------------- */

void a_make_schema(a_server *f, const a_shape *s)
{
    uint32_t side = s->kv_heads * (s->dim * size_of(s->dtype) + (coded(s->dtype) ? 2 : 0));
    f->part = (kvc_part){
        .part = 7,
        .kind = KVC_PART_KV,
        .dtype = s->dtype,
        .kv_head_count = s->kv_heads,
        .row_bytes = 2 * side,
        .k_len_bytes = side,
        .v_off_bytes = side,
        .v_len_bytes = side,
        .q_dim = s->dim,
        .v_dim = s->dim,
        .rope = {.type = s->rope,
                 .theta = 10000,
                 .factor = s->rope == KVC_ROPE_LLAMA3 ? 8 : 0,
                 .low_freq_factor = s->rope == KVC_ROPE_LLAMA3 ? 1 : 0,
                 .high_freq_factor = s->rope == KVC_ROPE_LLAMA3 ? 4 : 0,
                 .original_max_position = s->rope == KVC_ROPE_LLAMA3 ? 64 : 0},
        .attention_scale = s->scale,
        .softcap = s->softcap,
        .codec = coded(s->dtype) ? KVC_CODEC_HEAD_SCALES : NULL,
    };
    f->schema = (kvc_schema){.model = "m",
                             .revision = "r",
                             .recipe = "full",
                             .tp_size = 1,
                             .block_tokens = H_TOKENS,
                             .n_parts = 1,
                             .parts = &f->part};
}

void a_register_schema(a_server *f)
{
    kvc_request req = {.method = KVC_REGISTER_SCHEMA};
    req.u.register_schema.schema = &f->schema;
    kvc_status status = h_call(f->peer, &req);
    if (status != KVC_OK)
        fail_msg("schema: %s", f->peer->xfer.detail);
    f->digest = f->peer->xfer.reply.u.register_schema.digest;
}

/* The value of a block, whose first token is at block * H_TOKENS. */
static void a_put_block(a_server *f, const a_shape *s, uint32_t block, kvc_promise promise)
{
    uint32_t bytes = H_TOKENS * f->part.row_bytes, elem = size_of(s->dtype);
    char *value = malloc(bytes), *at = value;
    for (uint32_t row = 0; row < H_TOKENS; row++)
        for (uint32_t v = 0; v < 2; v++) {
            for (uint32_t head = 0; head < s->kv_heads; head++)
                for (uint32_t t = 0; t < s->dim; t++, at += elem)
                    (void)row_number(s, block * H_TOKENS + row, v, head, t, at);
            for (uint32_t head = 0; coded(s->dtype) && head < s->kv_heads; head++, at += 2)
                (void)scale_of(s, block * H_TOKENS + row, v, head, at);
        }
    if (f->spoil)
        f->spoil(s, value, block);
    struct iovec iov = {value, bytes};
    kvc_put_value put = {h_digest(block), 7, bytes, {0, 0}};
    kvc_request req = {.method = KVC_PUT_BLOCKS, .data = &iov, .n_data = 1, .data_bytes = bytes};
    req.u.put_blocks.schema = f->digest;
    req.u.put_blocks.promise = promise;
    req.u.put_blocks.n_values = 1;
    req.u.put_blocks.values = &put;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    assert_int_equal(f->peer->status[0], KVC_OK);
    free(value);
}

void a_open_context(a_server *f)
{
    kvc_digest digests[N_BLOCKS];
    kvc_request req = {.method = KVC_OPEN_CONTEXT};
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        digests[b] = h_digest(b);
    req.u.open_context.schema = f->digest;
    req.u.open_context.digests = digests;
    req.u.open_context.n_digests = N_BLOCKS;
    assert_int_equal(h_call(f->peer, &req), KVC_OK);
    f->context = f->peer->xfer.reply.u.open_context.context;
}

/* A server with every block of a shape but `absent` (N_BLOCKS: none). */
void a_start(a_server *f, const a_shape *s, uint32_t absent)
{
    h_server_start(&f->h);
    f->peer = h_connect(kvs_server_uri(f->h.server, 0), "default");
    a_make_schema(f, s);
    a_register_schema(f);
    for (uint32_t b = 0; b < N_BLOCKS; b++)
        if (b != absent)
            a_put_block(f, s, b, KVC_PROMISE_MEMORY);
    a_open_context(f);
}

void a_stop(a_server *f)
{
    h_disconnect(f->peer);
    h_server_stop(&f->h, true);
}

int a_setup(void **state)
{
    a_server *f = calloc(1, sizeof(*f));
    h_server_init(&f->h);
    f->h.settings.attend_threads = 2;
    *state = f;
    return 0;
}

int a_teardown(void **state)
{
    a_server *f = *state;
    h_server_fini(&f->h);
    if (f->dir[0])
        h_remove_dir(f->dir);
    free(f);
    return 0;
}

/* ---- calls ----------------------------------------------------------------------------------- */

/* One group of all of a shape's queries, in pieces that fit no row. */
void a_ask_init(a_ask *a, const a_server *f, const a_shape *s, const uint32_t *picks,
                const uint32_t *ranks, uint32_t n)
{
    uint32_t elem = size_of(s->q_dtype);
    size_t bytes = (size_t)s->n_q * s->n_q_heads * s->dim * elem;
    memset(a, 0, sizeof(*a));
    char *at = a->q = malloc(bytes);
    for (uint32_t q = 0; q < s->n_q; q++)
        for (uint32_t head = 0; head < s->n_q_heads; head++)
            for (uint32_t t = 0; t < s->dim; t++, at += elem)
                (void)q_number(s, q, head, t, at);
    a->groups[0] = (kvc_row_group){f->context, 7, n, picks};
    a->queries[0] = (kvc_attend_query){s->n_q,
                                       s->n_q_heads,
                                       s->q_dtype,
                                       s->o_dtype,
                                       false,
                                       ranks,
                                       s->q_moved ? a->q_positions : NULL};
    for (uint32_t q = 0; q < s->n_q && q < MAX_Q; q++)
        a->q_positions[q] = 40 + 7 * q;
    a->iov[0] = (struct iovec){a->q, 3};
    a->iov[1] = (struct iovec){a->q + 3, 0};
    a->iov[2] = (struct iovec){a->q + 3, bytes - 3};
    a->req =
        (kvc_request){.method = KVC_ATTEND_ROWS, .data = a->iov, .n_data = 3, .data_bytes = bytes};
    a->req.u.fetch_rows.n_groups = 1;
    a->req.u.fetch_rows.groups = a->groups;
    a->req.u.fetch_rows.queries = a->queries;
}

/* The partial of group g of the last reply, all of whose groups have one shape. */
void a_result(const a_server *f, const a_shape *s, uint32_t g, a_partial *out)
{
    uint32_t n = s->n_q * s->n_q_heads, elem = size_of(s->o_dtype);
    size_t o_bytes = (size_t)n * s->dim * elem, bytes = o_bytes + n * sizeof(float);
    assert_true(f->peer->data_bytes >= (g + 1) * bytes);
    const char *at = f->peer->data + g * bytes;
    for (uint32_t i = 0; i < n * s->dim; i++)
        out->o[i] = read_number(s->o_dtype, at + (size_t)i * elem);
    for (uint32_t i = 0; i < n; i++)
        out->lse[i] = read_number(KVC_DTYPE_F32, at + o_bytes + i * sizeof(float));
}

void a_attend(a_server *f, const a_shape *s, const uint32_t *picks, const uint32_t *ranks,
              uint32_t n, a_partial *out)
{
    a_ask a;
    a_ask_init(&a, f, s, picks, ranks, n);
    kvc_status status = h_call(f->peer, &a.req);
    if (status != KVC_OK)
        fail_msg("attend: %s: %s", kvc_status_name(status), f->peer->xfer.detail);
    a_result(f, s, 0, out);
    free(a.q);
}

void a_choose(const a_shape *s, uint32_t *picks, uint32_t *ranks)
{
    uint64_t seed = 7;
    for (uint32_t i = 0; i < s->n_picks; i++) {
        picks[i] = (uint32_t)(h_random(&seed) % (N_BLOCKS * H_TOKENS));
        ranks[i] = 5 + 3 * i;
    }
}
