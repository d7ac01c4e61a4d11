// A CUDA runtime without a GPU, in the place of libcudart: what torch's CUDA build calls, on the host's memory.
//
// Each stream is a thread that works through its queue in order and rests at random before each piece of work. Device
// memory is host memory filled with NaN bits. A kernel cannot run here: ops.py queues its work with cudaLaunchHostFunc,
// and a launch that it did not intercept is an error that names the kernel.
//
// Set by environment variables: SIM_GPUS (count), SIM_GPU_MIB (memory; of each, with commas), SIM_GPU_CAPABILITY (90),
// SIM_GPU_REST_US (longest rest), SIM_GPU_PIN_FAILS, SIM_GPU_REPORT (a file that each process appends a line to).

#include <cuda_runtime_api.h>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <dlfcn.h>
#include <unistd.h>
#include <vector>

namespace {

using Lock = std::unique_lock<std::mutex>;

long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current = 0;

cudaError_t fail(cudaError_t error) { return last_error = error; }

// A queued operation of ops.py needs Python's lock: whoever waits for one while he holds it must let it go.
struct WithoutPython {
  void *thread = nullptr;
  WithoutPython() {
    static const auto held = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    static const auto runs = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "Py_IsInitialized"));
    static const auto save = reinterpret_cast<void *(*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
    if (runs && runs() && held()) thread = save();
  }
  ~WithoutPython() {
    static const auto restore = reinterpret_cast<void (*)(void *)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
    if (thread) restore(thread);
  }
};

const std::vector<int> &visible() {  // the physical GPUs that this process sees
  static const std::vector<int> *gpus = [] {
    auto *found = new std::vector<int>;
    const int count = setting("SIM_GPUS", 1);
    const char *chosen = getenv("CUDA_VISIBLE_DEVICES");
    for (int gpu = 0; gpu < count && !chosen; gpu++) found->push_back(gpu);
    for (const char *at = chosen; at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "") {
      if (*at < '0' || *at > '9' || atoi(at) >= count) break;
      found->push_back(atoi(at));
    }
    return found;
  }();
  return *gpus;
}

size_t bytes_of_memory(int device) {
  const char *at = getenv("SIM_GPU_MIB");
  for (int gpu = visible()[device]; at && gpu > 0 && strchr(at, ','); gpu--) at = strchr(at, ',') + 1;
  return static_cast<size_t>(at && *at ? atol(at) : 4096) << 20;
}

struct State;  // of the whole process, never destroyed: threads outlive main

struct Stream {
  int device, priority;
  unsigned flags;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false;

  Stream(int device, unsigned flags, int priority) : device(device), priority(priority), flags(flags) {
    std::thread([this] { run(); }).detach();
  }
  void run() {
    std::minstd_rand dice(std::random_device{}());
    const long rest = setting("SIM_GPU_REST_US", 200);
    for (;;) {
      std::function<void()> work;
      {
        Lock lock(mutex);
        busy = false;
        changed.notify_all();
        changed.wait(lock, [this] { return !queue.empty(); });
        work = std::move(queue.front());
        queue.pop_front();
        busy = true;
      }
      if (rest) usleep(dice() % rest);
      work();
    }
  }
  void submit(std::function<void()> work) {
    Lock lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  bool idle() {
    Lock lock(mutex);
    return queue.empty() && !busy;
  }
  void wait() {
    WithoutPython released;
    Lock lock(mutex);
    changed.wait(lock, [this] { return queue.empty() && !busy; });
  }
};

struct Mark {  // one recording of an event
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::chrono::steady_clock::time_point when;
  void set() {
    Lock lock(mutex);
    done = true;
    when = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    WithoutPython released;
    Lock lock(mutex);
    changed.wait(lock, [this] { return done; });
  }
};

struct Event {
  unsigned flags;
  std::mutex mutex;
  std::shared_ptr<Mark> mark;
};

struct State {
  std::mutex mutex;
  std::map<char *, std::pair<size_t, int>> memory;  // address -> (bytes, device)
  std::map<char *, size_t> pinned;
  std::map<int, size_t> used;
  std::vector<Stream *> streams;
  std::map<int, Stream *> default_streams;
  std::set<int> contexts;
  std::map<const void *, std::string> kernels;
  std::set<std::string> refused;
};

State &state() {
  static State *one = new State;
  return *one;
}

void touch(int device) {
  Lock lock(state().mutex);
  state().contexts.insert(device);
}

Stream *stream_of(cudaStream_t handle) {
  if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread) return reinterpret_cast<Stream *>(handle);
  Lock lock(state().mutex);
  state().contexts.insert(current);
  Stream *&stream = state().default_streams[current];
  if (!stream) state().streams.push_back(stream = new Stream(current, cudaStreamDefault, 0));
  return stream;
}

void wait_for_device(int device) {
  std::vector<Stream *> streams;
  {
    Lock lock(state().mutex);
    for (Stream *stream : state().streams)
      if (stream->device == device) streams.push_back(stream);
  }
  for (Stream *stream : streams) stream->wait();
}

template <class Map>
typename Map::iterator covering(Map &ranges, const void *address) {
  auto next = ranges.upper_bound(static_cast<char *>(const_cast<void *>(address)));
  return next == ranges.begin() ? ranges.end() : std::prev(next);
}

int device_of(const void *address) {  // -1 if it is not device memory
  Lock lock(state().mutex);
  auto found = covering(state().memory, address);
  if (found == state().memory.end() || static_cast<const char *>(address) >= found->first + found->second.first) return -1;
  return found->second.second;
}

bool is_pinned(const void *address) {
  Lock lock(state().mutex);
  auto found = covering(state().pinned, address);
  return found != state().pinned.end() && static_cast<const char *>(address) < found->first + found->second;
}

void copy_in_pieces(void *to, const void *from, size_t size) {  // so that a change meanwhile tears it
  static const long rest = setting("SIM_GPU_REST_US", 200);
  const size_t half = size / 2;
  memcpy(to, from, half);
  if (rest && size > 4096) usleep(rest);
  memcpy(static_cast<char *>(to) + half, static_cast<const char *>(from) + half, size - half);
}

cudaError_t refuse(const std::string &name) {
  Lock lock(state().mutex);
  if (state().refused.insert(name).second) fprintf(stderr, "simulated GPU: no such call: %s\n", name.c_str());
  return fail(cudaErrorNotSupported);
}

struct Report {
  ~Report() {
    const char *path = getenv("SIM_GPU_REPORT");
    FILE *file = path && *path ? fopen(path, "a") : nullptr;
    if (!file) return;
    fprintf(file, "rank %s contexts", getenv("RANK") ? getenv("RANK") : "0");
    for (int device : state().contexts) fprintf(file, " %d", device);
    for (auto &name : state().refused) fprintf(file, " refused:%s", name.c_str());
    fprintf(file, "\n");
    fclose(file);
  }
} report;

}  // namespace

void sim_submit(cudaStream_t stream, std::function<void()> work) { stream_of(stream)->submit(std::move(work)); }
int sim_device_of(const void *address) { return device_of(address); }

extern "C" {

cudaError_t sim_refuse(const char *name) { return refuse(name); }
int sim_has_context(int device) {
  Lock lock(state().mutex);
  return state().contexts.count(device);
}

// ---- devices

cudaError_t cudaGetDeviceCount(int *count) {
  *count = visible().size();
  return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= static_cast<int>(visible().size())) return fail(cudaErrorInvalidDevice);
  current = device;
  touch(device);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  touch(current);
  wait_for_device(current);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device) {
  if (device < 0 || device >= static_cast<int>(visible().size())) return fail(cudaErrorInvalidDevice);
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "Simulated GPU");
  memcpy(properties->uuid.bytes, "simulated GPU \0", 15);
  properties->uuid.bytes[15] = visible()[device];
  const long capability = setting("SIM_GPU_CAPABILITY", 90);
  properties->major = capability / 10, properties->minor = capability % 10;
  properties->totalGlobalMem = bytes_of_memory(device);
  properties->sharedMemPerBlock = 48 << 10, properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32, properties->multiProcessorCount = 132;
  properties->maxThreadsPerBlock = 1024, properties->maxThreadsPerMultiProcessor = 2048;
  properties->l2CacheSize = 50 << 20, properties->pciBusID = visible()[device] + 1;
  properties->unifiedAddressing = properties->concurrentKernels = properties->canMapHostMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return last_error;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = properties.warpSize; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = properties.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = properties.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = properties.regsPerBlock; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
  return snprintf(id, size, "0000:%02x:00.0", visible().at(device) + 1), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }

// ---- errors

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorHostMemoryAlreadyRegistered: return "part or all of the requested memory range is already mapped";
    default: return "an error of the simulated GPU";
  }
}

// ---- memory

cudaError_t cudaMalloc(void **address, size_t size) {
  touch(current);
  {
    Lock lock(state().mutex);
    size_t &used = state().used[current];
    if (used + size > bytes_of_memory(current)) return fail(cudaErrorMemoryAllocation);
    used += size;
  }
  if (posix_memalign(address, 512, std::max<size_t>(size, 1))) return fail(cudaErrorMemoryAllocation);
  memset(*address, 0xFF, size);
  Lock lock(state().mutex);
  state().memory[static_cast<char *>(*address)] = {size, current};
  return cudaSuccess;
}
cudaError_t cudaFree(void *address) {
  touch(current);
  if (!address) return cudaSuccess;
  wait_for_device(std::max(device_of(address), 0));
  Lock lock(state().mutex);
  auto found = state().memory.find(static_cast<char *>(address));
  if (found == state().memory.end()) return fail(cudaErrorInvalidValue);
  memset(address, 0xFF, found->second.first);
  state().used[found->second.second] -= found->second.first;
  state().memory.erase(found);
  free(address);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  touch(current);
  Lock lock(state().mutex);
  *total = bytes_of_memory(current);
  *available = *total - state().used[current];
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned) {
  touch(current);
  if (posix_memalign(address, 4096, std::max<size_t>(size, 1))) return fail(cudaErrorMemoryAllocation);
  memset(*address, 0xFF, size);
  Lock lock(state().mutex);
  state().pinned[static_cast<char *>(*address)] = size;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *address) {
  wait_for_device(current);
  Lock lock(state().mutex);
  if (!state().pinned.erase(static_cast<char *>(address))) return fail(cudaErrorInvalidValue);
  free(address);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void *address, size_t size, unsigned) {
  touch(current);
  if (setting("SIM_GPU_PIN_FAILS", 0)) return fail(cudaErrorMemoryAllocation);
  if (is_pinned(address)) return fail(cudaErrorHostMemoryAlreadyRegistered);
  Lock lock(state().mutex);
  state().pinned[static_cast<char *>(address)] = size;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
  wait_for_device(current);
  Lock lock(state().mutex);
  return state().pinned.erase(static_cast<char *>(address)) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *address) {
  memset(attributes, 0, sizeof *attributes);
  const int device = device_of(address);
  attributes->type = device >= 0            ? cudaMemoryTypeDevice
                     : is_pinned(address) ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
  attributes->device = std::max(device, 0);
  attributes->devicePointer = attributes->hostPointer = const_cast<void *>(address);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  const bool to_device = device_of(to) >= 0, from_device = device_of(from) >= 0;
  if (!from_device && !is_pinned(from)) {  // pageable: read before the call returns
    auto staged = std::make_shared<std::vector<char>>(static_cast<const char *>(from), static_cast<const char *>(from) + size);
    stream->submit([=] { memcpy(to, staged->data(), size); });
  } else {
    stream->submit([=] { copy_in_pieces(to, from, size); });
  }
  if (!to_device && !is_pinned(to)) stream->wait();  // pageable: complete when the call returns
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, size, kind, nullptr);
  stream_of(nullptr)->wait();
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  stream_of(stream)->submit([=] { memset(to, value, size); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
  Stream *stream = new Stream(current, flags, priority);
  Lock lock(state().mutex);
  state().contexts.insert(current);
  state().streams.push_back(stream);
  *made = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *made) { return cudaStreamCreateWithPriority(made, cudaStreamDefault, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return stream_of(stream)->wait(), cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream)->idle() ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *,
                                     const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *) {
  if (id) *id = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  stream_of(stream)->submit([=] { function(data); });
  return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) {
  touch(current);
  *made = reinterpret_cast<cudaEvent_t>(new Event{flags, {}, {}});
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *made) { return cudaEventCreateWithFlags(made, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete reinterpret_cast<Event *>(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  Event *event = reinterpret_cast<Event *>(handle);
  auto mark = std::make_shared<Mark>();
  {
    Lock lock(event->mutex);
    event->mark = mark;
  }
  stream_of(stream)->submit([mark] { mark->set(); });
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
static std::shared_ptr<Mark> mark_of(cudaEvent_t handle) {
  Event *event = reinterpret_cast<Event *>(handle);
  Lock lock(event->mutex);
  return event->mark;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  touch(current);  // it binds the calling thread's device
  if (auto mark = mark_of(event)) mark->wait();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  auto mark = mark_of(event);
  if (!mark) return cudaSuccess;
  Lock lock(mark->mutex);
  return mark->done ? cudaSuccess : fail(cudaErrorNotReady);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  auto start = mark_of(from), end = mark_of(to);
  if (!start || !end) return fail(cudaErrorInvalidResourceHandle);
  if (cudaEventQuery(from) != cudaSuccess || cudaEventQuery(to) != cudaSuccess) return last_error;
  *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count();
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (auto mark = mark_of(event)) stream_of(stream)->submit([mark] { mark->wait(); });
  return cudaSuccess;
}

// ---- kernels: none

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  Lock lock(state().mutex);
  state().kernels[function] = name;
}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaSuccess; }
static cudaError_t refuse_kernel(const void *function) {
  std::string name;
  {
    Lock lock(state().mutex);
    name = state().kernels[function];
  }
  return refuse("kernel " + name);
}
cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) { return refuse_kernel(function); }
cudaError_t __cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) { return refuse_kernel(function); }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function)), cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
  static const auto absent = +[]() -> int { return 801; };  // CUDA_ERROR_NOT_SUPPORTED
  (void)symbol;
  *function = reinterpret_cast<void *>(absent);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// ---- the driver, as far as torch and Triton call it themselves: compiled kernels are loaded, and compute nothing

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, 0; }
int cuGetErrorString(int, const char **text) { return *text = "an error of the simulated GPU", 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = sim_has_context(device), 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &state(), 0; }
int cuCtxGetCurrent(void **context) { return *context = &state(), 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuModuleLoadData(void **module, const void *) { return *module = &state(), 0; }
int cuModuleLoad(void **module, const char *) { return *module = &state(), 0; }
int cuModuleUnload(void *) { return 0; }
int cuModuleGetFunction(void **function, void *, const char *) { return *function = &state(), 0; }
int cuFuncGetAttribute(int *value, int attribute, void *) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetCacheConfig(void *, int) { return 0; }
int cuFuncSetAttribute(void *, int, int) { return 0; }
int cuPointerGetAttribute(unsigned long long *value, int, unsigned long long address) { return *value = address, 0; }
int cuLaunchKernelEx(const void *, void *, void **, void **) { return 0; }
int cuLaunchKernel(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **) {
  return 0;
}
}
