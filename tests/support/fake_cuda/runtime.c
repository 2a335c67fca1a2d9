// libcudart over the host's memory: everything is done at once, kernels do nothing, all is noted.
//
// FAKE_CUDA_LOG names the file, a line a call: first what kind of call it is, then what it is about.
// build.py adds functions that are not here: they note their names and succeed.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "properties.h"  // struct cudaDeviceProp, of the installed CUDA

enum { PAGEABLE, PINNED, DEVICE };
typedef struct { unsigned x, y, z; } dim3;

void *fake_capturing;  // the stream whose work is being captured, or NULL

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fake_note(const char *format, ...) {
    static FILE *file;
    pthread_mutex_lock(&lock);
    if (!file) file = fopen(getenv("FAKE_CUDA_LOG") ?: "/dev/null", "a");
    va_list arguments;
    va_start(arguments, format);
    if (fake_capturing) fputs("captured ", file);
    vfprintf(file, format, arguments);
    fputc('\n', file);
    fflush(file);
    va_end(arguments);
    pthread_mutex_unlock(&lock);
}

// --- memory ---

static struct block { char *start; size_t size; int kind; struct block *next; } *blocks;

int fake_kind(const void *address) {
    int kind = PAGEABLE;
    pthread_mutex_lock(&lock);
    for (struct block *b = blocks; b; b = b->next)
        if ((char *)address >= b->start && (char *)address < b->start + b->size) kind = b->kind;
    pthread_mutex_unlock(&lock);
    return kind;
}

static const char *place(const void *address) {
    static const char *names[] = {"pageable", "pinned", "device"};
    return names[fake_kind(address)];
}

int fake_allocate(void **to, size_t size, int kind) {
    struct block *b = malloc(sizeof *b);
    if (posix_memalign((void **)&b->start, 512, size ? size : 1)) return 2;
    memset(b->start, kind == DEVICE ? 0x5a : 0, size);
    b->size = size ? size : 1, b->kind = kind;
    pthread_mutex_lock(&lock);
    b->next = blocks, blocks = b;
    pthread_mutex_unlock(&lock);
    *to = b->start;
    fake_note("allocate %s %zu", kind == DEVICE ? "device" : "pinned", size);
    return 0;
}

int fake_free(void *address) {
    if (!address) return 0;
    fake_note("free");
    pthread_mutex_lock(&lock);
    for (struct block **b = &blocks; *b; b = &(*b)->next)
        if ((*b)->start == address) {
            struct block *gone = *b;
            *b = gone->next;
            pthread_mutex_unlock(&lock);
            free(gone->start), free(gone);
            return 0;
        }
    pthread_mutex_unlock(&lock);
    fake_note("wrong free of what was not allocated");
    return 1;
}

int fake_copy(void *to, const void *from, size_t size) {
    fake_note("copy %s %s %zu", place(to), place(from), size);
    memmove(to, from, size);
    return 0;
}

int fake_copy_rows(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width, size_t rows) {
    fake_note("copy %s %s %zu", place(to), place(from), width * rows);
    for (size_t row = 0; row < rows; row++)
        memmove((char *)to + row * to_pitch, (char *)from + row * pitch, width);
    return 0;
}

int cudaMalloc(void **to, size_t n) { return fake_allocate(to, n, DEVICE); }
int cudaMallocFromPoolAsync(void **to, size_t n, void *pool, void *s) { return fake_allocate(to, n, DEVICE); }
int cudaMallocHost(void **to, size_t n) { return fake_allocate(to, n, PINNED); }
int cudaHostAlloc(void **to, size_t n, unsigned flags) { return fake_allocate(to, n, PINNED); }
int cudaFree(void *address) { return fake_free(address); }
int cudaFreeAsync(void *address, void *s) { return fake_free(address); }
int cudaFreeHost(void *address) { return fake_free(address); }
int cudaMemGetInfo(size_t *free, size_t *all) { return *free = 130ul << 30, *all = 140ul << 30, 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { fake_note("wait copy"); return fake_copy(to, from, n); }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) { return fake_copy(to, from, n); }
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch, size_t width, size_t rows, int kind, void *s) {
    return fake_copy_rows(to, to_pitch, from, pitch, width, rows);
}
int cudaMemset(void *to, int value, size_t n) { fake_note("wait set"); memset(to, value, n); return 0; }
int cudaMemsetAsync(void *to, int value, size_t n, void *s) { fake_note("set %zu", n); memset(to, value, n); return 0; }
int cudaMemPoolGetAttribute(void *pool, int which, void *value) { return *(uint64_t *)value = 0, 0; }

struct attributes { int type, device; void *on_device, *on_host; long rest[9]; };
int cudaPointerGetAttributes(struct attributes *found, const void *address) {
    int kind = fake_kind(address);
    *found = (struct attributes){kind, 0, kind ? (void *)address : NULL, kind == PINNED ? (void *)address : NULL};
    return 0;
}

// --- the device, an H200 by its numbers ---

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }

int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    *p = (struct cudaDeviceProp){
        .name = "Stand-in", .totalGlobalMem = 140ul << 30, .major = 9, .warpSize = 32,
        .multiProcessorCount = 132, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32, .sharedMemPerBlock = 49152, .sharedMemPerBlockOptin = 232448,
        .sharedMemPerMultiprocessor = 233472, .regsPerBlock = 65536, .regsPerMultiprocessor = 65536,
        .l2CacheSize = 60 << 20, .memoryPoolsSupported = 1, .cooperativeLaunch = 1,
        .unifiedAddressing = 1, .concurrentKernels = 1, .canMapHostMemory = 1,
    };
    return 0;
}

int cudaDeviceGetAttribute(int *value, int which, int device) {
    static const int known[][2] = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {8, 49152}, {10, 32}, {12, 65536},
        {16, 132}, {38, 60 << 20}, {39, 2048}, {75, 9}, {76, 0}, {81, 233472}, {82, 65536}, {97, 232448},
        {106, 32},
    };
    *value = 1;  // all that is asked besides is whether it can do something
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i][0] == which) *value = known[i][1];
    return 0;
}

// --- streams and events ---

static void *handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_SEQ_CST);
}

int cudaStreamCreate(void **s) { return *s = handle(), 0; }
int cudaStreamCreateWithFlags(void **s, unsigned flags) { return *s = handle(), 0; }
int cudaStreamSynchronize(void *s) { fake_note("wait stream"); return 0; }
int cudaDeviceSynchronize(void) { fake_note("wait device"); return 0; }
int cudaStreamWaitEvent(void *s, void *event, unsigned flags) { fake_note("order"); return 0; }
int cudaStreamIsCapturing(void *s, int *capturing) { return *capturing = s && s == fake_capturing, 0; }
int cudaEventCreate(void **event) { return *event = handle(), 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = handle(), 0; }
int cudaEventRecord(void *event, void *s) { fake_note("record %p", event); return 0; }
int cudaEventRecordWithFlags(void *event, void *s, unsigned flags) { fake_note("record %p", event); return 0; }
int cudaEventSynchronize(void *event) { fake_note("wait %p", event); return 0; }
int cudaEventElapsedTime(float *ms, void *from, void *to) { return *ms = 1, 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
const char *cudaGetErrorName(int error) { return "stand-in"; }
const char *cudaGetErrorString(int error) { return "stand-in"; }

// --- kernels ---

static struct kernel { const void *function; const char *name; struct kernel *next; } *kernels;
static __thread struct { dim3 grid, block; size_t shared; void *stream; } next_launch;

void **__cudaRegisterFatBinary(void *binary) { static void *handles[2]; return handles; }
void __cudaRegisterFunction(void **handles, const char *function, char *device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    struct kernel *k = malloc(sizeof *k);
    *k = (struct kernel){function, name, kernels}, kernels = k;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *s) {
    next_launch.grid = grid, next_launch.block = block, next_launch.shared = shared, next_launch.stream = s;
    return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *s) {
    *grid = next_launch.grid, *block = next_launch.block, *shared = next_launch.shared;
    *(void **)s = next_launch.stream;
    return 0;
}
int __cudaGetKernel(void **kernel, const void *function) { return *kernel = (void *)function, 0; }

static int launch(const void *function, void *s) {
    struct kernel *k = kernels;
    while (k && k->function != function) k = k->next;
    fake_note("kernel %p %.160s", s, k ? k->name : "?");
    return 0;
}
int cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, void *s) { return launch(f, s); }
int __cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, void *s) { return launch(f, s); }
int cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, void *s) { return launch(f, s); }
struct launch_config { dim3 grid, block; size_t shared; void *stream; void *attributes; unsigned count; };
int cudaLaunchKernelExC(const struct launch_config *c, const void *f, void **a) { return launch(f, c->stream); }
int cudaLaunchHostFunc(void *s, void (*function)(void *), void *data) { fake_note("host function"); function(data); return 0; }
int cudaFuncGetAttributes(void *found, const void *function) {
    int *facts = (int *)((char *)memset(found, 0, 140) + 24);
    facts[0] = 1024, facts[1] = 64, facts[2] = facts[3] = 90, facts[5] = 232448;
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int b, size_t s, unsigned flags) { return *blocks = 2, 0; }

static int entry_point(void) { fake_note("unknown entry point"); return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long flags, int *status) {
    *function = entry_point;
    if (status) *status = 0;
    return 0;
}
