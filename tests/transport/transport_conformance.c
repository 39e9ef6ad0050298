/*
 * transport_conformance.c: one suite over every registered transport and each of its schemes.
 *
 * A new transport needs one line in listen_uris below, if its scheme is a new one. Usage:
 * transport_conformance [scheme]
 */
#include "support.h"

#include "base/log.h"
#include "conformance.h"
#include "fixture.h"

#ifdef KVASIR_RDMA
#include "fake_verbs.h"
#endif

static const struct {
    const char *scheme, *uri;
} listen_uris[] = {
    {"inproc", "inproc://conformance"}, {"shm", NULL}, /* in a folder of this run */
    {"grpc", "grpc://127.0.0.1:0"},     {"grpc+unix", NULL}, {"rdma", "rdma://127.0.0.1:0"},
};

static int run_suite(const char *name, const char *uri)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_method),          cmocka_unit_test(payload_sizes),
        cmocka_unit_test(large_headers),         cmocka_unit_test(many_slices),
        cmocka_unit_test(every_error),           cmocka_unit_test(limits_of_messages),
        cmocka_unit_test(limits_of_calls),       cmocka_unit_test(limits_that_are_shared),
        cmocka_unit_test(dropped_data),          cmocka_unit_test(thousand_at_once),
        cmocka_unit_test(rows_one_to_all),       cmocka_unit_test(credits_exhausted),
        cmocka_unit_test(stale_handles),         cmocka_unit_test(wrong_lengths),
        cmocka_unit_test(registrations_fail),    cmocka_unit_test(submit_refuses),
        cmocka_unit_test(deadline_passes),       cmocka_unit_test(deadline_is_told),
        cmocka_unit_test(cancel_in_flight),      cmocka_unit_test(cancel_early),
        cmocka_unit_test(close_in_flight),       cmocka_unit_test(nobody_there),
        cmocka_unit_test(server_dies),           cmocka_unit_test(drain_waits),
        cmocka_unit_test(drain_gives_up),        cmocka_unit_test(bad_uris),
        cmocka_unit_test(name_is_taken),         cmocka_unit_test(listener_deadline),
        cmocka_unit_test(connections_beyond),    cmocka_unit_test(close_waits_for_slices),
        cmocka_unit_test(stream_in_order),       cmocka_unit_test(stream_waits_for_reader),
        cmocka_unit_test(stream_ends_badly),     cmocka_unit_test(stream_cancelled),
        cmocka_unit_test(stream_deadline),       cmocka_unit_test(stream_outlives_drain),
        cmocka_unit_test(stream_ends_go_away),   cmocka_unit_test(stream_submit_refuses),
        cmocka_unit_test(streams_side_by_side),  cmocka_unit_test(push_in_order),
        cmocka_unit_test(push_waits_for_server), cmocka_unit_test(push_cancelled),
        cmocka_unit_test(push_deadline),         cmocka_unit_test(push_given_up),
        cmocka_unit_test(push_too_much),         cmocka_unit_test(push_ends_go_away),
        cmocka_unit_test(push_refuses),
    };
    suite_uri = uri;
    print_message("suite %s on %s\n", name, uri);
    return cmocka_run_group_tests_name(name, tests, NULL, NULL);
}

#ifdef KVASIR_RDMA
static void deny_memory(uint32_t after)
{
    fake_faults faults = fake_no_faults;
    faults.reg_fails_after = after;
    fake_verbs_fault(&faults);
}
#endif

/* On the device whose address KVASIR_RDMA_ADDRESS names, or on verbs without a device: then
 * nothing may be left of them. */
static int run_rdma(const char *fake_uri)
{
#ifdef KVASIR_RDMA
    static char uri[128];
    const char *address = getenv("KVASIR_RDMA_ADDRESS");
    if (address != NULL) {
        (void)snprintf(uri, sizeof(uri), "rdma://%s:0", address);
        return run_suite("rdma", uri);
    }
    fake_verbs_use(NULL);
    conformance_deny_memory = deny_memory;
    int n_failed = run_suite("rdma", fake_uri);
    conformance_deny_memory = NULL;
    if (!fake_verbs_all_gone())
        print_error("something of the device's was left behind\n");
    return n_failed + !fake_verbs_all_gone();
#else
    (void)fake_uri;
    return 1;
#endif
}

/* Keeps gRPC alive between the cases: with the last of its users it stops its threads, one of which
 * may just have begun to look after a socket for ten seconds. Names nobody and sends nothing. */
static kvt_conn *keep_grpc(const kvt_ops *ops)
{
    kvt_conn *conn = NULL;
    kvt_connect_opts opts = {.size_bytes = sizeof(opts), .uri = "grpc://127.0.0.1:1"};
    if (strcmp(ops->name, "grpc") == 0 && ops->connect(&opts, &conn) != KVC_OK)
        print_error("no connection that keeps gRPC\n");
    return conn;
}

static int run_scheme(const char *scheme)
{
    static char uri[128];
    char dir[] = "/tmp/kvasir-transport-XXXXXX";
    for (size_t i = 0; i < sizeof(listen_uris) / sizeof(listen_uris[0]); i++) {
        if (strcmp(listen_uris[i].scheme, scheme) != 0)
            continue;
        if (strcmp(scheme, "rdma") == 0)
            return run_rdma(listen_uris[i].uri);
        if (listen_uris[i].uri != NULL)
            return run_suite(scheme, listen_uris[i].uri);
        if (mkdtemp(dir) == NULL)
            return 1;
        (void)snprintf(uri, sizeof(uri), "%s://%s/socket", scheme, dir);
        int n_failed = run_suite(scheme, uri);
        (void)rmdir(dir); /* fails, rightly, if the socket was left behind */
        return n_failed + (access(dir, F_OK) == 0);
    }
    print_error("no URI to test the scheme %s with\n", scheme);
    return 1;
}

int main(int argc, char **argv)
{
    int n_failed = 0, n_run = 0;
    const kvt_ops *ops;
    if (getenv("KVASIR_TEST_LOG") != NULL)
        kvc_log_set_level(KVC_LOG_LEVEL_TRACE);
    else
        kvc_log_set_level(KVC_LOG_LEVEL_OFF);
    for (uint32_t i = 0; (ops = kvt_at(i)) != NULL; i++) {
        for (const char *const *scheme = ops->schemes; *scheme != NULL; scheme++) {
            if (argc > 1 && strcmp(argv[1], *scheme) != 0)
                continue;
            kvt_conn *kept = keep_grpc(ops);
            n_failed += run_scheme(*scheme);
            n_run++;
            if (kept != NULL)
                ops->conn_close(kept);
        }
    }
    return n_failed > 0 || n_run == 0;
}
