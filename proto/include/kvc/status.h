/*
 * status.h: the one result type of every Kvasir layer.
 *
 * A function that can fail returns kvc_status: KVC_OK or a negative code. The first function to see
 * an error logs it and picks the code; callers pass it on. Header only, so that kernels/ may use it
 * without linking the floor.
 */
#ifndef KVC_STATUS_H
#define KVC_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

#define KVC_MUST_CHECK __attribute__((warn_unused_result))

typedef enum kvc_status {
    KVC_OK = 0,
    KVC_AGAIN = -1,         /* full: back-pressure; let something finish, then retry */
    KVC_NOT_FOUND = -2,     /* the thing named is not here */
    KVC_EXISTS = -3,        /* first put won; the bytes of this one were not taken */
    KVC_NO_SPACE = -4,      /* a configured cap or the disk is exhausted for good */
    KVC_NO_MEMORY = -5,     /* the allocator failed */
    KVC_INVALID = -6,       /* an argument or message is malformed or out of range */
    KVC_UNSUPPORTED = -7,   /* this build, device or peer cannot do it */
    KVC_TIMED_OUT = -8,     /* the deadline passed */
    KVC_CANCELLED = -9,     /* the caller cancelled it */
    KVC_CLOSED = -10,       /* the object was closed, or the server is draining */
    KVC_IO = -11,           /* the medium failed */
    KVC_PROTOCOL = -12,     /* the peer sent bytes that do not parse */
    KVC_DEVICE = -13,       /* an accelerator failed */
    KVC_STALE_HANDLE = -14, /* a context handle of another boot, tenant or expired TTL: reopen */
    KVC_CORRUPT = -15,      /* stored bytes do not match their sum; never served */
    KVC_UNAVAILABLE = -16,  /* the peer cannot be reached at present */
    KVC_DENIED = -17,       /* the identity given may not do this */
} kvc_status;

/* The number of codes, KVC_OK included: -status indexes a table of this size. */
#define KVC_STATUS_COUNT 18

/*
 * The code's name in capitals without prefix ("NOT_FOUND"); "UNKNOWN" for a value outside the enum.
 * Any thread; static storage, never NULL.
 */
static inline const char *kvc_status_name(kvc_status status)
{
    static const char *const names[KVC_STATUS_COUNT] = {
        "OK",       "AGAIN",       "NOT_FOUND",    "EXISTS",    "NO_SPACE",    "NO_MEMORY",
        "INVALID",  "UNSUPPORTED", "TIMED_OUT",    "CANCELLED", "CLOSED",      "IO",
        "PROTOCOL", "DEVICE",      "STALE_HANDLE", "CORRUPT",   "UNAVAILABLE", "DENIED",
    };
    int i = -(int)status;
    return i >= 0 && i < KVC_STATUS_COUNT ? names[i] : "UNKNOWN";
}

#ifdef __cplusplus
}
#endif
#endif
