/*
 * le.h: whole numbers as little-endian bytes, at any alignment.
 *
 * For what two processes read: frames, tables, files, hashed bytes. Pure functions, any thread.
 */
#ifndef KVC_BASE_LE_H
#define KVC_BASE_LE_H

#include <stdint.h>

/* The low n_bytes (1 to 8) of value, to at. */
static inline void kvc_le_put(uint8_t *at, uint64_t value, uint32_t n_bytes)
{
    for (uint32_t i = 0; i < n_bytes; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

/* The number in the n_bytes (1 to 8) at at. */
static inline uint64_t kvc_le_get(const uint8_t *at, uint32_t n_bytes)
{
    uint64_t value = 0;
    for (uint32_t i = 0; i < n_bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

#endif
