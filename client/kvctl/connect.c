/*
 * connect.c: reaching the server, waiting for it, and saying what went wrong.
 *
 * Main thread. Waits are cut into slices, so that the progress line shows that something happens.
 */
#include "base/clock.h"
#include "kvctl.h"
#include "kvctl_progress.h"

#define SLICE_NS ((uint64_t)100 * 1000000)

kvctl_exit kvctl_connect(const kvctl_globals *globals, kvc_client **client_p)
{
    kvc_client_opts opts = {
        .size_bytes = sizeof(opts),
        .uris = globals->server,
        .default_timeout_ns = globals->timeout_ns,
        .n_channels = 2,
        .sums = globals->sums,
    };
    uint64_t deadline_ns = kvctl_deadline_ns(globals), now_ns = kvc_now_ns();
    kvctl_progress *progress = kvctl_progress_start("connecting", 0, NULL);
    kvc_status status = KVC_TIMED_OUT;
    *client_p = NULL;
    while (now_ns < deadline_ns && (status == KVC_TIMED_OUT || status == KVC_UNAVAILABLE)) {
        /* A refused connection fails at once, a silent host after its slice: ten of them. */
        uint64_t slice_ns =
            globals->timeout_ns / 10 > SLICE_NS ? globals->timeout_ns / 10 : SLICE_NS;
        opts.connect_timeout_ns = deadline_ns - now_ns < slice_ns ? deadline_ns - now_ns : slice_ns;
        status = kvc_client_open(&opts, client_p);
        kvctl_progress_set(progress, 0);
        now_ns = kvc_now_ns();
    }
    kvctl_progress_stop(progress);
    if (status == KVC_OK)
        return KVCTL_OK;
    kvctl_error("cannot reach %s: %s", globals->server, kvc_last_error());
    if (status == KVC_INVALID || status == KVC_UNSUPPORTED)
        return KVCTL_USAGE;
    kvctl_error("is cachesvc running there? 'kvctl doctor' says more");
    return KVCTL_UNREACHED;
}

kvc_status kvctl_wait(kvc_op *op, const char *label)
{
    kvctl_progress *progress = kvctl_progress_start(label, 0, NULL);
    kvc_status status;
    uint64_t slice_end_ns;
    do {
        slice_end_ns = kvc_now_ns() + SLICE_NS;
        status = kvc_op_wait(op, slice_end_ns);
        kvctl_progress_set(progress, 0);
        /* TIMED_OUT before the slice's end is the op's own. */
    } while (status == KVC_TIMED_OUT && kvc_now_ns() >= slice_end_ns);
    kvctl_progress_stop(progress);
    return status;
}

kvctl_exit kvctl_failed(kvc_status status)
{
    kvctl_error("%s", kvc_last_error());
    return status == KVC_UNAVAILABLE ? KVCTL_UNREACHED : KVCTL_FAILED;
}

uint64_t kvctl_deadline_ns(const kvctl_globals *globals)
{
    return kvc_deadline_ns(globals->timeout_ns);
}
