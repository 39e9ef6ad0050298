/*
 * assert.c: the end of a process that found a bug of its own.
 *
 * The only place of the floor that may abort; input never leads here. The line goes out even when
 * logging is off. Any thread; takes no lock, so that it works while locks are held.
 */
#include "base/assert.h"

#include <stdlib.h>

#include "base/log.h"

void kvc_assert_fail(const char *expr, const char *file, int line)
{
    kvc_log(KVC_LOG_LEVEL_ERROR, "ASSERT", "%s failed at %s:%d", expr, file, line);
    abort();
}
