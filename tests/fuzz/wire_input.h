/*
 * wire_input.h: what the bytes of a fuzz input mean: [method] [cut] [message ...].
 *
 * The message is decoded whole, and in pieces of cut bytes (0: one piece).
 */
#ifndef TESTS_FUZZ_WIRE_INPUT_H
#define TESTS_FUZZ_WIRE_INPUT_H

#define WIRE_INPUT_HEAD_BYTES 2

#endif
