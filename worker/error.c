/*
 * error.c: kvw_last_error. One buffer per thread; nothing is shared.
 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "kvw/worker.h"

static _Thread_local char last_error[512];

kvc_status kvwi_fail(kvc_status status, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(last_error, sizeof(last_error), fmt, ap);
    va_end(ap);
    return status;
}

const char *kvw_last_error(void)
{
    return last_error;
}
