/*
 * schema.c: registering schemas, and doing so again at a server that forgot them.
 *
 * The client keeps a copy of each schema that it registered (KVCI_MAX_SCHEMAS at most), so that a
 * restart of a server without a durable tier costs a miss and no error. The table only grows; it is
 * guarded by client->lock, its entries never change.
 */
#include <stdlib.h>

#include "base/digest.h"
#include "base/log.h"
#include "internal.h"

static void remember(kvc_client *client, const kvc_schema *schema, const kvc_digest *digest)
{
    kvc_schema *copy = kvc_schema_copy(schema);
    if (copy == NULL)
        return;
    kvc_mutex_lock(&client->lock);
    bool known = false;
    for (uint32_t i = 0; i < client->n_schemas && !known; i++)
        known = kvc_digest_equal(&client->schemas[i].digest, digest);
    if (!known && client->n_schemas < KVCI_MAX_SCHEMAS) {
        client->schemas[client->n_schemas++] = (kvci_schema){.digest = *digest, .schema = copy};
        copy = NULL;
    }
    kvc_mutex_unlock(&client->lock);
    free(copy);
}

static kvc_status take_digest(void *arg, const kvc_reply *reply)
{
    *(kvc_digest *)arg = reply->u.register_schema.digest;
    return KVC_OK;
}

kvc_status kvc_schema_register(kvc_client *client, const kvc_schema *schema, uint64_t deadline_ns,
                               kvc_digest *digest_p)
{
    const char *why = "";
    kvc_digest ours, theirs;
    kvc_status status = kvc_schema_check(schema, kvci_limits(client).max_value_bytes, &why);
    if (status != KVC_OK)
        return kvci_fail(status, "schema: %s", why);
    status = kvc_schema_digest(schema, &ours);
    if (status != KVC_OK)
        return kvci_fail(status, "schema: its digest cannot be computed");
    kvc_request req = {.method = KVC_REGISTER_SCHEMA, .u.register_schema.schema = schema};
    kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_digest, .take_arg = &theirs};
    status = kvci_rpc(client, &req, &opts);
    if (status != KVC_OK)
        return status;
    if (!kvc_digest_equal(&ours, &theirs))
        return kvci_fail(KVC_PROTOCOL, "schema: the server computes another digest");
    remember(client, schema, &ours);
    *digest_p = ours;
    return KVC_OK;
}

static kvc_status take_schema(void *arg, const kvc_reply *reply)
{
    *(kvc_schema **)arg = kvc_schema_copy(reply->u.get_schema.schema);
    return *(kvc_schema **)arg != NULL ? KVC_OK : KVC_NO_MEMORY;
}

kvc_status kvc_schema_get(kvc_client *client, const kvc_digest *digest, uint64_t deadline_ns,
                          kvc_schema **schema_p)
{
    kvc_request req = {.method = KVC_GET_SCHEMA, .u.get_schema.schema = *digest};
    kvci_rpc_opts opts = {.deadline_ns = deadline_ns, .take = take_schema, .take_arg = schema_p};
    kvc_digest got;
    *schema_p = NULL;
    kvc_status status = kvci_rpc(client, &req, &opts);
    if (status == KVC_OK &&
        (kvc_schema_digest(*schema_p, &got) != KVC_OK || !kvc_digest_equal(&got, digest)))
        status = kvci_fail(KVC_PROTOCOL, "schema: the server gave another one");
    if (status != KVC_OK) {
        free(*schema_p);
        *schema_p = NULL;
    }
    return status;
}

void kvci_schemas_restore(kvc_client *client, kvci_link *link, uint64_t deadline_ns)
{
    kvc_mutex_lock(&client->lock);
    uint32_t n = client->n_schemas;
    kvc_mutex_unlock(&client->lock);
    for (uint32_t i = 0; i < n; i++) {
        kvc_request req = {
            .method = KVC_REGISTER_SCHEMA,
            .u.register_schema.schema = client->schemas[i].schema,
        };
        kvc_status status = kvci_link_call(link, &req, deadline_ns, NULL, NULL, NULL);
        if (status != KVC_OK)
            KVC_LOG_WARN(CLIENT, "a schema could not be registered again: %s", kvc_last_error());
    }
}
