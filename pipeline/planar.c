// A decoder's picture, in planes of Y, U and V, to the network's size in one go: no picture of all its pixels in colour
// is made. Each plane is filtered down its columns and then along its rows, in the arithmetic of resample.c, and only
// the small picture is turned into colours.
//
// Rows are made sixteen at a time, and turned on their side in between: what lies side by side is then one column of
// all sixteen, and filtering along the rows is a sum of whole vectors. With byte products a column is four columns.
//
// Called by pipeline/planar.py, which has made the taps and checked that they lie inside the planes.

#include "resample.h"

#define COLOUR_BITS 20
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define IN_MEMORY(word) __builtin_bswap32(word)
#else
#define IN_MEMORY(word) (word)
#endif
#define INLINE static inline __attribute__((always_inline))

// The same taps in groups for byte products, too: see `sum_groups`. `across_groups` count columns from the first that is
// used.
struct plane {
    const uint8_t *pixels;
    int64_t stride;
    const struct taps *across, *down, *across_groups, *down_groups;
};

// R = y Y + vr V, G = y Y + ug U + vg V, B = y Y + ub U, times 2^20; black is `black`, no colour is 128.
struct colours {
    int32_t black, y, vr, ug, vg, ub;
};

// The columns of a plane that are used, [begin, begin + width), at least sixteen; its last row that is; and room for
// sixteen filtered rows, as rows that lie `stride` apart, a multiple of a line of memory, and turned.
struct strip {
    int begin, width, stride, last_row;
    uint8_t *rows, *turned;
};

INLINE int32_t clamp(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

// Turns one column of sixteen filtered rows (Y, U and V in `values`) into pixels. What lies outside of the image is
// black, as Pillow pads: `inside` is all ones for a row inside of it, else 0. The fourth byte is the next pixel's, which
// is written after it; the `last` pixel has no next.
INLINE void write_column(
    int32_t values[3][LANES], const struct colours *colours, int reverse, const uint32_t *inside, int n_rows,
    int64_t stride, int last, uint8_t *out) {
    uint32_t pixels[LANES];
    for (int r = 0; r < LANES; ++r) {
        const int32_t above = values[0][r] - colours->black, u = values[1][r] - 128, v = values[2][r] - 128;
        const int32_t base = (above > 0 ? above : 0) * colours->y + (1 << (COLOUR_BITS - 1));
        const uint32_t red = clamp((base + colours->vr * v) >> COLOUR_BITS);
        const uint32_t green = clamp((base + colours->ug * u + colours->vg * v) >> COLOUR_BITS);
        const uint32_t blue = clamp((base + colours->ub * u) >> COLOUR_BITS);
        pixels[r] = inside[r] & (green << 8 | (reverse ? red | blue << 16 : blue | red << 16));
    }
    if (last) {
        for (int r = 0; r < n_rows; ++r, out += stride)
            for (int c = 0; c < 3; ++c) out[c] = (uint8_t)(pixels[r] >> 8 * c);
        return;
    }
    for (int r = 0; r < n_rows; ++r, out += stride) {
        const uint32_t bytes = IN_MEMORY(pixels[r]);  // by bytes, the compiler would not make one store of them
        memcpy(out, &bytes, sizeof bytes);
    }
}

// One row of a plane, filtered down.
INLINE void filter_down(
    const struct plane *plane, int y, int begin, int width, int32_t *restrict sums, uint8_t *restrict out) {
    const struct taps *down = plane->down;
    const uint8_t *restrict row = plane->pixels + down->first[y] * plane->stride + begin;
    for (int x = 0; x < width; ++x) sums[x] = HALF;
    for (int t = 0; t < down->count[y]; ++t, row += plane->stride) {
        const int32_t weight = down->weights[(int64_t)y * down->width + t];
        for (int x = 0; x < width; ++x) sums[x] += row[x] * weight;
    }
    for (int x = 0; x < width; ++x) out[x] = to_byte(sums[x]);
}

// Sixteen rows on their side. Sixteen columns at a time: their lines of memory are written while they are near.
INLINE void turn(const uint8_t *restrict rows, int stride, uint8_t *restrict turned) {
    for (int x = 0; x < stride; x += LANES)
        for (int r = 0; r < LANES; ++r)
            for (int i = 0; i < LANES; ++i) turned[(x + i) * LANES + r] = rows[r * stride + x + i];
}

// Column `x` of sixteen turned rows, filtered along.
INLINE void filter_along(const struct taps *across, int x, const uint8_t *restrict column, int32_t *values) {
    int32_t sums[LANES];
    for (int r = 0; r < LANES; ++r) sums[r] = HALF;
    const int count = across->count[x];
    for (int t = 0; t < count; ++t, column += LANES) {
        const int32_t weight = across->weights[(int64_t)x * across->width + t];
        for (int r = 0; r < LANES; ++r) sums[r] += column[r] * weight;
    }
    for (int r = 0; r < LANES; ++r) values[r] = to_byte(sums[r]);
}

static void mark_inside(const struct taps *down, int y, int n_rows, uint32_t *inside) {
    for (int r = 0; r < LANES; ++r) inside[r] = r < n_rows && down->count[y + r] ? UINT32_MAX : 0;
}

// Sixteen output rows from `y` on, or those that are left.
FOR_EVERY_CPU
static void make_rows(
    const struct plane *planes, const struct colours *colours, int reverse, int y, int n_rows,
    const struct strip *strips, int32_t *sums, uint8_t *out) {
    const struct taps *luma = planes[0].across;
    const uint32_t outside[LANES] = {0};
    uint32_t inside[LANES];
    mark_inside(planes[0].down, y, n_rows, inside);
    for (int p = 0; p < 3; ++p) {
        const int stride = strips[p].stride;
        for (int r = 0; r < n_rows; ++r)
            filter_down(
                &planes[p], y + r, strips[p].begin, strips[p].width, sums, strips[p].rows + (int64_t)r * stride);
        turn(strips[p].rows, stride, strips[p].turned);
    }
    for (int x = 0; x < luma->length; ++x) {
        int32_t values[3][LANES];
        for (int p = 0; p < 3; ++p)
            filter_along(
                planes[p].across, x,
                strips[p].turned + (int64_t)(planes[p].across->first[x] - strips[p].begin) * LANES, values[p]);
        write_column(
            values, colours, reverse, luma->count[x] ? inside : outside, n_rows, (int64_t)luma->length * 3,
            x + 1 == luma->length, out + 3 * x);
    }
}

#ifdef WITH_VNNI
#define TAPS_A_GROUP 4
#define BLOCK 64  // columns

// Sums of products to bytes, in the order of the vector.
FOR_VNNI
INLINE __m128i to_bytes(const __m512i sums[BYTES_A_WEIGHT]) {
    const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(sums[2], 8), sums[1]);
    const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(upper, 8), sums[0]);
    const __m512i value = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(HALF)), FRACTION_BITS);
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(value, _mm512_setzero_si512()));
}

// Sixteen sums each of `n` vectors that lie side by side, over groups of four bytes that lie `step` apart. Groups begin
// at multiples of four; each has three words of four bytes of weights, 0 where there is no tap.
FOR_VNNI
INLINE void sum_groups(
    const uint8_t *bytes, int64_t step, const int32_t *words, int n_groups, int n, __m128i *values) {
    __m512i sums[BLOCK / LANES][BYTES_A_WEIGHT];
    for (int v = 0; v < n; ++v)
        for (int b = 0; b < BYTES_A_WEIGHT; ++b) sums[v][b] = _mm512_setzero_si512();
    for (int g = 0; g < n_groups; ++g, bytes += step, words += BYTES_A_WEIGHT)
        for (int v = 0; v < n; ++v) {
            const __m512i pixels = _mm512_loadu_si512(bytes + v * TAPS_A_GROUP * LANES);
            for (int b = 0; b < BYTES_A_WEIGHT; ++b)
                sums[v][b] = _mm512_dpbusd_epi32(sums[v][b], pixels, _mm512_set1_epi32(words[b]));
        }
    for (int v = 0; v < n; ++v) values[v] = to_bytes(sums[v]);
}

// The groups of source rows that sixteen output rows from `y` on use: [*begin, *end).
static void span(const struct taps *down, int y, int n_rows, int *begin, int *end) {
    *begin = INT32_MAX;
    *end = 0;
    for (int r = y; r < y + n_rows; ++r) {
        if (down->count[r] == 0) continue;
        if (down->first[r] < *begin) *begin = down->first[r];
        if (down->first[r] + down->count[r] > *end) *end = down->first[r] + down->count[r];
    }
    if (*end == 0) *begin = 0;
}

// Four vectors of four quarters each: what lay below each other then lies side by side.
FOR_VNNI
INLINE void transpose_quarters(__m512i *a, __m512i *b, __m512i *c, __m512i *d) {
    const __m512i even_ab = _mm512_shuffle_i32x4(*a, *b, 0x88), odd_ab = _mm512_shuffle_i32x4(*a, *b, 0xdd);
    const __m512i even_cd = _mm512_shuffle_i32x4(*c, *d, 0x88), odd_cd = _mm512_shuffle_i32x4(*c, *d, 0xdd);
    *a = _mm512_shuffle_i32x4(even_ab, even_cd, 0x88);
    *b = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0x88);
    *c = _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd);
    *d = _mm512_shuffle_i32x4(odd_ab, odd_cd, 0xdd);
}

// Four source rows byte by byte: a word is a column of them. Rows behind the last are the last; their weight is 0.
FOR_VNNI
static void weave(const struct plane *plane, int row, const struct strip *strip, uint8_t *woven) {
    const uint8_t *rows[TAPS_A_GROUP];
    for (int r = 0; r < TAPS_A_GROUP; ++r) {
        const int inside = row + r < strip->last_row ? row + r : strip->last_row;
        rows[r] = plane->pixels + inside * plane->stride + strip->begin;
    }
    int x = 0;
    for (; x + BLOCK <= strip->width; x += BLOCK) {
        __m512i parts[TAPS_A_GROUP];
        for (int r = 0; r < TAPS_A_GROUP; ++r) {
            fetch(rows[r], ROWS_AHEAD * plane->stride + x);
            parts[r] = _mm512_loadu_si512(rows[r] + x);
        }
        // Within quarters of a vector: of the four words of a quarter each of `words` has those of one column in four.
        const __m512i low_a = _mm512_unpacklo_epi8(parts[0], parts[1]), high_a = _mm512_unpackhi_epi8(parts[0], parts[1]);
        const __m512i low_b = _mm512_unpacklo_epi8(parts[2], parts[3]), high_b = _mm512_unpackhi_epi8(parts[2], parts[3]);
        __m512i words[] = {
            _mm512_unpacklo_epi16(low_a, low_b), _mm512_unpackhi_epi16(low_a, low_b),
            _mm512_unpacklo_epi16(high_a, high_b), _mm512_unpackhi_epi16(high_a, high_b)};
        transpose_quarters(&words[0], &words[1], &words[2], &words[3]);
        for (int v = 0; v < 4; ++v) _mm512_storeu_si512(woven + TAPS_A_GROUP * (x + LANES * v), words[v]);
    }
    while (x < strip->width) {
        // The last vector overlaps the one before it, so that nothing behind a row is read.
        if (x > strip->width - LANES) x = strip->width - LANES;
        __m128i parts[TAPS_A_GROUP];
        for (int r = 0; r < TAPS_A_GROUP; ++r) {
            fetch(rows[r], ROWS_AHEAD * plane->stride + x);
            parts[r] = _mm_loadu_si128((const __m128i *)(rows[r] + x));
        }
        const __m128i low_a = _mm_unpacklo_epi8(parts[0], parts[1]), high_a = _mm_unpackhi_epi8(parts[0], parts[1]);
        const __m128i low_b = _mm_unpacklo_epi8(parts[2], parts[3]), high_b = _mm_unpackhi_epi8(parts[2], parts[3]);
        __m128i *place = (__m128i *)(woven + TAPS_A_GROUP * x);
        _mm_storeu_si128(place, _mm_unpacklo_epi16(low_a, low_b));
        _mm_storeu_si128(place + 1, _mm_unpackhi_epi16(low_a, low_b));
        _mm_storeu_si128(place + 2, _mm_unpacklo_epi16(high_a, high_b));
        _mm_storeu_si128(place + 3, _mm_unpackhi_epi16(high_a, high_b));
        x += LANES;
    }
}

// As `turn` does it, but four columns stay together: a vector is four columns of all sixteen rows.
FOR_VNNI
static void turn_vnni(const struct strip *strip) {
    for (int x = 0; x < strip->width; x += BLOCK) {
        __m512i rows[LANES], pairs[LANES];
        for (int r = 0; r < LANES; ++r) rows[r] = _mm512_loadu_si512(strip->rows + (int64_t)r * strip->stride + x);
        for (int r = 0; r < LANES; r += 2) {
            pairs[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
            pairs[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
        }
        // Of rows r to r + 3, quarter q of the one numbered r + c is word 4 q + c of each.
        for (int r = 0; r < LANES; r += 4)
            for (int c = 0; c < 2; ++c) {
                rows[r + 2 * c] = _mm512_unpacklo_epi64(pairs[r + c], pairs[r + 2 + c]);
                rows[r + 2 * c + 1] = _mm512_unpackhi_epi64(pairs[r + c], pairs[r + 2 + c]);
            }
        for (int c = 0; c < 4; ++c) {
            transpose_quarters(&rows[c], &rows[4 + c], &rows[8 + c], &rows[12 + c]);
            for (int q = 0; q < 4; ++q)
                _mm512_storeu_si512(strip->turned + ((int64_t)x + 16 * q + 4 * c) * LANES, rows[4 * q + c]);
        }
    }
}

// As `make_rows` does it. `woven` has room for the source rows of sixteen output rows.
FOR_VNNI
static void make_rows_vnni(
    const struct plane *planes, const struct colours *colours, int reverse, int y, int n_rows,
    const struct strip *strips, uint8_t *woven, uint8_t *out) {
    const struct taps *luma = planes[0].across;
    const uint32_t outside[LANES] = {0};
    uint32_t inside[LANES];
    mark_inside(planes[0].down, y, n_rows, inside);
    for (int p = 0; p < 3; ++p) {
        const struct strip *strip = &strips[p];
        const struct taps *down = planes[p].down_groups;
        const int64_t step = (int64_t)TAPS_A_GROUP * strip->stride;
        int begin, end;
        span(down, y, n_rows, &begin, &end);
        for (int g = begin; g < end; ++g)
            weave(&planes[p], TAPS_A_GROUP * g, strip, woven + (g - begin) * step);
        for (int r = 0; r < n_rows; ++r) {
            const int count = down->count[y + r];
            const int32_t *words = down->weights + (int64_t)(y + r) * down->width;
            const uint8_t *source = woven + (count > 0) * (down->first[y + r] - begin) * step;
            uint8_t *row = strip->rows + (int64_t)r * strip->stride;
            // Whole blocks: what lies behind the width is room, and weighs nothing along.
            for (int x = 0; x < strip->width; x += BLOCK)
                sum_groups(source + TAPS_A_GROUP * x, step, words, count, BLOCK / LANES, (__m128i *)(row + x));
        }
        turn_vnni(strip);
    }
    for (int x = 0; x < luma->length; ++x) {
        int32_t values[3][LANES];
        for (int p = 0; p < 3; ++p) {
            const struct taps *across = planes[p].across_groups;
            const int32_t *words = across->weights + (int64_t)x * across->width;
            const uint8_t *columns = strips[p].turned + (int64_t)across->first[x] * TAPS_A_GROUP * LANES;
            __m128i bytes;
            sum_groups(columns, TAPS_A_GROUP * LANES, words, across->count[x], 1, &bytes);
            _mm512_storeu_si512(values[p], _mm512_cvtepu8_epi32(bytes));
        }
        write_column(
            values, colours, reverse, luma->count[x] ? inside : outside, n_rows, (int64_t)luma->length * 3,
            x + 1 == luma->length, out + 3 * x);
    }
}
#endif

// Makes room for a plane; returns 0 if all went well.
static int open_strip(struct strip *strip, const struct plane *plane) {
    int end, first_row, end_row;
    extent(plane->across, &strip->begin, &end);
    extent(plane->down, &first_row, &end_row);
    strip->width = end - strip->begin;
    strip->stride = (strip->width + LINE - 1) / LINE * LINE;
    strip->last_row = end_row - 1;
    strip->rows = calloc(LANES, (size_t)strip->stride);  // of the last block some are not written
    strip->turned = malloc((size_t)strip->stride * LANES);
    return !strip->rows || !strip->turned;
}

static void close_strip(struct strip *strip) {
    free(strip->rows);
    free(strip->turned);
}

// Room for what the filter works on: sums of a row, or the woven source rows of sixteen output rows.
static void *open_room(const struct plane *planes, const struct strip *strips, int in_groups) {
    size_t most = 1;
    for (int p = 0; p < 3; ++p) {
        size_t n_bytes = (size_t)strips[p].width * sizeof(int32_t);
#ifdef WITH_VNNI
        const int length = planes[p].down->length;
        for (int y = 0; y < length && in_groups; y += LANES) {
            int begin, end;
            span(planes[p].down_groups, y, length - y < LANES ? length - y : LANES, &begin, &end);
            const size_t woven = (size_t)(end - begin) * TAPS_A_GROUP * strips[p].stride;
            if (woven > n_bytes) n_bytes = woven;
        }
#endif
        if (n_bytes > most) most = n_bytes;
    }
    (void)planes, (void)in_groups;
    return malloc(most);
}

// Writes planes[0].down->length × planes[0].across->length pixels to `out`: blue, green, red, or with `reverse` the
// other way round. The planes' taps have these lengths too, and use at least 16 columns. Returns 0 if all went well,
// else there was no memory.
int edgefold_resize_planes(
    const struct plane *planes, const struct colours *colours, int32_t reverse, uint8_t *out) {
    struct strip strips[3] = {0};
    int in_groups = 0, failed = 0;
#ifdef WITH_VNNI
    in_groups = has_vnni();
#endif
    for (int p = 0; p < 3; ++p) failed |= open_strip(&strips[p], &planes[p]);
    void *room = failed ? NULL : open_room(planes, strips, in_groups);
    failed |= !room;
    for (int y = 0; y < planes[0].down->length && !failed; y += LANES) {
        const int left = planes[0].down->length - y, n_rows = left < LANES ? left : LANES;
        uint8_t *rows = out + (int64_t)y * planes[0].across->length * 3;
#ifdef WITH_VNNI
        if (in_groups) {
            make_rows_vnni(planes, colours, reverse, y, n_rows, strips, room, rows);
            continue;
        }
#endif
        make_rows(planes, colours, reverse, y, n_rows, strips, room, rows);
    }
    free(room);
    for (int p = 0; p < 3; ++p) close_strip(&strips[p]);
    return failed;
}

// Two rows of pixels, which share a row of chroma; a sample of it serves the four pixels that it lies between.
FOR_EVERY_CPU
static void convert_rows(
    const uint8_t *luma, const uint8_t *u, const uint8_t *v, int width, const struct colours *colours, int32_t *parts,
    uint8_t *out) {
    int32_t *red = parts, *green = parts + width, *blue = parts + 2 * width;
    for (int x = 0; x < width; ++x) {
        red[x] = colours->vr * (v[x / 2] - 128);
        green[x] = colours->ug * (u[x / 2] - 128) + colours->vg * (v[x / 2] - 128);
        blue[x] = colours->ub * (u[x / 2] - 128);
    }
    for (int row = 0; row < 2; ++row, luma += width)
        for (int x = 0; x < width; ++x, out += 3) {
            const int32_t above = luma[x] - colours->black;
            const int32_t base = (above > 0 ? above : 0) * colours->y + (1 << (COLOUR_BITS - 1));
            out[0] = (uint8_t)clamp((base + blue[x]) >> COLOUR_BITS);
            out[1] = (uint8_t)clamp((base + green[x]) >> COLOUR_BITS);
            out[2] = (uint8_t)clamp((base + red[x]) >> COLOUR_BITS);
        }
}

// The whole picture in blue, green, red. Planes one behind the other, without padding; even sides. Returns 0 if all
// went well, else there was no memory.
int edgefold_planes_to_bgr(
    const uint8_t *planes, int32_t height, int32_t width, const struct colours *colours, uint8_t *out) {
    const uint8_t *u = planes + (int64_t)height * width, *v = u + (int64_t)height * width / 4;
    int32_t *parts = malloc((size_t)width * 3 * sizeof *parts);
    const int failed = !parts;
    for (int y = 0; y < height && !failed; y += 2, u += width / 2, v += width / 2)
        convert_rows(
            planes + (int64_t)y * width, u, v, width, colours, parts, out + (int64_t)y * width * 3);
    free(parts);
    return failed;
}
