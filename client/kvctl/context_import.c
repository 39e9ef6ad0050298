/*
 * context_import.c: kvctl context import and check: from a file to the server.
 *
 * Main thread. The file is read twice: nothing is put before every sum of it was right.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "context.h"

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

/* Walks the file from its start, and says what is wrong with it. */
static kvctl_exit walk(FILE *stream, const char *path, kvctl_file_value *each, void *arg,
                       kvctl_file_totals *totals_p)
{
    const char *why = NULL;
    rewind(stream);
    kvc_status status = kvctl_file_walk(read_file, stream, each, arg, totals_p, &why);
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
    kvctl_exit result = walk(stream, path, put_value, im, &totals);
    if (result == KVCTL_OK && !put_batch(im))
        result = KVCTL_FAILED;
    if (im->failed != KVC_OK)
        result = kvctl_failed(im->failed);
    uint64_t refused = totals.n_values - im->total.stored - im->total.exist;
    if (result == KVCTL_OK && refused > 0) {
        kvctl_error("%llu values were not taken: the server has no room for them",
                    (unsigned long long)refused);
        result = KVCTL_FAILED;
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
    result = walk(stream, path, NULL, NULL, &totals);
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
