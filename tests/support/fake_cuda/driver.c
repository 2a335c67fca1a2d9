// libcuda over the same memory, as cuda-core and cuda-bindings use it. A thread has a context when it
// set one; calls that need one fail without. What is not here is found, and fails as unsupported.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { PAGEABLE, PINNED, DEVICE };
enum { INVALID_CONTEXT = 201, CAPTURE_UNSUPPORTED = 900, NOT_SUPPORTED = 801 };

extern void *fake_capturing;
void fake_note(const char *, ...);
int fake_kind(const void *), fake_allocate(void **, size_t, int), fake_free(void *), fake_copy(void *, const void *, size_t);
int fake_copy_rows(void *, size_t, const void *, size_t, size_t, size_t);
int cudaDeviceGetAttribute(int *, int, int);

static __thread void *current;
static void *const context = (void *)0xC0C0, *const pool = (void *)0xD001;

#define NEEDS_CONTEXT \
    if (!current) { fake_note("wrong thread without a context: %s", __func__); return INVALID_CONTEXT; }

static void *handle(void) {
    static uintptr_t last = 0x500000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_SEQ_CST);
}

// --- device and context ---

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int number) { return *device = 0, number ? 101 : 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Stand-in", size); return 0; }
int cuDeviceTotalMem_v2(size_t *size, int device) { return *size = 140ul << 30, 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { return cudaDeviceGetAttribute(value, which, device); }
int cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 7, 16); return 0; }
int cuDevicePrimaryCtxRetain(void **c, int device) { return *c = context, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *c) { return current = c, 0; }
int cuCtxGetCurrent(void **c) { return *c = current, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, current ? 0 : INVALID_CONTEXT; }
int cuCtxPushCurrent_v2(void *c) { return current = c, 0; }
int cuCtxPopCurrent_v2(void **c) { if (c) *c = current; return 0; }
int cuCtxSynchronize(void) { fake_note("wait context"); return 0; }
int cuCtxGetId(void *c, unsigned long long *id) { return *id = 1, 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cuGetErrorName(int error, const char **name) {
    *name = error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : error ? "CUDA_ERROR_UNKNOWN" : "CUDA_SUCCESS";
    return 0;
}
int cuGetErrorString(int error, const char **text) { return *text = "stand-in", 0; }

// --- streams, events, graphs ---

int cuStreamCreateWithPriority(void **s, unsigned flags, int priority) { NEEDS_CONTEXT return *s = handle(), 0; }
int cuStreamCreate(void **s, unsigned flags) { NEEDS_CONTEXT return *s = handle(), 0; }
int cuStreamDestroy_v2(void *s) { return 0; }
int cuStreamSynchronize(void *s) { fake_note("wait stream"); return fake_capturing ? CAPTURE_UNSUPPORTED : 0; }
int cuStreamGetCtx(void *s, void **c) { return *c = context, 0; }
int cuStreamGetCtx_v2(void *s, void **c, void **green) { *c = context; if (green) *green = NULL; return 0; }
int cuStreamGetFlags(void *s, unsigned *flags) { return *flags = 1, 0; }
int cuStreamGetPriority(void *s, int *priority) { return *priority = 0, 0; }
int cuStreamGetDevice(void *s, int *device) { return *device = 0, 0; }
int cuStreamGetId(void *s, unsigned long long *id) { return *id = (uintptr_t)s, 0; }
int cuStreamWaitEvent(void *s, void *event, unsigned flags) { fake_note("order"); return 0; }
int cuEventCreate(void **event, unsigned flags) { NEEDS_CONTEXT return *event = handle(), 0; }
int cuEventRecord(void *event, void *s) { fake_note("record %p", event); return 0; }
int cuEventSynchronize(void *event) { fake_note("wait %p", event); return 0; }
int cuEventQuery(void *event) { return 0; }
int cuEventDestroy_v2(void *event) { return 0; }
int cuEventElapsedTime(float *ms, void *from, void *to) { return *ms = 1, 0; }
int cuEventElapsedTime_v2(float *ms, void *from, void *to) { return *ms = 1, 0; }
int cuStreamBeginCapture_v2(void *s, int mode) { fake_note("capture"); return fake_capturing = s, 0; }
int cuStreamEndCapture(void *s, void **graph) { fake_capturing = NULL; fake_note("end"); return *graph = handle(), 0; }
int cuStreamIsCapturing(void *s, int *status) { return *status = s && s == fake_capturing, 0; }
static int info(void *s, int *status, unsigned long long *id, void **graph, size_t *count) {
    *status = s && s == fake_capturing;
    if (id) *id = 1;
    if (graph) *graph = (void *)0xA0;
    if (count) *count = 0;
    return 0;
}
int cuStreamGetCaptureInfo_v2(void *s, int *status, unsigned long long *id, void **graph, void *on, size_t *n) { return info(s, status, id, graph, n); }
int cuStreamGetCaptureInfo_v3(void *s, int *status, unsigned long long *id, void **graph, void **on, void **edges, size_t *n) {
    if (on) *on = NULL;
    if (edges) *edges = NULL;
    return info(s, status, id, graph, n);
}
int cuGraphCreate(void **graph, unsigned flags) { return *graph = handle(), 0; }
int cuGraphInstantiateWithParams(void **exec, void *graph, void *parameters) { memset((char *)parameters + 24, 0, 4); return *exec = handle(), 0; }
int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags) { return *exec = handle(), 0; }
int cuGraphLaunch(void *exec, void *s) { fake_note("launch"); return 0; }
int cuGraphUpload(void *exec, void *s) { return 0; }
int cuGraphDestroy(void *graph) { return 0; }
int cuGraphExecDestroy(void *exec) { return 0; }
int cuGraphReleaseUserObject(void *graph, void *object, unsigned count) { return 0; }
int cuGraphRetainUserObject(void *graph, void *object, unsigned count, unsigned flags) { return 0; }
int cuUserObjectCreate(void **object, void *data, void (*destroy)(void *), unsigned count, unsigned flags) { return *object = handle(), 0; }
int cuUserObjectRelease(void *object, unsigned count) { return 0; }

// --- memory ---

int cuDeviceGetDefaultMemPool(void **p, int device) { return *p = pool, 0; }
int cuDeviceGetMemPool(void **p, int device) { return *p = pool, 0; }
int cuMemGetMemPool(void **p, void *location, int type) { return *p = pool, 0; }
int cuMemGetDefaultMemPool(void **p, void *location, int type) { return *p = pool, 0; }
int cuMemPoolCreate(void **p, void *properties) { return *p = handle(), 0; }
int cuMemPoolDestroy(void *p) { return 0; }
int cuMemPoolSetAttribute(void *p, int which, void *value) { return 0; }
int cuMemPoolGetAttribute(void *p, int which, void *value) { return *(uint64_t *)value = 0, 0; }
int cuMemPoolSetAccess(void *p, void *map, size_t count) { return 0; }
int cuMemPoolTrimTo(void *p, size_t keep) { fake_note("trim"); return 0; }
int cuMemAllocFromPoolAsync(void **to, size_t n, void *p, void *s) { NEEDS_CONTEXT return fake_allocate(to, n, DEVICE); }
int cuMemAllocAsync(void **to, size_t n, void *s) { NEEDS_CONTEXT return fake_allocate(to, n, DEVICE); }
int cuMemAlloc_v2(void **to, size_t n) { NEEDS_CONTEXT return fake_allocate(to, n, DEVICE); }
int cuMemAllocHost_v2(void **to, size_t n) { NEEDS_CONTEXT return fake_allocate(to, n, PINNED); }
int cuMemHostAlloc(void **to, size_t n, unsigned flags) { NEEDS_CONTEXT return fake_allocate(to, n, PINNED); }
int cuMemFreeAsync(void *address, void *s) { return fake_free(address); }
int cuMemFree_v2(void *address) { return fake_free(address); }
int cuMemFreeHost(void *address) { return fake_free(address); }
int cuMemcpyAsync(void *to, void *from, size_t n, void *s) { NEEDS_CONTEXT return fake_copy(to, from, n); }
int cuMemsetD8Async(void *to, unsigned char value, size_t n, void *s) { NEEDS_CONTEXT fake_note("set %zu", n); memset(to, value, n); return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *all) { NEEDS_CONTEXT return *free = 130ul << 30, *all = 140ul << 30, 0; }
struct copy2d {  // CUDA_MEMCPY2D: its sides end in pitches of their own
    size_t from_x, from_y; int from_type; void *from_host, *from, *from_array; size_t from_pitch;
    size_t to_x, to_y; int to_type; void *to_host, *to, *to_array; size_t to_pitch, width, height;
};
int cuMemcpy2DAsync_v2(struct copy2d *c, void *s) {
    NEEDS_CONTEXT
    return fake_copy_rows(c->to, c->to_pitch, c->from, c->from_pitch, c->width, c->height);
}
enum { MEMORY_TYPE = 2 };
int cuPointerGetAttribute(void *value, int which, void *address) {
    *(int *)value = which == MEMORY_TYPE ? (fake_kind(address) == DEVICE ? 2 : 1) : 0;
    return 0;
}
int cuPointerGetAttributes(unsigned count, int *which, void **values, void *address) {
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(values[i], which[i], address);
    return 0;
}

// --- how all of this is found ---

static int unsupported(void) { fake_note("unsupported"); return NOT_SUPPORTED; }

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    static const char *suffixes[] = {"_v3", "_v2", ""};
    char full[200];
    *function = unsupported;
    if (status) *status = 0;
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    for (int i = 0; i < 3; i++) {  // the newest that is here
        snprintf(full, sizeof full, "%s%s", name, suffixes[i]);
        void *found = dlsym(self, full);
        if (found) return *function = found, 0;
    }
    return 0;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
