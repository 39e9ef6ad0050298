/*
 * shm_test.h: the cases of shm_raw_test.c, run by shm_test.c.
 */
#ifndef TESTS_TRANSPORT_SHM_TEST_H
#define TESTS_TRANSPORT_SHM_TEST_H

void strangers_are_cut_off(void **state);
void random_frames_do_no_harm(void **state);
void bytes_changed_under_way(void **state);

#endif
