// What the two kernels of pipeline/resampling.py share: the taps of an axis, and what the processor can do.

#ifndef EDGEFOLD_RESAMPLE_H
#define EDGEFOLD_RESAMPLE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define HALF (1 << 21)
#define FRACTION_BITS 22
#define LANES 16
#define LINE 64

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif

// Four byte products and their sum in one instruction: Ice Lake, Zen 4 and later. A weight is w0 + 2^8 w1 + 2^16 w2 with
// signed bytes (its magnitude is below 2^23), and the sum of products with whole weights is the same sum of the three
// with bytes, modulo 2^32 as every sum here: exact.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(NO_VNNI)
#define WITH_VNNI
#include <immintrin.h>
#define FOR_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define BYTES_A_WEIGHT 3

// Rows that lie so far ahead are asked for while others are filtered. A picture was written by another core or by a
// device, and what a processor fetches by itself ends with a row or a page: a fifth to a third of the time was waiting.
#define ROWS_AHEAD 16

// `offset` may lead behind the picture: nothing is read.
static inline void fetch(const uint8_t *bytes, int64_t offset) {
    _mm_prefetch((const char *)((uintptr_t)bytes + (uintptr_t)offset), _MM_HINT_T1);
}

static inline int has_vnni(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

// For each of `length` positions: the first source position, how many follow, and `width` weights.
struct taps {
    const int32_t *first, *count, *weights;
    int32_t length, width;
};

static inline uint8_t to_byte(int32_t sum) {
    const int32_t value = sum >> FRACTION_BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

// The source positions that any output position uses: [*begin, *end).
static inline void extent(const struct taps *taps, int *begin, int *end) {
    *begin = INT32_MAX;
    *end = 0;
    for (int i = 0; i < taps->length; ++i) {
        if (taps->count[i] == 0) continue;
        if (taps->first[i] < *begin) *begin = taps->first[i];
        if (taps->first[i] + taps->count[i] > *end) *end = taps->first[i] + taps->count[i];
    }
    if (*end == 0) *begin = 0;
}

#endif
