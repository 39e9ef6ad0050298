/*
 * shm_test.h: the cases of shm_raw_test.c, run by shm_test.c.
 */
#ifndef TESTS_TRANSPORT_SHM_TEST_H
#define TESTS_TRANSPORT_SHM_TEST_H

void strangers_are_cut_off(void **state);
void random_frames_do_no_harm(void **state);
void bytes_changed_under_way(void **state);
void half_a_body_is_not_waited_for(void **state);
void credit_needs_a_message_that_has_left(void **state);

#endif
