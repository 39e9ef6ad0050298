/*
 * context_export.c: kvctl context export: from the server to a file.
 *
 * Main thread. Values go by in batches, so memory is bounded however long the context is. The file
 * is written beside its name and takes it once it is whole and synced.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "context.h"
#include "wire/wire.h"

#define ARENA_BYTES (16u << 20)

static bool write_file(void *arg, const void *src, size_t n)
{
    return fwrite(src, 1, n, arg) == n;
}

/* The parts named, or all of the schema's text, with their lengths. NULL: said. */
static kvctl_file_part *choose_parts(const kvctl_blocks *blocks, uint32_t *n_p)
{
    char key[40];
    uint32_t most = blocks->n_parts > 0 ? blocks->n_parts : KVC_MAX_PART_ID + 1;
    kvctl_file_part *parts = calloc(KVC_MAX_PARTS, sizeof(*parts));
    *n_p = 0;
    for (uint32_t i = 0; parts != NULL && i < most; i++) {
        uint32_t part = blocks->n_parts > 0 ? blocks->parts[i] : i;
        (void)snprintf(key, sizeof(key), "part.%05u.row_bytes", part);
        uint64_t bytes = kvctl_schema_number(&blocks->schema, key) * blocks->block_tokens;
        if (bytes == 0 && blocks->n_parts == 0)
            continue;
        bool sorted = *n_p == 0 || part > parts[*n_p - 1].part;
        if (*n_p == KVC_MAX_PARTS || bytes == 0 || bytes > KVC_MAX_VALUE_BYTES || !sorted) {
            kvctl_error("part %u is not in the schema's text, or the parts do not ascend", part);
            free(parts);
            return NULL;
        }
        parts[(*n_p)++] = (kvctl_file_part){.part = part, .value_bytes = (uint32_t)bytes};
    }
    return parts;
}

/* Values on their way from the server to the file. */
typedef struct exporter {
    const kvctl_globals *globals;
    kvc_client *client;
    FILE *stream;
    kvctl_file_head head;
    kvc_block_part *places; /* [n_parts] */
    uint8_t *bytes;
    int8_t *status;
    kvc_region *region;
    uint32_t batch_blocks;
    size_t block_bytes;
    context_total total;
} exporter;

static kvc_status fetch_batch(exporter *e, uint32_t first, uint32_t n)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_fetch_blocks(e->client, &e->head.schema, e->head.digests + first, n,
                                         e->places, e->head.n_parts, e->region, e->status, NULL,
                                         kvctl_deadline_ns(e->globals), &op);
    return status == KVC_OK ? kvctl_wait(&op, "exporting") : status;
}

/* False: the file could not be written. */
static bool write_batch(exporter *e, uint32_t n)
{
    bool good = true;
    for (uint32_t i = 0; good && i < n * e->head.n_parts; i++) {
        const kvc_block_part *place = &e->places[i % e->head.n_parts];
        const uint8_t *value =
            e->bytes + place->dst_off_bytes + i / e->head.n_parts * place->stride_bytes;
        bool there = e->status[i] == KVC_OK;
        e->total.values += there;
        e->total.missing += !there;
        good =
            kvctl_file_put_value(write_file, e->stream, there ? value : NULL, place->value_bytes);
    }
    return good;
}

static kvctl_exit write_all(exporter *e)
{
    bool good = kvctl_file_put_head(write_file, e->stream, &e->head);
    for (uint32_t first = 0; good && first < e->head.n_blocks; first += e->batch_blocks) {
        uint32_t left = e->head.n_blocks - first;
        uint32_t n = left < e->batch_blocks ? left : e->batch_blocks;
        kvc_status status = fetch_batch(e, first, n);
        if (status != KVC_OK)
            return kvctl_failed(status);
        good = write_batch(e, n);
    }
    good = good && kvctl_file_put_end(write_file, e->stream, e->total.values);
    good = good && fflush(e->stream) == 0 && fsync(fileno(e->stream)) == 0;
    if (!good)
        kvctl_error("cannot write the file: %s", strerror(errno));
    return good ? KVCTL_OK : KVCTL_FAILED;
}

/* The schema, for a server that does not know it; in the arena. */
static kvc_status get_schema(exporter *e, kvc_arena *arena)
{
    kvc_request req = {.method = KVC_REGISTER_SCHEMA};
    kvc_schema *schema;
    const void *head = NULL;
    size_t head_bytes = 0;
    kvc_status status =
        kvc_schema_get(e->client, &e->head.schema, kvctl_deadline_ns(e->globals), &schema);
    req.u.register_schema.schema = schema;
    if (status == KVC_OK)
        status = kvc_wire_encode_request(&req, arena, &head, &head_bytes);
    free(schema);
    e->head.schema_msg = head;
    e->head.schema_bytes = (uint32_t)head_bytes;
    return status;
}

/* The rows of --tail, whose length must be that of all parts. False: said. */
static bool read_tail(exporter *e, const char *path, char **tail_p)
{
    uint64_t row_bytes = 0, n_tail = e->head.n_tokens % e->head.block_tokens;
    size_t n = 0;
    for (uint32_t i = 0; i < e->head.n_parts; i++)
        row_bytes += e->head.parts[i].value_bytes / e->head.block_tokens;
    *tail_p = path != NULL ? kvctl_read_file(path, &n) : NULL;
    if (path == NULL || *tail_p == NULL)
        return path == NULL;
    unsigned long long want = n_tail * row_bytes;
    if (n == 0 || n != want || n > KVCTL_FILE_MAX_TAIL) {
        kvctl_error("--tail has %zu bytes; %llu tokens of the parts exported have %llu", n,
                    (unsigned long long)n_tail, want);
        return false;
    }
    e->head.tail = (const uint8_t *)*tail_p;
    e->head.tail_bytes = (uint32_t)n;
    return true;
}

/* Memory for one batch; where each part's values lie in it. False: said. */
static bool prepare(exporter *e)
{
    e->places = calloc(e->head.n_parts, sizeof(*e->places));
    for (uint32_t i = 0; i < e->head.n_parts; i++)
        e->block_bytes += e->head.parts[i].value_bytes;
    if (e->places == NULL || e->block_bytes == 0) {
        kvctl_error("memory is out");
        return false;
    }
    size_t off = 0;
    for (uint32_t i = 0; i < e->head.n_parts; off += e->head.parts[i++].value_bytes)
        e->places[i] = (kvc_block_part){.part = e->head.parts[i].part,
                                        .value_bytes = e->head.parts[i].value_bytes,
                                        .dst_off_bytes = off,
                                        .stride_bytes = e->block_bytes};
    size_t fit = CONTEXT_BATCH_BYTES / e->block_bytes;
    e->batch_blocks =
        fit == 0 ? 1 : (uint32_t)(fit < CONTEXT_BATCH_VALUES ? fit : CONTEXT_BATCH_VALUES);
    e->bytes = malloc(e->batch_blocks * e->block_bytes);
    e->status = calloc(e->batch_blocks, e->head.n_parts);
    if (e->bytes != NULL && e->status != NULL)
        return true;
    kvctl_error("memory is out");
    return false;
}

/* Writes beside the name and takes it at the end. */
static kvctl_exit export_to(exporter *e, const char *path)
{
    char *part_path = NULL;
    if (asprintf(&part_path, "%s.part", path) < 0)
        return KVCTL_FAILED;
    e->stream = fopen(part_path, "we");
    kvctl_exit result = KVCTL_FAILED;
    if (e->stream == NULL) {
        kvctl_error("cannot create %s: %s", part_path, strerror(errno));
    } else {
        result = write_all(e);
        if (fclose(e->stream) != 0 || (result == KVCTL_OK && rename(part_path, path) != 0)) {
            kvctl_error("cannot write %s: %s", path, strerror(errno));
            result = KVCTL_FAILED;
        }
        if (result != KVCTL_OK)
            (void)unlink(part_path);
    }
    free(part_path);
    return result;
}

kvctl_exit context_export(const kvctl_globals *globals, const context_args *args)
{
    const kvctl_blocks *blocks = &args->blocks;
    exporter e = {.globals = globals};
    char *tail = NULL;
    kvc_arena arena;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvctl_file_part *parts = choose_parts(blocks, &e.head.n_parts);
    e.head.schema = blocks->schema.digest;
    e.head.block_tokens = (uint32_t)blocks->block_tokens;
    e.head.n_blocks = blocks->n_digests;
    e.head.digests = blocks->digests;
    e.head.n_tokens = blocks->n_tokens;
    e.head.tokens = blocks->tokens;
    e.head.parts = parts;
    e.total.n_blocks = blocks->n_digests;
    e.total.n_tokens = blocks->n_tokens;
    kvctl_exit result = parts != NULL && e.head.n_parts > 0 ? KVCTL_OK : KVCTL_USAGE;
    if (result == KVCTL_OK && !read_tail(&e, args->tail_path, &tail))
        result = KVCTL_USAGE;
    if (result == KVCTL_OK && !prepare(&e))
        result = KVCTL_FAILED;
    if (result == KVCTL_OK)
        result = kvctl_connect(globals, &e.client);
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = e.bytes,
                            .len_bytes = e.batch_blocks * e.block_bytes,
                            .kind = KVC_MEMORY_HOST};
    if (result == KVCTL_OK && kvc_region_register(e.client, &desc, &e.region) != KVC_OK)
        result = kvctl_failed(KVC_NO_MEMORY);
    kvc_status status = result == KVCTL_OK ? get_schema(&e, &arena) : KVC_OK;
    if (status != KVC_OK)
        result = kvctl_failed(status);
    if (result == KVCTL_OK)
        result = export_to(&e, args->out_path);
    if (result == KVCTL_OK)
        context_print_total(globals, "exported", &e.total);
    (void)kvc_region_deregister(e.client, e.region);
    kvc_client_close(e.client);
    kvc_arena_reset(&arena);
    free(tail);
    free(e.places);
    free(e.bytes);
    free(e.status);
    free(parts);
    return result;
}
