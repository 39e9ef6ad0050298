/*
 * context_saved.c: kvctl context save, restore, list and rm: contexts that the server keeps by
 * name.
 *
 * Main thread. What restore writes to files is what save was given; which blocks are still there is
 * asked with MatchPrefix.
 */
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/digest.h"
#include "context.h"

#define COMMAND "context"

/* ---- save ------------------------------------------------------------------------------------ */

/* The rows of the tail, which --parts must explain. False: said. */
static bool read_tail(const context_args *args, kvc_saved_context *context, char **tail_p,
                      size_t *tail_bytes_p)
{
    const kvctl_blocks *blocks = &args->blocks;
    *tail_p = NULL;
    *tail_bytes_p = 0;
    if (args->tail_path == NULL)
        return true;
    if (context->n_tail == 0 || blocks->n_parts == 0) {
        kvctl_error("--tail needs --parts, and --tokens with a tail");
        return false;
    }
    *tail_p = kvctl_read_file(args->tail_path, tail_bytes_p);
    context->tail_parts = blocks->parts;
    context->n_tail_parts = blocks->n_parts;
    return *tail_p != NULL;
}

static void print_saved(const kvctl_globals *globals, const kvc_saved_context *context,
                        uint64_t generation)
{
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", context->name);
        kvctl_json_number("generation", generation);
        kvctl_json_number("blocks", context->n_blocks);
        kvctl_json_number("tail_tokens", context->n_tail);
        kvctl_json_close();
        return;
    }
    (void)printf("saved: %s, generation %llu: %u blocks, %u tokens behind them\n", context->name,
                 (unsigned long long)generation, context->n_blocks, context->n_tail);
}

kvctl_exit context_save(const kvctl_globals *globals, int argc, char **argv, context_args *args)
{
    kvctl_blocks *blocks = &args->blocks;
    kvc_client *client = NULL;
    uint64_t generation = 0;
    char *tail = NULL;
    size_t tail_bytes;
    if (args->generation != 0 && args->replace)
        return kvctl_usage(COMMAND, "either --replace or --generation");
    kvc_saved_context context = {
        .name = argv[optind++],
        .promise = args->durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY,
    };
    kvctl_exit result = kvctl_blocks_read(COMMAND, argc, argv, blocks);
    if (result != KVCTL_OK)
        return result;
    context.schema = blocks->schema.digest;
    context.n_blocks = blocks->n_digests;
    context.n_ids = blocks->n_tokens;
    if (blocks->n_tokens > 0)
        context.n_tail = blocks->n_tokens - blocks->n_digests * (uint32_t)blocks->block_tokens;
    if (!read_tail(args, &context, &tail, &tail_bytes)) {
        free(tail);
        return KVCTL_USAGE;
    }
    kvc_saved_when when = {.replace = args->replace, .if_generation = args->generation};
    result = kvctl_connect(globals, &client);
    kvc_status status = KVC_OK;
    if (result == KVCTL_OK)
        status = kvc_saved_put(client, &context, blocks->digests, blocks->tokens, tail, tail_bytes,
                               &when, kvctl_deadline_ns(globals), &generation);
    if (status != KVC_OK)
        result = kvctl_failed(status);
    if (result == KVCTL_OK)
        print_saved(globals, &context, generation);
    kvc_client_close(client);
    free(tail);
    return result;
}

/* ---- restore --------------------------------------------------------------------------------- */

static void write_digests(FILE *stream, const kvc_saved *saved)
{
    char hex[KVC_DIGEST_HEX_BYTES];
    for (uint32_t i = 0; i < saved->context.n_blocks; i++) {
        kvc_digest_hex(&saved->digests[i], hex);
        (void)fprintf(stream, "%s\n", hex);
    }
}

static void write_ids(FILE *stream, const kvc_saved *saved)
{
    for (uint32_t i = 0; i < saved->context.n_ids; i++)
        (void)fprintf(stream, "%u\n", saved->ids[i]);
}

static void write_tail(FILE *stream, const kvc_saved *saved)
{
    (void)fwrite(saved->tail, 1, saved->tail_bytes, stream);
}

/* False: said. path NULL: nothing is asked for. */
static bool write_out(const char *path, const kvc_saved *saved,
                      void (*write)(FILE *stream, const kvc_saved *saved))
{
    if (path == NULL)
        return true;
    FILE *stream = fopen(path, "we");
    if (stream != NULL)
        write(stream, saved);
    bool good = stream != NULL && ferror(stream) == 0;
    if (stream != NULL)
        good = fclose(stream) == 0 && good;
    if (!good)
        kvctl_error("cannot write %s: %s", path, strerror(errno));
    return good;
}

static void print_restored(const kvctl_globals *globals, const kvc_saved *saved, uint32_t hits)
{
    const kvc_saved_context *c = &saved->context;
    char hex[KVC_DIGEST_HEX_BYTES];
    kvc_digest_hex(&c->schema, hex);
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", c->name);
        kvctl_json_number("generation", c->generation);
        kvctl_json_text("schema", hex);
        kvctl_json_number("blocks", c->n_blocks);
        kvctl_json_number("hits", hits);
        kvctl_json_number("tokens", c->n_ids);
        kvctl_json_number("tail_tokens", c->n_tail);
        kvctl_json_number("tail_bytes", saved->tail_bytes);
        kvctl_json_close();
        return;
    }
    (void)printf("restored: %s, generation %llu: %u blocks, %u token ids, a tail of %u tokens with "
                 "%zu bytes of rows\n",
                 c->name, (unsigned long long)c->generation, c->n_blocks, c->n_ids, c->n_tail,
                 saved->tail_bytes);
    if (hits == c->n_blocks)
        (void)printf("all blocks are there\n");
    else
        (void)printf("block %u is missing: %u of %u leading blocks are there\n", hits, hits,
                     c->n_blocks);
}

kvctl_exit context_restore(const kvctl_globals *globals, const char *name, const context_args *args)
{
    kvc_client *client = NULL;
    kvc_saved *saved = NULL;
    kvc_op op;
    uint32_t hits = 0;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = kvc_saved_get(client, name, kvctl_deadline_ns(globals), &saved);
    if (status == KVC_OK)
        status = kvc_match(client, &saved->context.schema, saved->digests, saved->context.n_blocks,
                           args->blocks.parts, args->blocks.n_parts, &hits,
                           kvctl_deadline_ns(globals), &op);
    if (saved != NULL && status == KVC_OK)
        status = kvctl_wait(&op, "matching");
    if (status != KVC_OK)
        result = kvctl_failed(status);
    else if (!write_out(args->digests_out, saved, write_digests) ||
             !write_out(args->tokens_out, saved, write_ids) ||
             !write_out(args->tail_out, saved, write_tail))
        result = KVCTL_FAILED;
    else
        print_restored(globals, saved, hits);
    kvc_saved_free(saved);
    kvc_client_close(client);
    return result;
}

/* ---- list, rm -------------------------------------------------------------------------------- */

static bool print_one(void *arg, const kvc_saved_context *c)
{
    const kvctl_globals *globals = arg;
    char when[32] = "";
    time_t seconds = (time_t)(c->saved_unix_ms / 1000);
    struct tm utc;
    if (gmtime_r(&seconds, &utc) != NULL)
        (void)strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &utc);
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("name", c->name);
        kvctl_json_number("generation", c->generation);
        kvctl_json_number("blocks", c->n_blocks);
        kvctl_json_number("tail_tokens", c->n_tail);
        kvctl_json_number("bytes", c->body_bytes);
        kvctl_json_bool("durable", c->promise == KVC_PROMISE_DURABLE);
        kvctl_json_text("saved", when);
        kvctl_json_close();
    } else {
        (void)printf("%s  %8u blocks  %4u tail  %10llu bytes  %-7s  %20llu  %s\n", when,
                     c->n_blocks, c->n_tail, (unsigned long long)c->body_bytes,
                     c->promise == KVC_PROMISE_DURABLE ? "durable" : "memory",
                     (unsigned long long)c->generation, c->name);
    }
    return true;
}

kvctl_exit context_list(const kvctl_globals *globals)
{
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_open("contexts", '[');
    }
    kvc_status status =
        kvc_saved_list(client, kvctl_deadline_ns(globals), print_one, (void *)(uintptr_t)globals);
    if (globals->json) {
        kvctl_json_close();
        kvctl_json_close();
    }
    if (status != KVC_OK)
        result = kvctl_failed(status);
    kvc_client_close(client);
    return result;
}

kvctl_exit context_rm(const kvctl_globals *globals, const char *name, const context_args *args)
{
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result != KVCTL_OK)
        return result;
    kvc_status status =
        kvc_saved_delete(client, name, args->generation, kvctl_deadline_ns(globals));
    if (status != KVC_OK)
        result = kvctl_failed(status);
    else if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("removed", name);
        kvctl_json_close();
    } else {
        (void)printf("removed: %s\n", name);
    }
    kvc_client_close(client);
    return result;
}
