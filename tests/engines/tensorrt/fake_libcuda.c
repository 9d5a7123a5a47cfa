/* A CUDA driver without a GPU: what the device layer calls, on host memory.
 *
 * Built by the tests with any C compiler and put before the real library, so that the real bindings
 * (cuda-python, and pycuda where it is installed) marshal real arguments into it. What it is strict about:
 *
 *  - a context must be current in the calling thread (201), and pops must not outnumber pushes;
 *  - work is queued and happens at cuStreamSynchronize or cuEventSynchronize, never earlier, so a buffer that is
 *    read or reused too soon shows wrong bytes;
 *  - device ranges are checked when the work runs; one outside of every allocation is 700, after which every call
 *    returns 700, as on a real device;
 *  - host memory of an asynchronous copy must be page-locked (1; a real driver would copy synchronously);
 *  - while a stream captures, its work goes to the graph and synchronizing it is 900.
 *
 * fake_fail(name, code) makes the next call of `name` return `code`. fake_live() counts what has not been freed.
 * Two kernels exist: add_bytes(uint8 *out, const uint8 *in, int n, int add), and stand_in_engine of tests/cuda_engine.py.
 * Those of preprocess.cu are found and do nothing.
 * One call at a time: threads take turns, as the driver's own lock makes them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
typedef int R;
enum { COPY, KERNEL, ENGINE, RECORD };
typedef struct { int kind; char *to; const char *from; size_t n; int add; int to_device, from_device; void *event; float *logits; } Op;
typedef struct { int magic; Op *ops; int n; int capturing; Op *taped; int n_taped; } Stream;
typedef struct { int magic; Op *ops; int n; } Graph;
typedef struct { int magic; int reached; double at_ms; } Event;
typedef struct Range { char *at; size_t n; int device; struct Range *next; } Range;

static int initialized, sticky, live, retained;
static double clock_ms;
static __thread int depth;
static Range *ranges;
static char fail_name[64];
static int fail_code;
static int context_object = 1, module_object = 2, function_object = 3, engine_object = 4, idle_object = 5;
static pthread_mutex_t turns = PTHREAD_MUTEX_INITIALIZER;

API void fake_fail(const char *name, int code) { snprintf(fail_name, sizeof fail_name, "%s", name); fail_code = code; }
API int fake_live(void) { return live; }
API int fake_retained(void) { return retained; }
API int fake_depth(void) { return depth; }

static R enter(const char *name, int needs_context) {
    if (sticky) return sticky;
    if (fail_code && !strcmp(name, fail_name)) { int code = fail_code; fail_code = 0; return code; }
    if (!initialized && strcmp(name, "cuInit")) return 3;
    return needs_context && depth == 0 ? 201 : 0;
}
static int take_turn(void) { pthread_mutex_lock(&turns); return 1; }
static void end_turn(int *held) { (void)held; pthread_mutex_unlock(&turns); }
/* At the beginning of a function; its turn ends where it returns. */
#define ENTER(name, context) \
    int held_ __attribute__((cleanup(end_turn), unused)) = take_turn(); \
    do { R r_ = enter(name, context); if (r_) return r_; } while (0)

static int inside(const char *at, size_t n, int device) {
    for (Range *r = ranges; r; r = r->next)
        if (r->device == device && at >= r->at && at + n <= r->at + r->n) return 1;
    return 0;
}
static void push(Op **ops, int *n, Op op) { *ops = realloc(*ops, (*n + 1) * sizeof **ops); (*ops)[(*n)++] = op; }
static void enqueue(Stream *s, Op op) {
    if (s->capturing) push(&s->taped, &s->n_taped, op); else push(&s->ops, &s->n, op);
}
/* stand_in_engine: `n` bytes of images of `add` bytes each. */
static int engine(Op *op) {
    int n_images = (int)(op->n / (size_t)op->add);
    if (!inside(op->from, op->n, 1) || !inside((char *)op->logits, n_images * 5 * sizeof(float), 1)) return 700;
    if (op->to && !inside(op->to, op->n, 1)) return 700;
    for (int image = 0; image < n_images; image++) {
        const unsigned char *pixels = (const unsigned char *)op->from + (size_t)image * op->add;
        int sums[5] = {0};
        for (int i = 0; i < op->add; i++)
            for (int k = 0; k < 5; k++) sums[k] += pixels[i] * ((7 * i + 13 * k) % 31);
        for (int k = 0; k < 5; k++) op->logits[5 * image + k] = (float)sums[k];
    }
    if (op->to) memcpy(op->to, op->from, op->n);
    return 0;
}
static R run(Stream *s) {
    for (int i = 0; i < s->n && !sticky; i++) {
        Op *op = &s->ops[i];
        clock_ms += 1;
        if (op->kind == RECORD) { ((Event *)op->event)->reached = 1; ((Event *)op->event)->at_ms = clock_ms; continue; }
        if (op->kind == ENGINE) { if ((sticky = engine(op))) break; continue; }
        if (!inside(op->to, op->n, op->to_device) || !inside(op->from, op->n, op->from_device)) { sticky = 700; break; }
        for (size_t k = 0; k < op->n; k++) op->to[k] = (char)(op->from[k] + op->add);
    }
    s->n = 0;
    return sticky;
}

API R cuInit(unsigned flags) { ENTER("cuInit", 0); initialized = 1; return flags ? 1 : 0; }
API R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
API R cuDeviceGetCount(int *n) { ENTER("cuDeviceGetCount", 0); *n = 1; return 0; }
API R cuDeviceGet(int *d, int ordinal) { ENTER("cuDeviceGet", 0); if (ordinal) return 101; *d = 0; return 0; }
API R cuDeviceGetName(char *out, int n, int d) { ENTER("cuDeviceGetName", 0); snprintf(out, n, "Fake GPU"); return d; }
API R cuDeviceComputeCapability(int *a, int *b, int d) { *a = 8; *b = 7; return d; }
API R cuDeviceGetAttribute(int *v, int a, int d) { ENTER("cuDeviceGetAttribute", 0); *v = a == 75 ? 8 : a == 76 ? 7 : 0; return d; }
API R cuDevicePrimaryCtxRetain(void **c, int d) { ENTER("cuDevicePrimaryCtxRetain", 0); retained++; *c = &context_object; return d; }
API R cuDevicePrimaryCtxRelease(int d) { ENTER("cuDevicePrimaryCtxRelease", 0); if (retained == 0) return 201; retained--; return d; }
API R cuCtxPushCurrent(void *c) { ENTER("cuCtxPushCurrent", 0); if (c != &context_object) return 201; depth++; return 0; }
API R cuCtxPopCurrent(void **c) { if (sticky) return sticky; if (depth == 0) return 201; depth--; if (c) *c = &context_object; return 0; }
API R cuCtxGetCurrent(void **c) { ENTER("cuCtxGetCurrent", 0); *c = depth ? &context_object : 0; return 0; }
API R cuCtxGetDevice(int *d) { ENTER("cuCtxGetDevice", 1); *d = 0; return 0; }

static R make(char **out, size_t n, int device, const char *name) {
    ENTER(name, 1);
    if (n == 0) return 1;
    if (n > (size_t)1 << 40) return 2;
    Range *r = malloc(sizeof *r);
    *r = (Range){aligned_alloc(256, (n + 255) / 256 * 256), n, device, ranges};
    memset(r->at, 0xA5, n);
    ranges = r; *out = r->at; live++;
    return 0;
}
static R drop(char *at, int device, const char *name) {
    ENTER(name, 1);
    for (Range **r = &ranges; *r; r = &(*r)->next)
        if ((*r)->at == at && (*r)->device == device) {
            Range *gone = *r; *r = gone->next; free(gone->at); free(gone); live--; return 0;
        }
    return 1;
}
API R cuMemAlloc(uint64_t *p, size_t n) { return make((char **)p, n, 1, "cuMemAlloc"); }
API R cuMemFree(uint64_t p) { return drop((char *)p, 1, "cuMemFree"); }
API R cuMemHostAlloc(void **p, size_t n, unsigned flags) { (void)flags; return make((char **)p, n, 0, "cuMemHostAlloc"); }
API R cuMemFreeHost(void *p) { return drop(p, 0, "cuMemFreeHost"); }

API R cuStreamCreate(Stream **s, unsigned flags) {
    ENTER("cuStreamCreate", 1);
    if (flags != 1) return 1; /* the layer's rule: never a stream that waits for the legacy one */
    *s = calloc(1, sizeof **s); (*s)->magic = 1; live++;
    return 0;
}
API R cuStreamDestroy(Stream *s) { ENTER("cuStreamDestroy", 1); if (s->magic != 1) return 400; s->magic = 0; live--; return 0; }
API R cuStreamSynchronize(Stream *s) {
    ENTER("cuStreamSynchronize", 1);
    if (s->magic != 1) return 400;
    if (s->capturing) { s->capturing = 2; return 900; }
    return run(s);
}
API R cuStreamIsCapturing(Stream *s, int *status) { ENTER("cuStreamIsCapturing", 1); if (s->magic != 1) return 400; *status = s->capturing; return 0; }
API R cuStreamBeginCapture(Stream *s, int mode) {
    ENTER("cuStreamBeginCapture", 1);
    if (s->magic != 1) return 400;
    if (mode != 1 || s->capturing) return 1;
    s->capturing = 1; s->n_taped = 0;
    return 0;
}
API R cuStreamEndCapture(Stream *s, Graph **g) {
    ENTER("cuStreamEndCapture", 1);
    int was = s->capturing;
    s->capturing = 0; *g = 0;
    if (was == 0) return 1;
    if (was == 2) return 901;
    *g = calloc(1, sizeof **g); (*g)->magic = 2; live++;
    (*g)->ops = s->taped; (*g)->n = s->n_taped; s->taped = 0; s->n_taped = 0;
    return 0;
}
API R cuGraphInstantiateWithFlags(Graph **e, Graph *g, unsigned long long flags) {
    ENTER("cuGraphInstantiate", 1);
    if (!g || g->magic != 2) return 400;
    if (flags) return 1;
    *e = calloc(1, sizeof **e); (*e)->magic = 3; live++;
    for (int i = 0; i < g->n; i++) push(&(*e)->ops, &(*e)->n, g->ops[i]);
    return 0;
}
API R cuGraphDestroy(Graph *g) { ENTER("cuGraphDestroy", 1); if (!g || g->magic != 2) return 400; g->magic = 0; live--; return 0; }
API R cuGraphExecDestroy(Graph *g) { ENTER("cuGraphExecDestroy", 1); if (!g || g->magic != 3) return 400; g->magic = 0; live--; return 0; }
API R cuGraphLaunch(Graph *g, Stream *s) {
    ENTER("cuGraphLaunch", 1);
    if (!g || g->magic != 3 || s->magic != 1) return 400;
    for (int i = 0; i < g->n; i++) enqueue(s, g->ops[i]);
    return 0;
}

API R cuMemcpyHtoDAsync(uint64_t to, const void *from, size_t n, Stream *s) {
    ENTER("cuMemcpyHtoDAsync", 1);
    if (!s || s->magic != 1) return 400;
    if (!inside(from, n, 0)) return 1;
    enqueue(s, (Op){COPY, (char *)to, from, n, 0, 1, 0, 0, 0});
    return 0;
}
API R cuMemcpyDtoHAsync(void *to, uint64_t from, size_t n, Stream *s) {
    ENTER("cuMemcpyDtoHAsync", 1);
    if (!s || s->magic != 1) return 400;
    if (!inside(to, n, 0)) return 1;
    enqueue(s, (Op){COPY, to, (char *)from, n, 0, 0, 1, 0});
    return 0;
}

API R cuEventCreate(Event **e, unsigned flags) { ENTER("cuEventCreate", 1); (void)flags; *e = calloc(1, sizeof **e); (*e)->magic = 4; live++; return 0; }
API R cuEventDestroy(Event *e) { ENTER("cuEventDestroy", 1); if (e->magic != 4) return 400; e->magic = 0; live--; return 0; }
static Stream *recorded_on;
API R cuEventRecord(Event *e, Stream *s) {
    ENTER("cuEventRecord", 1);
    if (e->magic != 4 || !s || s->magic != 1) return 400;
    e->reached = 0; recorded_on = s;
    enqueue(s, (Op){RECORD, 0, 0, 0, 0, 0, 0, e, 0});
    return 0;
}
API R cuEventSynchronize(Event *e) { ENTER("cuEventSynchronize", 1); if (e->magic != 4) return 400; return e->reached ? 0 : run(recorded_on); }
API R cuEventElapsedTime(float *ms, Event *a, Event *b) {
    ENTER("cuEventElapsedTime", 1);
    if (a->magic != 4 || b->magic != 4) return 400;
    if (!a->reached || !b->reached) return 600;
    *ms = (float)(b->at_ms - a->at_ms);
    return 0;
}

API R cuModuleLoadData(void **m, const void *image) {
    ENTER("cuModuleLoadData", 1);
    if (memcmp(image, "\x7f" "ELF", 4) && !strstr(image, ".version")) return 200;
    live++; *m = &module_object;
    return 0;
}
API R cuModuleLoadDataEx(void **m, const void *image, unsigned n, void *o, void *v) { (void)n; (void)o; (void)v; return cuModuleLoadData(m, image); }
API R cuModuleUnload(void *m) { ENTER("cuModuleUnload", 1); if (m != &module_object) return 400; live--; return 0; }
API R cuModuleGetFunction(void **f, void *m, const char *name) {
    ENTER("cuModuleGetFunction", 1);
    if (m != &module_object) return 400;
    if (!strncmp(name, "resample_", 9)) { *f = &idle_object; return 0; }
    if (strcmp(name, "add_bytes") && strcmp(name, "stand_in_engine")) return 500;
    *f = strcmp(name, "add_bytes") ? &engine_object : &function_object;
    return 0;
}
API R cuFuncSetBlockShape(void *f, int x, int y, int z) { (void)x; (void)y; (void)z; return f == &function_object || f == &idle_object ? 0 : 400; }
API R cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, Stream *s, void **parameters, void **extra) {
    ENTER("cuLaunchKernel", 1);
    if (f == &idle_object) return s && s->magic == 1 ? 0 : 400;
    if ((f != &function_object && f != &engine_object) || !s || s->magic != 1) return 400;
    if (!gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024) return 1;
    if (shared > 48 * 1024) return 701;
    if (f == &engine_object) {
        if (!parameters) return 1;
        int32_t image_bytes = *(int32_t *)parameters[3];
        enqueue(s, (Op){ENGINE, *(char **)parameters[1], *(char **)parameters[2], (size_t)gx * image_bytes, image_bytes,
                        1, 1, 0, *(float **)parameters[0]});
        return 0;
    }
    uint64_t to, from; int32_t n, add;
    if (parameters) {
        to = *(uint64_t *)parameters[0]; from = *(uint64_t *)parameters[1];
        n = *(int32_t *)parameters[2]; add = *(int32_t *)parameters[3];
    } else { /* pycuda packs them: CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE */
        if (extra[0] != (void *)1 || extra[2] != (void *)2 || *(size_t *)extra[3] != 24) return 1;
        const char *packed = extra[1];
        memcpy(&to, packed, 8); memcpy(&from, packed + 8, 8); memcpy(&n, packed + 16, 4); memcpy(&add, packed + 20, 4);
    }
    enqueue(s, (Op){KERNEL, (char *)to, (char *)from, n, add, 1, 1, 0, 0});
    return 0;
}

API R cuGetErrorString(R code, const char **text) {
    *text = code == 2 ? "out of memory" : code == 700 ? "an illegal memory access was encountered"
          : code == 101 ? "invalid device ordinal" : code == 200 ? "device kernel image is invalid"
          : code == 500 ? "named symbol not found" : code == 201 ? "invalid device context"
          : code == 900 ? "operation not permitted when stream is capturing" : code == 1 ? "invalid argument" : "?";
    return 0;
}

/* Versioned names under which the library is linked against; cuGetProcAddress drops the suffix. */
#define ALIAS(name, target) API __typeof__(target) name __attribute__((alias(#target)))
ALIAS(cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRelease);
ALIAS(cuCtxPushCurrent_v2, cuCtxPushCurrent);
ALIAS(cuCtxPopCurrent_v2, cuCtxPopCurrent);
ALIAS(cuMemAlloc_v2, cuMemAlloc);
ALIAS(cuMemFree_v2, cuMemFree);
ALIAS(cuStreamDestroy_v2, cuStreamDestroy);
ALIAS(cuStreamBeginCapture_v2, cuStreamBeginCapture);
ALIAS(cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync);
ALIAS(cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync);
ALIAS(cuEventDestroy_v2, cuEventDestroy);
ALIAS(cuEventElapsedTime_v2, cuEventElapsedTime);
ALIAS(cuGraphInstantiate, cuGraphInstantiateWithFlags);

API R cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    (void)version; (void)flags;
    *function = strncmp(symbol, "cu", 2) ? 0 : dlsym(RTLD_DEFAULT, symbol);
    if (!strcmp(symbol, "cuGetProcAddress")) *function = (void *)cuGetProcAddress_v2;
    if (!*function) { Dl_info me; void *self; if (dladdr((void *)cuInit, &me) && (self = dlopen(me.dli_fname, RTLD_NOW))) *function = dlsym(self, symbol); }
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
