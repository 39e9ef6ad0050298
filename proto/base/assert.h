/*
 * assert.h: asserts for our own bugs. They stay on in release builds and never replace input
 * checks.
 */
#ifndef KVC_BASE_ASSERT_H
#define KVC_BASE_ASSERT_H

/* Logs the failed expression and aborts. */
_Noreturn void kvc_assert_fail(const char *expr, const char *file, int line);

#define KVC_ASSERT(expr) ((expr) ? (void)0 : kvc_assert_fail(#expr, __FILE__, __LINE__))

#endif
