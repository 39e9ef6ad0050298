/*
 * common.c: names, numbers and small conversions that both ends of the gRPC transport need.
 *
 * Any thread, no state but gRPC's own.
 */
#include <stdio.h>
#include <string.h>

#include <grpc/support/log.h>

#include "base/assert.h"
#include "base/log.h"
#include "grpc_internal.h"

#define NS_PER_S 1000000000ull

/* absl::SetMutexDeadlockDetectionMode(kIgnore). Debian builds abseil with its lock-order detector
 * on; a false cycle would abort the process. Abseil has no C interface, hence the label. */
void kvti_absl_deadlock_mode(int mode) __asm__(
    "_ZN4absl7debian329SetMutexDeadlockDetectionModeENS0_15OnDeadlockCycleE");

static void log_line(gpr_log_func_args *args)
{
    if (args->severity == GPR_LOG_SEVERITY_ERROR)
        KVC_LOG_WARN(GRPC, "%s", args->message);
    else
        KVC_LOG_TRACE(GRPC, "%s", args->message);
}

void kvti_grpc_prepare(void)
{
    kvti_absl_deadlock_mode(0);
    gpr_set_log_function(log_line);
}

kvc_status kvti_grpc_target(const char *uri, char target_p[KVTI_TARGET_BYTES])
{
    static const char tcp[] = "grpc://", local[] = "grpc+unix://";
    const char *rest = uri, *prefix = "";
    if (strncmp(uri, tcp, sizeof(tcp) - 1) == 0) {
        rest += sizeof(tcp) - 1;
        if (strchr(rest, ':') == NULL || strpbrk(rest, "/?# \t\n") != NULL || rest[0] == ':')
            return KVC_INVALID;
    } else if (strncmp(uri, local, sizeof(local) - 1) == 0) {
        rest += sizeof(local) - 1;
        prefix = "unix:";
        if (rest[0] != '/' || rest[1] == '\0')
            return KVC_INVALID;
    } else {
        return KVC_INVALID;
    }
    int n = snprintf(target_p, KVTI_TARGET_BYTES, "%s%s", prefix, rest);
    return n > 0 && n < KVTI_TARGET_BYTES ? KVC_OK : KVC_INVALID;
}

const char *kvti_method_path(kvc_method method)
{
    static const char *const paths[KVC_METHOD_COUNT] = {
#define KVC_METHOD(upper, lower, name, flags) "/kvasir.v1.KvCache/" name,
#include "wire/methods.def"
#undef KVC_METHOD
    };
    return paths[method];
}

/* The table at the head of kvasir.proto. */
grpc_status_code kvti_to_grpc(kvc_status status)
{
    static const grpc_status_code codes[KVC_STATUS_COUNT] = {
        [-KVC_OK] = GRPC_STATUS_OK,
        [-KVC_AGAIN] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [-KVC_NOT_FOUND] = GRPC_STATUS_NOT_FOUND,
        [-KVC_EXISTS] = GRPC_STATUS_ALREADY_EXISTS,
        [-KVC_NO_SPACE] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [-KVC_NO_MEMORY] = GRPC_STATUS_RESOURCE_EXHAUSTED,
        [-KVC_INVALID] = GRPC_STATUS_INVALID_ARGUMENT,
        [-KVC_UNSUPPORTED] = GRPC_STATUS_UNIMPLEMENTED,
        [-KVC_TIMED_OUT] = GRPC_STATUS_DEADLINE_EXCEEDED,
        [-KVC_CANCELLED] = GRPC_STATUS_CANCELLED,
        [-KVC_CLOSED] = GRPC_STATUS_UNAVAILABLE,
        [-KVC_IO] = GRPC_STATUS_INTERNAL,
        [-KVC_PROTOCOL] = GRPC_STATUS_INVALID_ARGUMENT,
        [-KVC_DEVICE] = GRPC_STATUS_INTERNAL,
        [-KVC_STALE_HANDLE] = GRPC_STATUS_FAILED_PRECONDITION,
        [-KVC_CORRUPT] = GRPC_STATUS_DATA_LOSS,
        [-KVC_UNAVAILABLE] = GRPC_STATUS_UNAVAILABLE,
        [-KVC_DENIED] = GRPC_STATUS_PERMISSION_DENIED,
    };
    int i = -(int)status;
    KVC_ASSERT(i >= 0 && i < KVC_STATUS_COUNT);
    return codes[i];
}

kvc_status kvti_from_grpc(grpc_status_code code, const char *message)
{
    switch (code) {
    case GRPC_STATUS_OK:
        return KVC_OK;
    case GRPC_STATUS_CANCELLED:
        return KVC_CANCELLED;
    case GRPC_STATUS_INVALID_ARGUMENT:
    case GRPC_STATUS_OUT_OF_RANGE:
        return KVC_INVALID;
    case GRPC_STATUS_DEADLINE_EXCEEDED:
        return KVC_TIMED_OUT;
    case GRPC_STATUS_NOT_FOUND:
        return KVC_NOT_FOUND;
    case GRPC_STATUS_ALREADY_EXISTS:
        return KVC_EXISTS;
    case GRPC_STATUS_PERMISSION_DENIED:
    case GRPC_STATUS_UNAUTHENTICATED:
        return KVC_DENIED;
    case GRPC_STATUS_RESOURCE_EXHAUSTED:
        /* gRPC's own length check uses this code; trying again would not help. */
        return strstr(message, "message larger than max") != NULL ? KVC_INVALID : KVC_AGAIN;
    case GRPC_STATUS_FAILED_PRECONDITION:
        return KVC_STALE_HANDLE;
    case GRPC_STATUS_UNIMPLEMENTED:
        return KVC_UNSUPPORTED;
    case GRPC_STATUS_DATA_LOSS:
        return KVC_CORRUPT;
    case GRPC_STATUS_UNAVAILABLE:
        return KVC_UNAVAILABLE;
    default:
        return KVC_IO;
    }
}

gpr_timespec kvti_to_timespec(uint64_t deadline_ns)
{
    if (deadline_ns == 0)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return (gpr_timespec){
        .tv_sec = (int64_t)(deadline_ns / NS_PER_S),
        .tv_nsec = (int32_t)(deadline_ns % NS_PER_S),
        .clock_type = GPR_CLOCK_MONOTONIC,
    };
}

uint64_t kvti_from_timespec(gpr_timespec deadline)
{
    gpr_timespec at = gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC);
    if (gpr_time_cmp(at, gpr_inf_future(GPR_CLOCK_MONOTONIC)) == 0)
        return 0;
    if (at.tv_sec < 0)
        return 1;
    if ((uint64_t)at.tv_sec >= UINT64_MAX / NS_PER_S)
        return UINT64_MAX; /* a peer may name a deadline as far away as it likes */
    return (uint64_t)at.tv_sec * NS_PER_S + (uint64_t)at.tv_nsec;
}

grpc_arg kvti_arg(const char *key, int value)
{
    grpc_arg arg = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key};
    arg.value.integer = value;
    return arg;
}

struct iovec *kvti_byte_buffer_pieces(grpc_byte_buffer *bb, kvc_arena *arena, uint32_t *n_p)
{
    const grpc_slice_buffer *slices = &bb->data.raw.slice_buffer;
    struct iovec *pieces = kvc_arena_alloc(arena, slices->count * sizeof(*pieces));
    if (pieces == NULL)
        return NULL;
    for (size_t i = 0; i < slices->count; i++) {
        /* A small slice holds its bytes inside, so its address is taken where it lies. */
        pieces[i].iov_base = GRPC_SLICE_START_PTR(slices->slices[i]);
        pieces[i].iov_len = GRPC_SLICE_LENGTH(slices->slices[i]);
    }
    *n_p = (uint32_t)slices->count;
    return pieces;
}

bool kvti_run_one(grpc_completion_queue *cq, uint64_t deadline_ns)
{
    grpc_event event = grpc_completion_queue_next(cq, kvti_to_timespec(deadline_ns), NULL);
    if (event.type == GRPC_QUEUE_SHUTDOWN)
        return false;
    if (event.type != GRPC_OP_COMPLETE)
        return true;
    kvti_tag *tag = event.tag;
    (void)atomic_load_explicit(&tag->turn, memory_order_acquire);
    tag->fn(tag, event.success != 0);
    return true;
}

void kvti_run_queue(grpc_completion_queue *cq)
{
    while (kvti_run_one(cq, 0))
        ;
}

void kvti_start(grpc_call *call, const grpc_op *ops, size_t n_ops, kvti_tag *tag)
{
    kvti_give(tag);
    grpc_call_error error = grpc_call_start_batch(call, ops, n_ops, tag, NULL);
    KVC_ASSERT(error == GRPC_CALL_OK);
}
