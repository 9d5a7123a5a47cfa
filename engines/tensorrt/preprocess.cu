// A camera's frame into the network's input: resize, crop, colour order and, where the graph does not do it,
// normalization and layout, in one kernel. `engines/tensorrt/preprocess_plan.py` computes the plan it follows and
// explains it; `pipeline/preprocess.py` is what it must agree with.
//
// Compiled by NVRTC, and by the tests as C++ for the host: no headers, no intrinsics.

struct Plan {
    int source_h, source_w;
    int is_nv12;                 // else interleaved bytes
    int pixel_bytes;             // interleaved: from one pixel to the next
    int channel[3];              // interleaved: byte of each output channel; NV12: its index in R, G, B
    int yuv[5];                  // Y, V to R, U to G, V to G, U to B; times 2^20
    int target_h, target_w;
    int taps_x, taps_y;          // weights stored for each output column and row
    int tile_h, tile_w;          // output pixels of a block
    int rows_first;              // filter along rows' neighbours (vertically) before columns
    int output;                  // 0: uint8 NHWC, 1: float NHWC, 2: float NCHW
    float scale[3], shift[3];    // float outputs: pixel * scale + shift
    int tables;                  // from here on `int`s, see the accessors
};

// The tables behind a plan, in this order: columns' start, count, weights; rows' start, count, weights; for each row
// of tiles the first source row and how many are used, or, with `rows_first`, source columns for each column of tiles. Where nothing is filtered, the first two weights are a double, the
// fraction between the middle two pixels.
struct Tables {
    const int *x_start, *x_count, *x_weight, *y_start, *y_count, *y_weight, *tile_start, *tile_used;
};

__device__ static Tables tables_of(const Plan *plan) {
    Tables t;
    t.x_start = &plan->tables;
    t.x_count = t.x_start + plan->target_w;
    t.x_weight = t.x_count + plan->target_w;
    t.y_start = t.x_weight + plan->target_w * plan->taps_x;
    t.y_count = t.y_start + plan->target_h;
    t.y_weight = t.y_count + plan->target_h;
    t.tile_start = t.y_weight + plan->target_h * plan->taps_y;
    int size = plan->rows_first ? plan->target_w : plan->target_h, tile = plan->rows_first ? plan->tile_w : plan->tile_h;
    t.tile_used = t.tile_start + (size + tile - 1) / tile;
    return t;
}

struct Source {
    const unsigned char *pixels;  // interleaved, or luma
    long long pitch;              // bytes from one row to the next
    const unsigned char *chroma;  // NV12: U and V in turns, a pair for 2x2 pixels
    long long chroma_pitch;
};

__device__ static int clamp_byte(int value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

// The pixel's bytes in the order of the output's channels.
__device__ static void load(const Plan *plan, const Source &source, int y, int x, int value[3]) {
    if (!plan->is_nv12) {
        const unsigned char *at = source.pixels + y * source.pitch + (long long)x * plan->pixel_bytes;
        for (int c = 0; c < 3; c++) value[c] = at[plan->channel[c]];
        return;
    }
    const unsigned char *pair = source.chroma + (y / 2) * source.chroma_pitch + (x & ~1);
    int luma = source.pixels[y * source.pitch + x] - 16;
    int u = pair[0] - 128, v = pair[1] - 128, half = 1 << 19;
    int base = (luma < 0 ? 0 : luma) * plan->yuv[0] + half;
    int rgb[3];
    rgb[0] = clamp_byte((base + plan->yuv[1] * v) >> 20);
    rgb[1] = clamp_byte((base + plan->yuv[2] * u + plan->yuv[3] * v) >> 20);
    rgb[2] = clamp_byte((base + plan->yuv[4] * u) >> 20);
    for (int c = 0; c < 3; c++) value[c] = rgb[plan->channel[c]];
}

__device__ static void store(const Plan *plan, void *output, int y, int x, int channel, int value) {
    long long pixel = (long long)y * plan->target_w + x;
    if (plan->output == 0) {
        ((unsigned char *)output)[pixel * 3 + channel] = (unsigned char)value;
        return;
    }
    long long plane = (long long)plan->target_h * plan->target_w;
    long long at = plan->output == 1 ? pixel * 3 + channel : channel * plane + pixel;
    ((float *)output)[at] = (float)value * plan->scale[channel] + plan->shift[channel];
}

// Separable filter in Pillow's fixed point: 22 fractional bits, and bytes between the two passes. A block filters the
// source rows (or columns) that its tile needs along one axis into shared memory, and that along the other.
extern "C" __global__ void resample_filtered(const Plan *plan, const unsigned char *pixels, int pitch,
                                             const unsigned char *chroma, int chroma_pitch, void *output) {
    extern __shared__ unsigned char between[];  // [row][column][channel]
    Tables t = tables_of(plan);
    Source source = {pixels, pitch, chroma, chroma_pitch};
    int left = blockIdx.x * plan->tile_w, top = blockIdx.y * plan->tile_h, rows_first = plan->rows_first;
    int tile = rows_first ? blockIdx.x : blockIdx.y;
    int origin = t.tile_start[tile], used = t.tile_used[tile];
    int height = rows_first ? plan->tile_h : used, width = rows_first ? used : plan->tile_w;

    for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
        int at = rows_first ? top + i / width : left + i % width;  // output row, or column
        if (at >= (rows_first ? plan->target_h : plan->target_w)) continue;
        int across = origin + (rows_first ? i % width : i / width);  // source column, or row
        int start = (rows_first ? t.y_start : t.x_start)[at], count = (rows_first ? t.y_count : t.x_count)[at];
        const int *weight = rows_first ? t.y_weight + at * plan->taps_y : t.x_weight + at * plan->taps_x;
        int sum[3] = {1 << 21, 1 << 21, 1 << 21};
        for (int k = 0; k < count; k++) {
            int value[3];
            load(plan, source, rows_first ? start + k : across, rows_first ? across : start + k, value);
            for (int c = 0; c < 3; c++) sum[c] += value[c] * weight[k];
        }
        for (int c = 0; c < 3; c++) between[i * 3 + c] = (unsigned char)clamp_byte(sum[c] >> 22);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < plan->tile_h * plan->tile_w; i += blockDim.x) {
        int x = left + i % plan->tile_w, y = top + i / plan->tile_w;
        if (x >= plan->target_w || y >= plan->target_h) continue;
        // Outside of the image there is nothing to filter, and the bytes are 0.
        int inside = t.x_count[x] && t.y_count[y], count = rows_first ? t.x_count[x] : t.y_count[y];
        const int *weight = rows_first ? t.x_weight + x * plan->taps_x : t.y_weight + y * plan->taps_y;
        int first = rows_first ? (i / plan->tile_w) * width + t.x_start[x] - origin
                               : (t.y_start[y] - origin) * width + i % plan->tile_w;
        int step = rows_first ? 1 : width;
        for (int c = 0; c < 3; c++) {
            int sum = 1 << 21;
            for (int k = 0; inside && k < count; k++) sum += between[(first + k * step) * 3 + c] * weight[k];
            store(plan, output, y, x, c, inside ? clamp_byte(sum >> 22) : 0);
        }
    }
}

__device__ static int clamp_index(int index, int size) { return index < 0 ? 0 : index < size ? index : size - 1; }

// Value at `fraction` between the middle two of four, as Pillow's transform has it (a = -1).
__device__ static double cubic(const double v[4], double fraction) {
    double p2 = v[2] - v[0], p3 = 2 * (v[0] - v[1]) + v[2] - v[3], p4 = -v[0] + v[1] - v[2] + v[3];
    return v[1] + fraction * (p2 + fraction * (p3 + fraction * p4));
}

// Two words, which need not lie where a double may.
__device__ static double fraction_of(const int *words) {
    union { int words[2]; double value; } both;
    both.words[0] = words[0];
    both.words[1] = words[1];
    return both.value;
}

// Interpolation between the nearest 2x2 (`taps_x` = 2) or 4x4 pixels however far it shrinks, truncated to a byte.
extern "C" __global__ void resample_neighbours(const Plan *plan, const unsigned char *pixels, int pitch,
                                               const unsigned char *chroma, int chroma_pitch, void *output) {
    Tables t = tables_of(plan);
    Source source = {pixels, pitch, chroma, chroma_pitch};
    int left = blockIdx.x * plan->tile_w, top = blockIdx.y * plan->tile_h, n = plan->taps_x;
    for (int i = threadIdx.x; i < plan->tile_h * plan->tile_w; i += blockDim.x) {
        int x = left + i % plan->tile_w, y = top + i / plan->tile_w;
        if (x >= plan->target_w || y >= plan->target_h) continue;
        if (!t.x_count[x] || !t.y_count[y]) {
            for (int c = 0; c < 3; c++) store(plan, output, y, x, c, 0);
            continue;
        }
        double dx = fraction_of(t.x_weight + x * n), dy = fraction_of(t.y_weight + y * n);
        double down[3][4];
        for (int j = 0; j < n; j++) {
            double along[3][4];
            for (int k = 0; k < n; k++) {
                int value[3];
                load(plan, source, clamp_index(t.y_start[y] + j, plan->source_h),
                     clamp_index(t.x_start[x] + k, plan->source_w), value);
                for (int c = 0; c < 3; c++) along[c][k] = value[c];
            }
            for (int c = 0; c < 3; c++)
                down[c][j] = n == 2 ? along[c][0] + (along[c][1] - along[c][0]) * dx : cubic(along[c], dx);
        }
        for (int c = 0; c < 3; c++) {
            double value = n == 2 ? down[c][0] + (down[c][1] - down[c][0]) * dy : cubic(down[c], dy);
            store(plan, output, y, x, c, clamp_byte((int)value));
        }
    }
}
