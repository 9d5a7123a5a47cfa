// Pillow's two-pass resampling of 8-bit images, for the crop alone and straight from a camera's buffer.
//
// The arithmetic is that of Pillow's Resample.c: weights of 22 fractional bits, an int32 sum that starts at a half,
// bytes between the passes. So the pixels are Pillow's, bit for bit, whatever the machine. What is saved: Pillow
// first copies the image into its own storage of four bytes a pixel, then filters columns that the crop throws away.
//
// Called by pipeline/resampling.py, which has made the taps and checked that they lie inside the image.

#include "resample.h"

#define ROWS 4
#define PADDING 64  // how far a row is read past its end: less than 16 pixels of four bytes

// GNU C vectors: SSE, AVX2, AVX-512 or NEON where the processor has them, plain code where it does not.
typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t halves16 __attribute__((vector_size(2 * LANES)));
typedef int32_t words4 __attribute__((vector_size(16)));
typedef int32_t words16 __attribute__((vector_size(4 * LANES)));

#ifdef WITH_VNNI
#define TAPS_A_VECTOR 16
#endif

// The weights as `filter_colour_rows` takes them: four taps a vector, each weight four times (three channels and one
// lane that is thrown away), 0 beyond the last tap.
static words16 *spread(const struct taps *taps) {
    const int n_vectors = (taps->width + 3) / 4;
    words16 *all = aligned_alloc(sizeof(words16), (size_t)taps->length * n_vectors * sizeof(words16));
    for (int x = 0; all && x < taps->length; ++x)
        for (int v = 0; v < n_vectors; ++v)
            for (int lane = 0; lane < LANES; ++lane) {
                const int t = 4 * v + lane / 4;
                all[(int64_t)x * n_vectors + v][lane] =
                    t < taps->count[x] ? taps->weights[(int64_t)x * taps->width + t] : 0;
            }
    return all;
}

// Filters rows along their pixels; several at once share the weights, and their sums overlap. `step` is 3 or 4.
static inline __attribute__((always_inline)) void filter_colour_rows(
    const uint8_t *const *rows, const int n_rows, const int step, int offset, const struct taps *taps,
    const words16 *weights, int reverse, uint8_t *const *out) {
    const int n_vectors = (taps->width + 3) / 4;
    const bytes16 lanes = {0,        1,            2,            3,        step,         step + 1,
                           step + 2, step + 3,     2 * step,     2 * step + 1, 2 * step + 2, 2 * step + 3,
                           3 * step, 3 * step + 1, 3 * step + 2, 15};
    for (int x = 0; x < taps->length; ++x, weights += n_vectors) {
        const int64_t start = (int64_t)(taps->first[x] - offset) * step;
        words16 sums[ROWS];
        for (int r = 0; r < n_rows; ++r) sums[r] = (words16){0};
        for (int v = 0; 4 * v < taps->count[x]; ++v) {
            for (int r = 0; r < n_rows; ++r) {
                bytes16 pixels;
                memcpy(&pixels, rows[r] + start + 4 * v * step, sizeof pixels);
                if (step == 3) pixels = __builtin_shuffle(pixels, lanes);
                // In two steps: GCC 12 takes one step from 8 to 32 bits lane by lane.
                const halves16 wide = __builtin_convertvector(pixels, halves16);
                sums[r] += __builtin_convertvector(wide, words16) * weights[v];
            }
        }
        for (int r = 0; r < n_rows; ++r) {
            words4 parts[LANES / 4];
            memcpy(parts, &sums[r], sizeof parts);
            words4 value = (HALF + parts[0] + parts[1] + parts[2] + parts[3]) >> FRACTION_BITS;
            value &= value >= 0;  // a comparison of vectors gives -1 or 0
            value = (value & (value <= 255)) | (255 & (value > 255));
            // The fourth byte is the next pixel's, which is written after it; the last pixel has no next.
            const uint8_t bytes[4] = {
                (uint8_t)value[reverse ? 2 : 0], (uint8_t)value[1], (uint8_t)value[reverse ? 0 : 2], 0};
            memcpy(out[r] + 3 * x, bytes, x + 1 < taps->length ? 4 : 3);
        }
    }
}

FOR_EVERY_CPU
static void filter_four_rows(
    const uint8_t *const *rows, int step, int offset, const struct taps *taps, const words16 *weights, int reverse,
    uint8_t *const *out) {
    if (step == 3)
        filter_colour_rows(rows, ROWS, 3, offset, taps, weights, reverse, out);
    else
        filter_colour_rows(rows, ROWS, 4, offset, taps, weights, reverse, out);
}

#ifdef WITH_VNNI
// The weights as `filter_four_rows_vnni` takes them. Each vector of taps has three vectors of bytes; in each, 16 bytes
// for four taps: theirs for the first channel side by side, then for the second and the third, and four that are 0.
static int8_t *spread_bytes(const struct taps *taps) {
    const int n_vectors = (taps->width + TAPS_A_VECTOR - 1) / TAPS_A_VECTOR;
    const size_t n_bytes = (size_t)taps->length * n_vectors * BYTES_A_WEIGHT * 64;
    int8_t *all = aligned_alloc(64, n_bytes);
    if (!all) return all;
    memset(all, 0, n_bytes);
    for (int x = 0; x < taps->length; ++x)
        for (int t = 0; t < taps->count[x]; ++t) {
            int8_t *vector = all + ((int64_t)x * n_vectors + t / TAPS_A_VECTOR) * BYTES_A_WEIGHT * 64;
            int32_t rest = taps->weights[(int64_t)x * taps->width + t];
            const int place = t % TAPS_A_VECTOR / 4 * 16 + t % 4;
            for (int b = 0; b < BYTES_A_WEIGHT; ++b) {
                const int8_t low = (int8_t)(uint8_t)rest;
                for (int channel = 0; channel < 3; ++channel) vector[64 * b + place + 4 * channel] = low;
                rest = (rest - low) >> 8;
            }
        }
    return all;
}

// As `filter_colour_rows` does it for `ROWS` rows.
FOR_VNNI
static void filter_four_rows_vnni(
    const uint8_t *const *rows, int64_t stride, int step, const struct taps *taps, const int8_t *weights, int reverse,
    uint8_t *const *out) {
    const int n_vectors = (taps->width + TAPS_A_VECTOR - 1) / TAPS_A_VECTOR;
    uint8_t places[64];  // where the bytes of a vector of pixels go
    for (int i = 0; i < 64; ++i) {
        const int pixel = i / 16 * 4 + i % 4, channel = i % 16 / 4;
        places[i] = (uint8_t)(channel == 3 ? 0 : pixel * step + (reverse ? 2 - channel : channel));
    }
    const __m512i order = _mm512_loadu_si512(places);
    int64_t asked = 0;
    for (int x = 0; x < taps->length; ++x, weights += n_vectors * BYTES_A_WEIGHT * 64) {
        const int64_t start = (int64_t)taps->first[x] * step;
        if (start >= asked) {
            for (int r = 0; r < ROWS; ++r)
                fetch(rows[r], ROWS_AHEAD * stride + start);
            asked = start + LINE;
        }
        __m512i sums[ROWS][BYTES_A_WEIGHT];
        for (int r = 0; r < ROWS; ++r)
            for (int b = 0; b < BYTES_A_WEIGHT; ++b) sums[r][b] = _mm512_setzero_si512();
        for (int v = 0; TAPS_A_VECTOR * v < taps->count[x]; ++v)
            for (int r = 0; r < ROWS; ++r) {
                const __m512i raw = _mm512_loadu_si512(rows[r] + start + TAPS_A_VECTOR * v * step);
                const __m512i pixels = _mm512_permutexvar_epi8(order, raw);
                for (int b = 0; b < BYTES_A_WEIGHT; ++b) {
                    const __m512i factors = _mm512_load_si512(weights + (v * BYTES_A_WEIGHT + b) * 64);
                    sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], pixels, factors);
                }
            }
        __m512i whole[ROWS];  // four parts of each sum, 128 bits each
        for (int r = 0; r < ROWS; ++r) {
            const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums[r][2], 8), sums[r][1]);
            whole[r] = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), sums[r][0]);
        }
        // The parts are added while the rows move together: one row in each quarter of `total`.
        const __m512i first = _mm512_add_epi32(
            _mm512_shuffle_i32x4(whole[0], whole[1], 0x88), _mm512_shuffle_i32x4(whole[0], whole[1], 0xdd));
        const __m512i second = _mm512_add_epi32(
            _mm512_shuffle_i32x4(whole[2], whole[3], 0x88), _mm512_shuffle_i32x4(whole[2], whole[3], 0xdd));
        const __m512i total = _mm512_add_epi32(
            _mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xdd));
        const __m512i value = _mm512_srai_epi32(_mm512_add_epi32(total, _mm512_set1_epi32(HALF)), FRACTION_BITS);
        uint8_t bytes[4 * ROWS];
        _mm_storeu_si128(
            (__m128i *)bytes, _mm512_cvtusepi32_epi8(_mm512_max_epi32(value, _mm512_setzero_si512())));
        // The fourth byte is the next pixel's, which is written after it; the last pixel has no next.
        if (x + 1 < taps->length)
            for (int r = 0; r < ROWS; ++r) memcpy(out[r] + 3 * x, bytes + 4 * r, 4);
        else
            for (int r = 0; r < ROWS; ++r) memcpy(out[r] + 3 * x, bytes + 4 * r, 3);
    }
}
#endif

FOR_EVERY_CPU
static void filter_row(
    const uint8_t *row, int step, int channels, int offset, const struct taps *taps, const words16 *weights,
    int reverse, uint8_t *out) {
    if (channels == 3) {
        if (step == 3)
            filter_colour_rows(&row, 1, 3, offset, taps, weights, reverse, &out);
        else
            filter_colour_rows(&row, 1, 4, offset, taps, weights, reverse, &out);
        return;
    }
    for (int x = 0; x < taps->length; ++x) {
        const uint8_t *pixels = row + (int64_t)(taps->first[x] - offset) * step;
        int32_t sum = HALF;
        for (int t = 0; t < taps->count[x]; ++t)
            sum += pixels[(int64_t)t * step] * taps->weights[(int64_t)x * taps->width + t];
        out[x] = to_byte(sum);
    }
}

// One output row from the rows above one another in `source`; bytes are independent, whatever they mean.
FOR_EVERY_CPU
static void filter_down(
    const uint8_t *source, int64_t stride, int64_t n_bytes, int count, const int32_t *weights, int32_t *sums,
    uint8_t *out) {
    for (int64_t i = 0; i < n_bytes; ++i) sums[i] = HALF;
    for (int t = 0; t < count; ++t) {
        const uint8_t *row = source + t * stride;
        const int32_t weight = weights[t];
        for (int64_t i = 0; i < n_bytes; ++i) sums[i] += row[i] * weight;
    }
    for (int64_t i = 0; i < n_bytes; ++i) out[i] = to_byte(sums[i]);
}

// Columns, then rows.
static int columns_first(
    const uint8_t *source, int64_t stride, int step, int channels, int height, int width, const struct taps *across,
    const struct taps *down, const words16 *weights, int reverse, uint8_t *out) {
    int begin, end;
    extent(down, &begin, &end);
    const int64_t n_bytes = (int64_t)across->length * channels;
    const int64_t row_bytes = (int64_t)(width - 1) * step + channels;
    const uint8_t *source_end = source + (height - 1) * stride + row_bytes;
    uint8_t *between = malloc((size_t)((end - begin + 1) * n_bytes));
    uint8_t *copy = malloc((size_t)row_bytes + PADDING);
    int32_t *sums = malloc((size_t)n_bytes * sizeof *sums);
    int failed = !between || !copy || !sums;
#ifdef WITH_VNNI
    int8_t *byte_weights = NULL;
    if (channels == 3 && has_vnni()) {
        byte_weights = spread_bytes(across);
        failed = failed || !byte_weights;
    }
#endif
    for (int y = begin; y < end && !failed;) {
        uint8_t *target = between + (y - begin) * n_bytes;
        const uint8_t *row = source + y * stride;
        const int together = channels == 3 && y + ROWS <= end;
        // What is read past a row must still be the image's memory.
        if (together && row + (ROWS - 1) * stride + row_bytes + PADDING <= source_end) {
            const uint8_t *rows[ROWS];
            uint8_t *targets[ROWS];
            for (int r = 0; r < ROWS; ++r) {
                rows[r] = row + r * stride;
                targets[r] = target + r * n_bytes;
            }
#ifdef WITH_VNNI
            if (byte_weights)
                filter_four_rows_vnni(rows, stride, step, across, byte_weights, reverse, targets);
            else
#endif
                filter_four_rows(rows, step, 0, across, weights, reverse, targets);
            y += ROWS;
        } else {
            memcpy(copy, row, (size_t)row_bytes);
            filter_row(copy, step, channels, 0, across, weights, reverse, target);
            y += 1;
        }
    }
    for (int y = 0; y < down->length && !failed; ++y)
        filter_down(
            between + (down->first[y] - begin) * n_bytes * (down->count[y] > 0), n_bytes, n_bytes, down->count[y],
            down->weights + (int64_t)y * down->width, sums, out + y * n_bytes);
#ifdef WITH_VNNI
    free(byte_weights);
#endif
    free(between);
    free(copy);
    free(sums);
    return failed;
}

static int rows_first(
    const uint8_t *source, int64_t stride, int step, int channels, const struct taps *across,
    const struct taps *down, const words16 *weights, int reverse, uint8_t *out) {
    int begin, end;
    extent(across, &begin, &end);
    const int64_t n_bytes = (int64_t)(end - begin - 1) * step + channels;
    uint8_t *between = malloc((size_t)n_bytes + PADDING);
    int32_t *sums = malloc((size_t)n_bytes * sizeof *sums);
    const int failed = end == 0 || !between || !sums;
    for (int y = 0; y < down->length && !failed; ++y) {
        const uint8_t *top = source + down->first[y] * stride + (int64_t)begin * step;
        uint8_t *target = out + (int64_t)y * across->length * channels;
        filter_down(
            top, stride, n_bytes, down->count[y], down->weights + (int64_t)y * down->width, sums, between);
        filter_row(between, step, channels, begin, across, weights, reverse, target);
    }
    free(between);
    free(sums);
    return failed;
}

// Writes down->length × across->length pixels of `channels` (1 or 3) bytes to `out`. A pixel of the source takes
// `step` bytes (3 or 4 with three channels), a row `stride`. With `reverse`, the first and the last channel change
// places. Returns 0 if all went well, else there was no memory.
int edgefold_resample(
    const uint8_t *source, int64_t stride, int32_t step, int32_t channels, int32_t height, int32_t width,
    const struct taps *across, const struct taps *down, int32_t vertical_first, int32_t reverse, uint8_t *out) {
    words16 *weights = spread(across);
    int failed = !weights;
    if (!failed && vertical_first)
        failed = rows_first(source, stride, step, channels, across, down, weights, reverse, out);
    else if (!failed)
        failed = columns_first(source, stride, step, channels, height, width, across, down, weights, reverse, out);
    free(weights);
    return failed;
}
