/*
 * put_check.h: the checks of a PutBlocks, for put.c.
 */
#ifndef KVS_PUT_CHECK_H
#define KVS_PUT_CHECK_H

#include "request.h"

/* The request's promise, counts and schema, which is held as kvs_want_schema does; NULL after
   kvs_fail. */
const kvs_schema *kvs_put_check_call(kvs_server *server, kvt_call *call, const kvc_digest *tenant);
/* Every value against the schema, and their sum against the payload. False after kvs_fail. */
bool kvs_put_check_values(kvt_call *call, const kvs_schema *schema);

#endif
