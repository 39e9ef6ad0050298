/* map_rig.c: see map_rig.h. One thread, the test's; nothing of it outlives a case. */
#include "map_rig.h"

int map_setup(void **state)
{
    map_rig *r = calloc(1, sizeof(*r));
    assert_non_null(r);
    h_server_init(&r->h);
    h_temp_dir(r->dir);
    snprintf(r->h.listen, sizeof(r->h.listen), "shm://%s/socket", r->dir);
    r->h.settings.dram_bytes = 8u << 20; /* 8 segments of 32 values */
    h_schema_init(&r->schema, "map", 2, ROW_BYTES, false);
    *state = r;
    return 0;
}

void map_start(map_rig *r)
{
    h_server_start(&r->h);
    r->v.peer = h_connect(r->h.listen, NULL);
    assert_int_equal(h_register(r->v.peer, &r->schema), KVC_OK);
}

void map_close_fds(view *v)
{
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        if (v->segments[i] != NULL && v->fds[i] >= 0)
            close(v->fds[i]);
        v->fds[i] = -1;
    }
}

void map_forget(view *v)
{
    map_close_fds(v);
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        if (v->segments[i] != NULL)
            assert_int_equal(munmap((void *)(uintptr_t)v->segments[i], v->len_bytes[i]), 0);
    }
    if (v->lease != NULL)
        assert_int_equal(munmap((void *)(uintptr_t)v->lease, v->lease_bytes), 0);
    *v = (view){.peer = v->peer};
}

int map_teardown(void **state)
{
    map_rig *r = *state;
    map_forget(&r->v);
    h_disconnect(r->v.peer);
    h_server_fini(&r->h);
    h_remove_dir(r->dir);
    free(r);
    return 0;
}

void map_put_blocks(map_rig *r, uint64_t first, uint32_t n)
{
    for (uint32_t b = 0; b < n; b++) {
        assert_int_equal(h_put(r->v.peer, &r->schema, first + b, PART_IDS, 2, KVC_PROMISE_MEMORY),
                         KVC_OK);
        assert_int_equal(r->v.peer->status[0], KVC_OK);
        assert_int_equal(r->v.peer->status[1], KVC_OK);
    }
}

static const void *map_fd(int fd, uint64_t len_bytes)
{
    void *base = mmap(NULL, len_bytes, PROT_READ, MAP_SHARED, fd, 0);
    assert_true(base != MAP_FAILED);
    return base;
}

kvc_status call_map(view *v, uint64_t context, uint64_t map, uint32_t first, uint32_t n)
{
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.context = context;
    req.u.map_context.map = map;
    req.u.map_context.parts = PART_IDS;
    req.u.map_context.n_parts = 2;
    req.u.map_context.first_block = first;
    req.u.map_context.n_blocks = n;
    kvc_status status = h_call(v->peer, &req);
    if (status != KVC_OK)
        return status;
    const kvc_reply *reply = &v->peer->xfer.reply;
    uint32_t at = 0;
    v->map = reply->u.map_context.map;
    v->slot = reply->u.map_context.lease_slot;
    if (reply->u.map_context.lease_bytes > 0) {
        v->lease_bytes = reply->u.map_context.lease_bytes;
        v->lease = map_fd(v->peer->fds[0], v->lease_bytes);
        assert_int_equal(fcntl(v->peer->fds[0], F_GET_SEALS),
                         F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
        close(v->peer->fds[0]);
        at = 1;
    }
    assert_int_equal(v->peer->n_fds, at + reply->u.map_context.n_segments);
    for (uint32_t i = 0; at < v->peer->n_fds; i++, at++) {
        uint32_t id = v->peer->segments[i].id;
        assert_true(id > 0 && id < SEGMENTS && v->segments[id] == NULL);
        v->fds[id] = v->peer->fds[at];
        v->len_bytes[id] = v->peer->segments[i].len_bytes;
        v->segments[id] = map_fd(v->fds[id], v->len_bytes[id]);
    }
    assert_int_equal(v->peer->data_bytes, 8 * 2 * reply->u.map_context.n_blocks);
    return KVC_OK;
}

const uint8_t *map_entry(const view *v, uint32_t block, uint32_t part)
{
    uint32_t words[2];
    memcpy(words, v->peer->data + 8 * (2 * block + part), sizeof(words));
    if (words[0] == 0)
        return NULL;
    assert_true(words[0] < SEGMENTS && v->segments[words[0]] != NULL);
    assert_true((uint64_t)words[1] * 4096 + VALUE_BYTES <= v->len_bytes[words[0]]);
    return v->segments[words[0]] + (uint64_t)words[1] * 4096;
}

bool map_is_good(const view *v)
{
    return atomic_load(&v->lease[v->slot]) == v->map;
}

void map_assert_value(const uint8_t *value, uint64_t block, uint32_t part)
{
    assert_non_null(value);
    for (uint32_t row = 0; row < H_TOKENS; row++)
        assert_true(h_row_is(block, part * 10, row, ROW_BYTES, value + row * ROW_BYTES));
}

void map_release(view *v)
{
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    req.u.map_context.map = v->map;
    req.u.map_context.release = true;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
}

void map_wait_gauge(kvc_metric metric, uint64_t want)
{
    for (int i = 0; i < 20000 && kvc_metric_get(metric) != want; i++)
        usleep(1000);
    assert_int_equal(kvc_metric_get(metric), want);
}

void map_give_back(view *v)
{
    uint32_t ids[SEGMENTS], n = 0;
    kvc_request req = {.method = KVC_MAP_CONTEXT};
    for (uint32_t id = 0; id < SEGMENTS; id++) {
        if (v->segments[id] == NULL)
            continue;
        assert_int_equal(munmap((void *)(uintptr_t)v->segments[id], v->len_bytes[id]), 0);
        close(v->fds[id]);
        v->segments[id] = NULL;
        ids[n++] = id;
    }
    ids[n++] = 0; /* what means nothing is passed over */
    ids[n++] = 70000;
    req.u.map_context.release = true;
    req.u.map_context.unmapped = ids;
    req.u.map_context.n_unmapped = n;
    assert_int_equal(h_call(v->peer, &req), KVC_OK);
    assert_int_equal(h_call(v->peer, &req), KVC_OK); /* said twice */
}
