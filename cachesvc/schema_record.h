/*
 * schema_record.h: schemas as records of a persistent tier, so that values make sense after a
 * restart. A record is named "schema/<tenant hex>/<digest hex>" and holds a RegisterSchemaRequest.
 */
#ifndef KVS_SCHEMA_RECORD_H
#define KVS_SCHEMA_RECORD_H

#include "server.h"

/* Durable on OK. Blocks: disk threads only. The tier's errors; NO_MEMORY, INVALID. */
kvc_status kvs_schema_record_put(kvs_store *store, const kvc_digest *tenant,
                                 const kvc_schema *schema) KVC_MUST_CHECK;
/* Removes the record, durably on OK. Blocks. The tier's errors. */
kvc_status kvs_schema_record_drop(kvs_store *store, const kvs_schema *schema) KVC_MUST_CHECK;
/* Adds every recorded schema to the server. At start only. CORRUPT: records were lost, or left out
   and logged; the rest is there. NO_MEMORY, and the tier's errors. */
kvc_status kvs_schema_records_load(kvs_server *server) KVC_MUST_CHECK;

#endif
