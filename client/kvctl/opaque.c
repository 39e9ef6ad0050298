/*
 * opaque.c: kvctl put and kvctl get of one opaque value.
 *
 * Main thread. The value is held whole, up to what kvctl reads of a file.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/sum.h"
#include "kvctl.h"

#define FIRST_ROOM_BYTES (1u << 20)

/* A line of the schema's text, its escapes resolved. The caller frees; NULL: it is not there. */
static char *schema_line(const char *text, const char *key)
{
    size_t key_bytes = strlen(key);
    const char *line = text;
    while (line != NULL && (strncmp(line, key, key_bytes) != 0 || line[key_bytes] != '=')) {
        line = strchr(line, '\n');
        line = line != NULL ? line + 1 : NULL;
    }
    if (line == NULL)
        return NULL;
    line += key_bytes + 1;
    char *value = strndup(line, strcspn(line, "\n")), *out = value;
    for (const char *at = value; value != NULL && *at != '\0'; at++) {
        char hex[3] = {at[0] == '%' ? at[1] : '\0', at[0] == '%' && at[1] ? at[2] : '\0', '\0'};
        bool escape = strlen(hex) == 2;
        *out++ = escape ? (char)strtoul(hex, NULL, 16) : *at;
        at += escape ? 2 : 0;
    }
    if (value != NULL)
        *out = '\0';
    return value;
}

/* Tells the server of a schema whose text is known. */
static kvc_status make_known(const kvctl_globals *globals, kvc_client *client,
                             const kvctl_schema *schema)
{
    if (schema->text == NULL)
        return KVC_OK;
    kvc_digest digest;
    char *model = schema_line(schema->text, "model");
    char *revision = schema_line(schema->text, "revision");
    char *recipe = schema_line(schema->text, "recipe");
    kvc_schema opaque = {.model = model,
                         .revision = revision,
                         .recipe = recipe,
                         .tp_size = kvctl_schema_number(schema, "tp_size"),
                         .opaque = kvctl_schema_number(schema, "opaque")};
    kvc_status status = kvc_schema_register(client, &opaque, kvctl_deadline_ns(globals), &digest);
    if (status == KVC_OK && memcmp(&digest, &schema->digest, sizeof(digest)) != 0) {
        kvctl_error("the schema's file is not the text of an opaque schema");
        status = KVC_INVALID;
    }
    free(model);
    free(revision);
    free(recipe);
    return status;
}

static kvc_status region_of(kvc_client *client, void *bytes, size_t len_bytes,
                            kvc_region **region_p)
{
    kvc_region_desc desc = {
        .size_bytes = sizeof(desc), .base = bytes, .len_bytes = len_bytes, .kind = KVC_MEMORY_HOST};
    return kvc_region_register(client, &desc, region_p);
}

/* ---- put ------------------------------------------------------------------------------------- */

/* Puts again what is AGAIN, until the timeout. */
static kvc_status put_value(const kvctl_globals *globals, const kvctl_opaque *args,
                            kvc_client *client, char *bytes, size_t len_bytes, int8_t *stored_p)
{
    kvc_region *region = NULL;
    kvc_opaque_value value = {.digest = args->digest, .len_bytes = len_bytes};
    uint64_t until_ns = kvctl_deadline_ns(globals);
    kvc_op op;
    kvc_op_init(&op, NULL, NULL);
    kvc_status status = region_of(client, bytes, len_bytes + 1, &region);
    *stored_p = KVC_AGAIN;
    while (status == KVC_OK && *stored_p == KVC_AGAIN && !kvc_expired(until_ns)) {
        status = kvc_opaque_put(client, &args->schema->digest,
                                args->durable ? KVC_PROMISE_DURABLE : KVC_PROMISE_MEMORY, 0, &value,
                                1, region, stored_p, until_ns, &op);
        if (status == KVC_OK)
            status = kvctl_wait(&op, "storing");
    }
    (void)kvc_region_deregister(client, region);
    return status;
}

static kvctl_exit report_put(const kvctl_globals *globals, kvc_status stored, size_t len_bytes)
{
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("status", kvc_status_name(stored));
        kvctl_json_number("bytes", len_bytes);
        kvctl_json_close();
    } else if (stored == KVC_OK) {
        (void)printf("stored %zu bytes\n", len_bytes);
    } else if (stored == KVC_EXISTS) {
        (void)printf("the key has a value already: first put wins\n");
    } else {
        kvctl_error("not stored: %s", kvc_status_name(stored));
    }
    return stored == KVC_OK || stored == KVC_EXISTS ? KVCTL_OK : KVCTL_FAILED;
}

kvctl_exit kvctl_opaque_put(const kvctl_globals *globals, const kvctl_opaque *args)
{
    size_t len_bytes = 0;
    int8_t stored = KVC_OK;
    kvc_client *client = NULL;
    char *bytes = kvctl_read_file(args->path, &len_bytes);
    if (bytes == NULL)
        return KVCTL_USAGE;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result == KVCTL_OK) {
        kvc_status status = make_known(globals, client, args->schema);
        if (status == KVC_OK)
            status = put_value(globals, args, client, bytes, len_bytes, &stored);
        result = status == KVC_OK ? report_put(globals, (kvc_status)stored, len_bytes)
                                  : kvctl_failed(status);
    }
    kvc_client_close(client);
    free(bytes);
    return result;
}

/* ---- get ------------------------------------------------------------------------------------- */

/* Gets it into room_bytes at *bytes_p, or into as many as it turns out to need. */
static kvc_status get_value(const kvctl_globals *globals, const kvctl_opaque *args,
                            kvc_client *client, uint8_t **bytes_p, kvc_opaque_value *value,
                            int8_t *got_p)
{
    kvc_status status = KVC_OK;
    *value = (kvc_opaque_value){.digest = args->digest, .len_bytes = FIRST_ROOM_BYTES};
    *got_p = KVC_NO_SPACE;
    for (uint32_t tries = 0; status == KVC_OK && *got_p == KVC_NO_SPACE && tries < 3; tries++) {
        kvc_region *region = NULL;
        kvc_op op;
        kvc_op_init(&op, NULL, NULL);
        free(*bytes_p);
        *bytes_p = malloc((size_t)value->len_bytes + 1);
        status = *bytes_p != NULL
                     ? region_of(client, *bytes_p, (size_t)value->len_bytes + 1, &region)
                     : KVC_NO_MEMORY;
        if (status == KVC_OK)
            status = kvc_opaque_get(client, &args->schema->digest, value, 1, region, got_p,
                                    kvctl_deadline_ns(globals), &op);
        if (status == KVC_OK)
            status = kvctl_wait(&op, "reading");
        (void)kvc_region_deregister(client, region);
    }
    return status;
}

static void report_get(const kvctl_globals *globals, const char *path, const uint8_t *bytes,
                       size_t len_bytes)
{
    char sum[17];
    (void)snprintf(sum, sizeof(sum), "%016llx",
                   (unsigned long long)kvc_value_sum(bytes, len_bytes));
    if (globals->json) {
        kvctl_json_open(NULL, '{');
        kvctl_json_text("file", path);
        kvctl_json_number("bytes", len_bytes);
        kvctl_json_text("sum", sum);
        kvctl_json_close();
    } else if (strcmp(path, "-") != 0) {
        (void)printf("%zu bytes, XXH3-64 %s\n", len_bytes, sum);
    }
}

kvctl_exit kvctl_opaque_get(const kvctl_globals *globals, const kvctl_opaque *args)
{
    int8_t got = KVC_OK;
    kvc_opaque_value value;
    uint8_t *bytes = NULL;
    kvc_client *client = NULL;
    kvctl_exit result = kvctl_connect(globals, &client);
    if (result == KVCTL_OK) {
        kvc_status status = get_value(globals, args, client, &bytes, &value, &got);
        if (status != KVC_OK)
            result = kvctl_failed(status);
    }
    if (result == KVCTL_OK && got != KVC_OK) {
        kvctl_error("%s: the value of this key", kvc_status_name((kvc_status)got));
        result = KVCTL_FAILED;
    }
    if (result == KVCTL_OK)
        result = kvctl_write_value(args->path, bytes, (size_t)value.len_bytes);
    if (result == KVCTL_OK)
        report_get(globals, args->path, bytes, (size_t)value.len_bytes);
    kvc_client_close(client);
    free(bytes);
    return result;
}
