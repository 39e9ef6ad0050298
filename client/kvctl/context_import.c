/*
 * context_import.c: kvctl context import and check: from a file to the server.
 *
 * Main thread. The file is read twice, or three times where it is saved by name too: nothing is put
 * before every sum of it was right, and no name given before every value was put.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "context.h"
#include "wire/wire.h"

#define ARENA_BYTES (16u << 20)

static bool read_file(void *arg, void *dst, size_t n)
{
    return fread(dst, 1, n, arg) == n;
}

typedef struct importer {
    const kvctl_globals *globals;
    const context_args *args;
    kvc_client *client;
    kvc_region *region;
    uint8_t *bytes;
    kvc_value values[CONTEXT_BATCH_VALUES];
    int8_t status[CONTEXT_BATCH_VALUES];
    uint32_t n;
    size_t used_bytes;
    kvc_digest schema;
    kvc_status failed;
    bool said; /* why it failed */
    context_total total;
} importer;

/* Puts what has gathered. False: failed says why. */
static bool put_batch(importer *im)
{
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    if (im->n == 0)
        return true;
    im->failed = kvc_put(im->client, &im->schema,
                         im->args->durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY, im->values,
                         im->n, im->region, im->status, kvctl_deadline_ns(im->globals), &op);
    if (im->failed == KVC_OK)
        im->failed = kvctl_wait(&op, "importing");
    for (uint32_t i = 0; im->failed == KVC_OK && i < im->n; i++) {
        im->total.stored += im->status[i] == KVC_OK;
        im->total.exist += im->status[i] == KVC_EXISTS;
    }
    im->n = 0;
    im->used_bytes = 0;
    return im->failed == KVC_OK;
}

static bool put_value(void *arg, const kvctl_file_head *head, uint32_t block, uint32_t part,
                      const uint8_t *bytes)
{
    importer *im = arg;
    uint32_t len_bytes = head->parts[part].value_bytes;
    im->schema = head->schema;
    if (im->n == CONTEXT_BATCH_VALUES || im->used_bytes + len_bytes > CONTEXT_BATCH_BYTES)
        if (!put_batch(im))
            return false;
    memcpy(im->bytes + im->used_bytes, bytes, len_bytes);
    im->values[im->n++] = (kvc_value){.digest = head->digests[block],
                                      .part = head->parts[part].part,
                                      .len_bytes = len_bytes,
                                      .src_off_bytes = im->used_bytes};
    im->used_bytes += len_bytes;
    return true;
}

/* Registers the file's schema, so that a fresh server takes its values. */
static bool register_schema(void *arg, const kvctl_file_head *head)
{
    importer *im = arg;
    struct iovec in = {.iov_base = (void *)(uintptr_t)head->schema_msg,
                       .iov_len = head->schema_bytes};
    const char *why = "";
    kvc_digest digest;
    kvc_request req;
    kvc_arena arena;
    if (head->schema_bytes == 0)
        return true;
    kvc_arena_init(&arena, ARENA_BYTES);
    im->failed = kvc_wire_decode_request(KVC_REGISTER_SCHEMA, &in, 1, &arena, &req, &why);
    if (im->failed == KVC_OK)
        im->failed = kvc_schema_digest(req.u.register_schema.schema, &digest);
    if (im->failed != KVC_OK || !kvc_digest_equal(&digest, &head->schema)) {
        kvctl_error("the file's schema is not the one that it names%s%s", why[0] ? ": " : "", why);
        im->failed = KVC_CORRUPT;
        im->said = true;
    } else {
        im->failed = kvc_schema_register(im->client, req.u.register_schema.schema,
                                         kvctl_deadline_ns(im->globals), &digest);
    }
    kvc_arena_reset(&arena);
    return im->failed == KVC_OK;
}

/* Saves what the head says under the name of --save; the rest of the file is not needed. */
static bool save_head(void *arg, const kvctl_file_head *head)
{
    importer *im = arg;
    uint32_t *parts = calloc(head->n_parts, sizeof(*parts));
    kvc_saved_when when = {.replace = im->args->replace, .if_generation = im->args->generation};
    kvc_saved_context context = {
        .name = im->args->save_name,
        .schema = head->schema,
        .promise = im->args->durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY,
        .n_blocks = head->n_blocks,
        .n_ids = head->n_tokens,
        .n_tail = head->n_tokens % head->block_tokens,
        .n_tail_parts = head->tail_bytes > 0 ? head->n_parts : 0,
        .tail_parts = parts,
    };
    for (uint32_t i = 0; parts != NULL && i < head->n_parts; i++)
        parts[i] = head->parts[i].part;
    im->failed = KVC_NO_MEMORY;
    if (parts != NULL)
        im->failed = kvc_saved_put(im->client, &context, head->digests, head->tokens, head->tail,
                                   head->tail_bytes, &when, kvctl_deadline_ns(im->globals), NULL);
    free(parts);
    return false;
}

/* Walks the file from its start, and says what is wrong with it. */
static kvctl_exit walk(FILE *stream, const char *path, kvctl_file_opened *opened,
                       kvctl_file_value *each, void *arg, kvctl_file_totals *totals_p)
{
    const char *why = NULL;
    rewind(stream);
    kvc_status status = kvctl_file_walk(read_file, stream, opened, each, arg, totals_p, &why);
    if (status == KVC_OK)
        return KVCTL_OK;
    if (status != KVC_CANCELLED)
        kvctl_error("%s: %s: %s", path, kvc_status_name(status), why);
    return KVCTL_FAILED;
}

static kvctl_exit put_all(importer *im, FILE *stream, const char *path)
{
    kvctl_file_totals totals;
    kvc_region_desc desc = {.size_bytes = sizeof(desc),
                            .base = im->bytes,
                            .len_bytes = CONTEXT_BATCH_BYTES,
                            .kind = KVC_MEMORY_HOST};
    if (kvc_region_register(im->client, &desc, &im->region) != KVC_OK)
        return kvctl_failed(KVC_NO_MEMORY);
    kvctl_exit result = walk(stream, path, register_schema, put_value, im, &totals);
    if (result == KVCTL_OK && !put_batch(im))
        result = KVCTL_FAILED;
    if (im->failed != KVC_OK)
        result = im->said ? KVCTL_FAILED : kvctl_failed(im->failed);
    uint64_t refused = totals.n_values - im->total.stored - im->total.exist;
    if (result == KVCTL_OK && refused > 0) {
        kvctl_error("%llu values were not taken: the server has no room for them",
                    (unsigned long long)refused);
        result = KVCTL_FAILED;
    }
    if (result == KVCTL_OK && im->args->save_name != NULL) {
        (void)walk(stream, path, save_head, NULL, im, &totals); /* it stops at the head */
        if (im->failed != KVC_OK)
            result = kvctl_failed(im->failed);
    }
    (void)kvc_region_deregister(im->client, im->region);
    return result;
}

kvctl_exit context_import(const kvctl_globals *globals, const context_args *args, const char *path,
                          bool check_only)
{
    importer *im = calloc(1, sizeof(*im));
    FILE *stream = fopen(path, "re");
    kvctl_exit result = KVCTL_USAGE;
    kvctl_file_totals totals;
    if (stream == NULL || im == NULL) {
        kvctl_error("cannot open %s: %s", path, strerror(errno));
        goto done;
    }
    im->globals = globals;
    im->args = args;
    result = walk(stream, path, NULL, NULL, NULL, &totals);
    im->total = (context_total){
        .n_blocks = totals.n_blocks,
        .n_tokens = totals.n_tokens,
        .values = totals.n_values,
        .missing = (uint64_t)totals.n_blocks * totals.n_parts - totals.n_values,
    };
    if (result == KVCTL_OK && !check_only) {
        im->bytes = malloc(CONTEXT_BATCH_BYTES);
        result = im->bytes != NULL ? kvctl_connect(globals, &im->client) : KVCTL_FAILED;
        if (result == KVCTL_OK)
            result = put_all(im, stream, path);
    }
    if (result == KVCTL_OK)
        context_print_total(globals, check_only ? "whole" : "imported", &im->total);
done:
    if (im != NULL) {
        kvc_client_close(im->client);
        free(im->bytes);
    }
    free(im);
    if (stream != NULL)
        (void)fclose(stream);
    return result;
}
