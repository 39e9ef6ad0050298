/*
 * error.h: the words behind a status, per thread, for kvw_last_error.
 */
#ifndef KVWI_ERROR_H
#define KVWI_ERROR_H

#include "kvc/status.h"

/* Records the text for the calling thread and returns status: `return kvwi_fail(KVC_INVALID, ...)`.
 */
kvc_status kvwi_fail(kvc_status status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
