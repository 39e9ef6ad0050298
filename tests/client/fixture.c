/*
 * fixture.c: see fixture.h.
 */
#include "fixture.h"

void fixture_open(fixture *f)
{
    fake_listen(&f->fake, FIXTURE_URI);
    kvc_client_opts opts = {.size_bytes = sizeof(opts),
                            .uris = FIXTURE_URI,
                            .n_channels = 2,
                            .connect_timeout_ns = PATIENCE_MS * MS,
                            .default_timeout_ns = PATIENCE_MS * MS};
    assert_ok(kvc_client_open(&opts, &f->client));
}

void fixture_start(fixture *f)
{
    memset(f, 0, sizeof(*f));
    fake_init(&f->fake);
    fixture_open(f);
}

void fixture_stop(fixture *f)
{
    kvc_client_close(f->client);
    fake_fini(&f->fake);
}

kvc_region *fixture_region(fixture *f, void *base, size_t len_bytes)
{
    kvc_region *region = NULL;
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = base, .len_bytes = len_bytes, .kind = KVC_MEMORY_HOST};
    assert_ok(kvc_region_register(f->client, &desc, &region));
    return region;
}

kvc_digest *fixture_digests(uint32_t n)
{
    kvc_digest *digests = calloc(n + 1, sizeof(*digests));
    assert_non_null(digests);
    for (uint32_t i = 0; i < n; i++) {
        digests[i].bytes[0] = 1;
        memcpy(&digests[i].bytes[4], &i, sizeof(i));
    }
    return digests;
}

kvc_context *fixture_context(fixture *f, uint32_t n)
{
    kvc_context *context = NULL;
    kvc_digest *digests = fixture_digests(n);
    assert_ok(kvc_context_open(f->client, &f->schema, digests, n, 0, 0, &context));
    free(digests);
    return context;
}

static void check_rows(const fixture *f, uint32_t part, uint32_t n, const uint32_t *picks,
                       const uint32_t *slots, const uint8_t *rows)
{
    uint32_t row_bytes = f->fake.row_bytes[part];
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t b = 0; b < row_bytes; b++)
            if (rows[(size_t)slots[i] * row_bytes + b] != fake_byte(part, picks[i], b))
                fail_msg("row %u, byte %u is not that of token %u", i, b, picks[i]);
}

void fixture_fetch_check(fixture *f, kvc_context *context, uint32_t part, uint32_t n,
                         uint32_t first, uint32_t step)
{
    uint32_t row_bytes = f->fake.row_bytes[part];
    uint32_t *picks = must(malloc((n + 1) * sizeof(*picks)));
    uint32_t *slots = must(malloc((n + 1) * sizeof(*slots)));
    int8_t *status = must(malloc(n + 1));
    uint8_t *rows = must(calloc(n + 1, row_bytes));
    for (uint32_t i = 0; i < n; i++) {
        picks[i] = first + i * step;
        slots[i] = n - 1 - i; /* reversed: no two rows are neighbours in order */
        status[i] = 77;
    }
    kvc_region *region = fixture_region(f, rows, (size_t)(n + 1) * row_bytes);
    kvc_pick_group group = {
        .context = context,
        .part = part,
        .row_bytes = row_bytes,
        .n_picks = n,
        .picks = picks,
        .dst_slots = slots,
    };
    kvc_op op;
    kvc_fetch_info info;
    kvc_op_init(&op, NULL, NULL);
    assert_ok(kvc_fetch(f->client, &group, 1, region, status, &info, in_ms(PATIENCE_MS), &op));
    kvc_status waited = kvc_op_wait(&op, 0);
    if (waited != KVC_OK)
        print_error("fetch: %s\n", kvc_last_error());
    assert_ok(waited);
    for (uint32_t i = 0; i < n; i++)
        assert_int_equal(status[i], KVC_OK);
    check_rows(f, part, n, picks, slots, rows);
    assert_int_equal(info.rows_dram, n);
    assert_ok(kvc_region_deregister(f->client, region));
    free(rows);
    free(status);
    free(slots);
    free(picks);
}

void fixture_schema(const char *model, kvc_schema *schema_p, kvc_part *part_p)
{
    *part_p = (kvc_part){
        .part = 1,
        .kind = KVC_PART_KV,
        .dtype = KVC_DTYPE_BF16,
        .kv_head_count = 2,
        .row_bytes = 512,
        .k_len_bytes = 256,
        .v_off_bytes = 256,
        .v_len_bytes = 256,
        .q_dim = 64,
        .v_dim = 64,
        .rope = {.type = KVC_ROPE_NONE},
    };
    *schema_p = (kvc_schema){
        .model = model,
        .revision = "1",
        .recipe = "full",
        .tp_size = 1,
        .block_tokens = 64,
        .n_parts = 1,
        .parts = part_p,
    };
}

void count_done(kvc_op *op, void *arg)
{
    counted *c = arg;
    c->status = op->status;
    atomic_fetch_add(&c->done, 1);
}

void await_done(counted *c)
{
    support_wait_for(atomic_load(&c->done) > 0);
    assert_int_equal(atomic_load(&c->done), 1);
}

void fetch_async(fixture *f, kvc_context *context, kvc_region *region, counted *c,
                 uint64_t deadline_ns)
{
    for (uint32_t i = 0; i < 64; i++)
        c->picks[i] = i * 3;
    kvc_pick_group group = {
        .context = context, .part = 6, .row_bytes = 64, .n_picks = 64, .picks = c->picks};
    assert_ok(kvc_fetch(f->client, &group, 1, region, c->states, NULL, deadline_ns, &c->op));
}
