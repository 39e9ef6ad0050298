/*
 * admission_record.h: the day's count of lmdb's write budget, across restarts.
 *
 * The starting thread loads, the writer and then the closing thread save: one at a time.
 */
#ifndef KVS_ADMISSION_RECORD_H
#define KVS_ADMISSION_RECORD_H

#include "server.h"

/* Takes up the day that an earlier process left. Blocks; what cannot be read is logged and a new
   day begins. Nothing without a budget or lmdb. */
void kvs_admission_load(kvs_server *server);
/* Writes the count down where the record does not cover it any more, before what was counted goes
   to lmdb; over: exactly, as the process ends. Blocks while lmdb syncs. Failures are logged, and
   tried again with the next write. */
void kvs_admission_save(kvs_server *server, bool over);

#endif
