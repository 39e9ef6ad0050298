/*
 * conformance.h: the cases of the suite that every registered transport has to pass.
 *
 * Each case opens its own fixture on suite_uri.
 */
#ifndef TESTS_TRANSPORT_CONFORMANCE_H
#define TESTS_TRANSPORT_CONFORMANCE_H

#include <stdint.h>

/* conformance_calls.c: requests and answers */
void every_method(void **state);
void payload_sizes(void **state);
void many_slices(void **state);
void every_error(void **state);
void limits_of_messages(void **state);
void limits_of_calls(void **state);
void limits_that_are_shared(void **state);
void dropped_data(void **state);
void close_waits_for_slices(void **state);
void thousand_at_once(void **state);
void submit_refuses(void **state);

/* conformance_rows.c */
void rows_one_to_all(void **state);
void credits_exhausted(void **state);
void stale_handles(void **state);
void wrong_lengths(void **state);
void registrations_fail(void **state);
/* Lets so many more registrations of memory go well, UINT32_MAX: all; NULL: there are none, or they
 * cannot be refused. */
extern void (*conformance_deny_memory)(uint32_t after);

/* conformance_headers.c: what does not fit a small message */
void large_headers(void **state);

/* conformance_ends.c: deadlines, cancels, and ends that go away */
void deadline_passes(void **state);
void deadline_is_told(void **state);
void cancel_in_flight(void **state);
void cancel_early(void **state);
void close_in_flight(void **state);
void nobody_there(void **state);
void server_dies(void **state);
void drain_waits(void **state);
void drain_gives_up(void **state);
void listener_deadline(void **state);
void connections_beyond(void **state);
void bad_uris(void **state);
void name_is_taken(void **state);

/* conformance_streams.c: replies that stream */
void stream_in_order(void **state);
void stream_waits_for_reader(void **state);
void stream_ends_badly(void **state);
void stream_cancelled(void **state);
void stream_deadline(void **state);
void stream_outlives_drain(void **state);
void stream_ends_go_away(void **state);
void stream_submit_refuses(void **state);
void streams_side_by_side(void **state);

/* conformance_pushes.c: requests that stream */
void push_in_order(void **state);
void push_waits_for_server(void **state);
void push_cancelled(void **state);
void push_deadline(void **state);
void push_given_up(void **state);
void push_too_much(void **state);
void push_ends_go_away(void **state);
void push_refuses(void **state);

#endif
