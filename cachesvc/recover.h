/*
 * recover.h: schemas, values and saved contexts of the last run, from lmdb.
 */
#ifndef KVS_RECOVER_H
#define KVS_RECOVER_H

#include "server.h"

/* Fills an empty server with what its lmdb tier has. The starting thread; waits for the disk. IO,
   NO_MEMORY; logged. */
kvc_status kvs_recover(kvs_server *server) KVC_MUST_CHECK;

#endif
