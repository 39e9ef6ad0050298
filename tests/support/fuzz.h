/*
 * fuzz.h: the function that libFuzzer calls with each input; a fuzz program defines it.
 */
#ifndef KVASIR_TEST_FUZZ_H
#define KVASIR_TEST_FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Borrows data [size]. Always 0; a finding is a crash. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
