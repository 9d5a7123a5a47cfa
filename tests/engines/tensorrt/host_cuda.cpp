// The CUDA kernels compiled for the host: a block's threads are fibres that take turns at __syncthreads, so the code
// that runs is the code NVRTC compiles, with its block and thread indices. Shared memory is filled with rubbish before
// each block. `descending` runs the threads of a block in the other order: a missing barrier gives another result.
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim;
static void __syncthreads();

#include "preprocess.cu"

unsigned char between[48 << 10];

namespace {
const int STACK_BYTES = 64 << 10, MAX_THREADS = 256;
ucontext_t scheduler, fibres[MAX_THREADS];
bool finished[MAX_THREADS];
int running;
char *stacks;
struct { int kernel; const Plan *plan; const unsigned char *pixels, *chroma; int pitch, chroma_pitch; void *output; } job;

void body() {
    (job.kernel ? resample_neighbours : resample_filtered)(job.plan, job.pixels, job.pitch, job.chroma,
                                                           job.chroma_pitch, job.output);
    finished[running] = true;
    swapcontext(&fibres[running], &scheduler);
}
}  // namespace

static void __syncthreads() {
#ifndef NO_BARRIER
    int me = running;
    swapcontext(&fibres[me], &scheduler);
    running = me;
    threadIdx.x = me;
#endif
}

extern "C" int launch(int kernel, const unsigned *grid, unsigned threads, unsigned shared_bytes, int descending,
                      const void *plan, const unsigned char *pixels, int pitch, const unsigned char *chroma,
                      int chroma_pitch, void *output) {
    if (threads > MAX_THREADS || shared_bytes > sizeof between) return 1;
    if (!stacks) stacks = (char *)malloc((size_t)MAX_THREADS * STACK_BYTES);
    job = {kernel, (const Plan *)plan, pixels, chroma, pitch, chroma_pitch, output};
    blockDim = {threads, 1, 1};
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
            memset(between, 0xCD, sizeof between);
            for (unsigned i = 0; i < threads; i++) {
                getcontext(&fibres[i]);
                fibres[i].uc_stack = {stacks + (size_t)i * STACK_BYTES, 0, STACK_BYTES};
                makecontext(&fibres[i], body, 0);
                finished[i] = false;
            }
            for (unsigned left = threads; left;) {
                left = 0;
                for (unsigned k = 0; k < threads; k++) {
                    running = descending ? threads - 1 - k : k;
                    if (finished[running]) continue;
                    threadIdx = {(unsigned)running, 0, 0};
                    swapcontext(&scheduler, &fibres[running]);
                    if (!finished[running]) left++;
                }
            }
        }
    return 0;
}
