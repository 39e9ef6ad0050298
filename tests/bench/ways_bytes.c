/*
 * ways_bytes.c: bytes on the wire of a request, both ways: those of its messages as the wire module
 * encodes them, beside what the kernel counts on TCP. See ways_rig.h.
 */
#include <dirent.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "base/arena.h"
#include "bench.h"
#include "ways_rig.h"
#include "wire/frame.h"
#include "wire/wire.h"

#define ARENA_BYTES (64u << 20)
#define HANDLE      (1ull << 60) /* as long as handles are */

static uint64_t request_bytes(const kvc_request *req)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes = 0;
    kvc_arena_init(&arena, ARENA_BYTES);
    if (kvc_wire_encode_request(req, &arena, &head, &head_bytes) != KVC_OK)
        bench_die("encode");
    kvc_arena_reset(&arena);
    return head_bytes + req->data_bytes;
}

static uint64_t reply_bytes(const kvc_reply *reply)
{
    kvc_arena arena;
    const void *head;
    size_t head_bytes = 0;
    kvc_arena_init(&arena, ARENA_BYTES);
    if (kvc_wire_encode_reply(reply, &arena, &head, &head_bytes) != KVC_OK)
        bench_die("encode");
    kvc_arena_reset(&arena);
    return head_bytes + reply->data_bytes;
}

static void set_tier(const ways_way *way, kvc_reply *reply, uint32_t n)
{
    if (way->rig->tier == WAYS_LMDB)
        reply->u.fetch_rows.rows_lmdb = n;
    else
        reply->u.fetch_rows.rows_dram = n;
}

static void count_rows(const ways_way *way, const uint32_t *picks, uint32_t n, uint32_t n_requests,
                       uint64_t *out_p, uint64_t *in_p)
{
    uint32_t each = (n + n_requests - 1) / n_requests;
    for (uint32_t at = 0; at < n; at += each) {
        uint32_t m = n - at < each ? n - at : each;
        const kvc_row_group group = {HANDLE, WAYS_PART, m, picks + at};
        kvc_request req = {.method = KVC_FETCH_ROWS};
        kvc_reply reply = {.method = KVC_FETCH_ROWS,
                           .data_bytes = (uint64_t)m * way->rig->shape->row_bytes};
        req.u.fetch_rows.n_groups = 1;
        req.u.fetch_rows.groups = &group;
        set_tier(way, &reply, m);
        *out_p += request_bytes(&req);
        *in_p += reply_bytes(&reply);
    }
}

/* One stream, as few as it may have; its messages have no more than 1 MiB each. */
static void count_blocks(const ways_way *way, const uint32_t *picks, uint32_t n, uint64_t *out_p,
                         uint64_t *in_p)
{
    const ways_shape *shape = way->rig->shape;
    uint32_t bytes = WAYS_CHUNK_TOKENS * shape->row_bytes, n_blocks = n / WAYS_CHUNK_TOKENS;
    uint32_t each = (1u << 20) / bytes;
    const uint32_t part = WAYS_PART;
    kvc_request req = {.method = KVC_FETCH_BLOCKS};
    (void)picks;
    req.u.fetch_blocks.schema = way->rig->schema;
    req.u.fetch_blocks.digests = way->rig->digests;
    req.u.fetch_blocks.n_digests = n_blocks;
    req.u.fetch_blocks.parts = &part;
    req.u.fetch_blocks.n_parts = 1;
    *out_p = request_bytes(&req);
    for (uint32_t at = 0; at < n_blocks; at += each) {
        kvc_block_value values[32];
        uint32_t m = n_blocks - at < each ? n_blocks - at : each;
        kvc_reply reply = {.method = KVC_FETCH_BLOCKS, .data_bytes = (uint64_t)m * bytes};
        for (uint32_t i = 0; i < m; i++)
            values[i] = (kvc_block_value){.block = at + i,
                                          .part = WAYS_PART,
                                          .tier = way->rig->tier == WAYS_LMDB ? KVC_TIER_LMDB
                                                                              : KVC_TIER_DRAM,
                                          .len_bytes = bytes};
        reply.u.fetch_blocks.values = values;
        reply.u.fetch_blocks.n_values = m;
        *in_p += reply_bytes(&reply);
    }
}

static void count_near(const ways_way *way, const uint32_t *picks, uint32_t n, bool ranked,
                       uint64_t *out_p, uint64_t *in_p)
{
    static const uint32_t position = 4096;
    const ways_shape *shape = way->rig->shape;
    uint32_t n_groups = shape->chunks ? n / WAYS_CHUNK_TOKENS : 1, each = n / n_groups;
    uint32_t *ranks = calloc(n, sizeof(*ranks));
    kvc_row_group groups[32];
    kvc_attend_query queries[32];
    if (ranks == NULL)
        bench_die("memory");
    for (uint32_t i = 0; i < n; i++)
        ranks[i] = 128 + i;
    for (uint32_t g = 0; g < n_groups; g++) {
        groups[g] = (kvc_row_group){HANDLE, WAYS_PART, each, picks + (size_t)g * each};
        queries[g] = (kvc_attend_query){.n_q = 1,
                                        .n_q_heads = shape->n_q_heads,
                                        .q_dtype = KVC_DTYPE_BF16,
                                        .o_dtype = KVC_DTYPE_BF16,
                                        .same_q = g > 0,
                                        .ranks = ranked ? ranks + (size_t)g * each : NULL,
                                        .q_positions = ranked ? &position : NULL};
    }
    uint64_t q_bytes = (uint64_t)shape->n_q_heads * shape->dim * 2;
    kvc_request req = {.method = KVC_ATTEND_ROWS, .data_bytes = q_bytes};
    kvc_reply reply = {.method = KVC_ATTEND_ROWS,
                       .data_bytes = n_groups * (q_bytes + shape->n_q_heads * sizeof(float))};
    req.u.fetch_rows.n_groups = n_groups;
    req.u.fetch_rows.groups = groups;
    req.u.fetch_rows.queries = queries;
    set_tier(way, &reply, n);
    *out_p = request_bytes(&req);
    *in_p = reply_bytes(&reply);
    free(ranks);
}

void ways_count_bytes(const ways_way *way, const uint32_t *picks, uint32_t n, uint32_t n_requests,
                      bool ranked, uint64_t *out_p, uint64_t *in_p)
{
    uint64_t frame = way->framed ? KVC_FRAME_BYTES : 0;
    *out_p = 0;
    *in_p = 0;
    if (n_requests == 0)
        return;
    if (way->kind == WAYS_NEAR)
        count_near(way, picks, n, ranked, out_p, in_p);
    else if (way->kind == WAYS_BLOCKS)
        count_blocks(way, picks, n, out_p, in_p);
    else
        count_rows(way, picks, n, n_requests, out_p, in_p);
    *out_p += n_requests * frame;
    *in_p += n_requests * frame;
}

void ways_tcp_bytes(uint64_t *out_p, uint64_t *in_p)
{
    DIR *dir = opendir("/proc/self/fd");
    const struct dirent *entry;
    *out_p = 0;
    *in_p = 0;
    while (dir != NULL && (entry = readdir(dir)) != NULL) {
        struct tcp_info info = {0};
        socklen_t len = sizeof(info);
        if (entry->d_name[0] == '.' || getsockopt((int)strtol(entry->d_name, NULL, 10), IPPROTO_TCP,
                                                  TCP_INFO, &info, &len) != 0)
            continue;
        *out_p += info.tcpi_bytes_acked;
        *in_p += info.tcpi_bytes_received;
    }
    if (dir != NULL)
        (void)closedir(dir);
}
