/*
 * wire_test.h: the cases of wire_bad_input_test.c, run by wire_test.c.
 *
 * Single thread; every case owns what it allocates.
 */
#ifndef TESTS_WIRE_TEST_H
#define TESTS_WIRE_TEST_H

void bad_framing(void **state);
void bad_nesting(void **state);
void limits_on_decode(void **state);
void order_and_repeats(void **state);
void packed_and_unpacked(void **state);
void every_truncation(void **state);
void bad_replies(void **state);
void little_memory(void **state);

#endif
