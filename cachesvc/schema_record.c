/*
 * schema_record.c: schemas in lmdb's meta records; see schema_record.h.
 *
 * Written on disk threads, read by the starting thread. Invariant: a record's name agrees with its
 * content, or the record is not used.
 */
#include "schema_record.h"

#include <stdio.h>
#include <string.h>

#include "base/digest.h"
#include "base/log.h"
#include "wire/wire.h"

#define PREFIX      "schema/"
#define NAME_BYTES  (sizeof(PREFIX) + 2 * KVC_DIGEST_HEX_BYTES)
#define ARENA_BYTES (16u << 20)

static void record_name(const kvc_digest *tenant, const kvc_digest *digest, char name[NAME_BYTES])
{
    char tenant_hex[KVC_DIGEST_HEX_BYTES], hex[KVC_DIGEST_HEX_BYTES];
    kvc_digest_hex(tenant, tenant_hex);
    kvc_digest_hex(digest, hex);
    snprintf(name, NAME_BYTES, PREFIX "%s/%s", tenant_hex, hex);
}

kvc_status kvs_schema_record_drop(kvs_store *store, const kvs_schema *schema)
{
    char name[NAME_BYTES];
    record_name(&schema->tenant, &schema->digest, name);
    return store->ops->meta_put(store->tier, name, NULL, 0);
}

kvc_status kvs_schema_record_put(kvs_store *store, const kvc_digest *tenant,
                                 const kvc_schema *schema)
{
    char name[NAME_BYTES];
    kvc_request req = {.method = KVC_REGISTER_SCHEMA, .u.register_schema.schema = schema};
    kvc_digest digest;
    kvc_arena arena;
    const void *head;
    size_t head_bytes;
    kvc_status status = kvc_schema_digest(schema, &digest);
    if (status != KVC_OK)
        return status;
    record_name(tenant, &digest, name);
    kvc_arena_init(&arena, ARENA_BYTES);
    status = kvc_wire_encode_request(&req, &arena, &head, &head_bytes);
    if (status == KVC_OK)
        status = store->ops->meta_put(store->tier, name, head, head_bytes);
    kvc_arena_reset(&arena);
    return status;
}

static kvc_status parse_name(const char *name, kvc_digest *tenant_p, kvc_digest *digest_p)
{
    char hex[KVC_DIGEST_HEX_BYTES], own[NAME_BYTES];
    size_t at = sizeof(PREFIX) - 1, digits = KVC_DIGEST_HEX_BYTES - 1;
    if (strlen(name) != at + 2 * digits + 1 || name[at + digits] != '/')
        return KVC_INVALID;
    memcpy(hex, name + at, digits);
    hex[digits] = '\0';
    kvc_status status = kvc_digest_parse(hex, tenant_p);
    if (status == KVC_OK)
        status = kvc_digest_parse(name + at + digits + 1, digest_p);
    record_name(tenant_p, digest_p, own);
    return status == KVC_OK && strcmp(name, own) != 0 ? KVC_INVALID : status;
}

static kvc_status load_one(kvs_server *server, const char *name, const void *data, size_t len_bytes)
{
    struct iovec in = {.iov_base = (void *)(uintptr_t)data, .iov_len = len_bytes};
    kvc_digest tenant, named, digest;
    const kvs_schema *schema = NULL;
    const char *why = "its name is malformed";
    kvc_request req;
    kvc_arena arena;
    kvc_arena_init(&arena, ARENA_BYTES);
    kvc_status status = parse_name(name, &tenant, &named);
    if (status == KVC_OK)
        status = kvc_wire_decode_request(KVC_REGISTER_SCHEMA, &in, 1, &arena, &req, &why);
    if (status == KVC_OK)
        status = kvc_schema_check(req.u.register_schema.schema, KVC_MAX_VALUE_BYTES, &why);
    if (status == KVC_OK)
        status = kvc_schema_digest(req.u.register_schema.schema, &digest);
    if (status == KVC_OK && !kvc_digest_equal(&named, &digest)) {
        why = "its digest is not the one in its name";
        status = KVC_CORRUPT;
    }
    if (status == KVC_OK) {
        why = "it cannot be added";
        status = kvs_schemas_add(server->schemas, &tenant, req.u.register_schema.schema,
                                 kvs_index_class, server->index, &schema, NULL);
    }
    if (status != KVC_OK)
        KVC_LOG_WARN(SERVER, "schema record %s is left out: %s", name, why ? why : "");
    kvs_schemas_put(server->schemas, schema);
    kvc_arena_reset(&arena);
    return status;
}

typedef struct loading {
    kvs_server *server;
    kvc_status status; /* CORRUPT: a record was left out */
} loading;

static bool each_record(void *arg, const char *name, const void *data, size_t len_bytes)
{
    loading *l = arg;
    kvc_status status = load_one(l->server, name, data, len_bytes);
    if (status != KVC_OK)
        l->status = status == KVC_NO_MEMORY ? status : KVC_CORRUPT;
    return status != KVC_NO_MEMORY;
}

kvc_status kvs_schema_records_load(kvs_server *server)
{
    loading l = {.server = server, .status = KVC_OK};
    kvc_status status = server->lmdb.ops->meta_each(server->lmdb.tier, PREFIX, each_record, &l);
    if (status == KVC_OK || l.status == KVC_NO_MEMORY)
        status = l.status;
    return status;
}
