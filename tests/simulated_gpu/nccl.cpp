// NCCL between processes that use the simulated CUDA runtime, through shared memory.
//
// Every collective is queued on its stream, waits there for all ranks, and goes on waiting for a rank that is gone until
// the communicator is aborted, as NCCL does. Ranks that issue different collectives are found out. Sums are added in an
// order that changes from call to call.

#include <cuda_runtime_api.h>
#define __CUDA_FP16_H__  // nccl.h includes these for nothing, and they need headers that torch does not bring
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>

extern "C" int sim_refuse(const char *name);
void sim_submit(cudaStream_t stream, std::function<void()> work);
int sim_device_of(const void *address);

namespace {

constexpr size_t PIECE = 1 << 20;
constexpr int MOST = 16;  // ranks

struct Shared {
  std::atomic<int> arrived;
  std::atomic<long> generation;
  long signature[MOST];
  alignas(64) char data[MOST][PIECE];
};

}  // namespace

struct ncclComm {
  int rank, size, device;
  Shared *shared;
  std::atomic<bool> aborted{false};
  std::atomic<int> queued{0};
  long calls = 0;

  bool barrier() {  // false if the communicator was aborted meanwhile
    const long before = shared->generation;
    if (++shared->arrived == size) {
      shared->arrived = 0;
      shared->generation++;
    }
    while (shared->generation == before) {
      if (aborted) return false;
      usleep(100);
    }
    return true;
  }
};

namespace {

size_t size_of(ncclDataType_t type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type < 10 ? sizes[type] : 1;
}

// `mine(offset, size)` is where this rank's piece is read, `got(offset, size)` uses the pieces of all ranks.
void collect(ncclComm *comm, long signature, size_t bytes, std::function<const char *(size_t)> mine,
             std::function<void(size_t, size_t)> got) {
  for (size_t at = 0; at < bytes || at == 0; at += PIECE) {
    const size_t size = std::min(PIECE, bytes - at);
    comm->shared->signature[comm->rank] = signature;
    memcpy(comm->shared->data[comm->rank], mine(at), size);
    if (!comm->barrier()) return;
    for (int rank = 0; rank < comm->size; rank++)
      if (comm->shared->signature[rank] != signature) {
        fprintf(stderr, "simulated NCCL: rank %d and rank %d issue different collectives\n", comm->rank, rank);
        _exit(87);
      }
    got(at, size);
    if (!comm->barrier()) return;
  }
}

ncclResult_t enqueue(ncclComm *comm, const void *sent, const void *received, cudaStream_t stream, std::function<void()> work) {
  if (sim_device_of(sent) != comm->device || sim_device_of(received) != comm->device) {
    fprintf(stderr, "simulated NCCL: a buffer is not on GPU %d\n", comm->device);
    return ncclInvalidArgument;
  }
  comm->queued++;
  sim_submit(stream, [=] {
    if (!comm->aborted) work();
    comm->queued--;
  });
  return ncclSuccess;
}

template <class T>
void reduce(ncclComm *comm, T *to, size_t size, ncclRedOp_t op, int first) {
  for (size_t i = 0; i < size / sizeof(T); i++) {
    T total{};
    for (int turn = 0; turn < comm->size; turn++) {
      const T value = reinterpret_cast<const T *>(comm->shared->data[(first + turn) % comm->size])[i];
      total = turn == 0 ? value : op == ncclSum ? total + value : op == ncclMax ? std::max(total, value) : std::min(total, value);
    }
    to[i] = total;
  }
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int *version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
const char *ncclGetErrorString(ncclResult_t) { return "an error of the simulated NCCL"; }
const char *ncclGetLastError(ncclComm_t) { return ""; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  std::random_device dice;
  snprintf(id->internal, sizeof id->internal, "/simulated-nccl-%08x%08x", dice(), dice());
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int size, ncclUniqueId id, int rank, ncclConfig_t *) {
  const int file = shm_open(id.internal, O_RDWR | O_CREAT, 0600);
  if (file < 0 || size > MOST || ftruncate(file, sizeof(Shared))) return ncclSystemError;
  void *memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  int device;
  cudaGetDevice(&device);
  auto *comm = new ncclComm{rank, size, device, static_cast<Shared *>(memory)};
  comm->barrier();
  shm_unlink(id.internal);
  return *made = comm, ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *made, int size, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(made, size, id, rank, nullptr);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->aborted = true;
  while (comm->queued) usleep(100);
  return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  while (comm->queued) usleep(100);
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *error) { return *error = ncclSuccess, ncclSuccess; }
ncclResult_t ncclCommCount(ncclComm_t comm, int *count) { return *count = comm->size, ncclSuccess; }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) { return *rank = comm->rank, ncclSuccess; }
ncclResult_t ncclGroupStart() { return ncclSuccess; }
ncclResult_t ncclGroupEnd() { return ncclSuccess; }

ncclResult_t ncclAllReduce(const void *sent, void *received, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  const int first = ++comm->calls % comm->size;
  return enqueue(comm, sent, received, stream, [=] {
    collect(comm, 1'000'003 * bytes + 1, bytes, [=](size_t at) { return static_cast<const char *>(sent) + at; },
            [=](size_t at, size_t size) {
              char *to = static_cast<char *>(received) + at;
              switch (type) {
                case ncclFloat32: return reduce(comm, reinterpret_cast<float *>(to), size, op, first);
                case ncclFloat64: return reduce(comm, reinterpret_cast<double *>(to), size, op, first);
                case ncclInt64: return reduce(comm, reinterpret_cast<long *>(to), size, op, first);
                case ncclInt32: return reduce(comm, reinterpret_cast<int *>(to), size, op, first);
                case ncclUint8: return reduce(comm, reinterpret_cast<unsigned char *>(to), size, op, first);
                default: sim_refuse("ncclAllReduce of this dtype");
              }
            });
  });
}
ncclResult_t ncclAllGather(const void *sent, void *received, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  return enqueue(comm, sent, received, stream, [=] {
    collect(comm, 1'000'003 * bytes + 2, bytes, [=](size_t at) { return static_cast<const char *>(sent) + at; },
            [=](size_t at, size_t size) {
              for (int rank = 0; rank < comm->size; rank++)
                memcpy(static_cast<char *>(received) + rank * bytes + at, comm->shared->data[rank], size);
            });
  });
}
ncclResult_t ncclAlltoAll(const void *sent, void *received, size_t count, ncclDataType_t type, ncclComm_t comm,
                          cudaStream_t stream) {
  const size_t bytes = count * size_of(type), whole = bytes * comm->size;
  return enqueue(comm, sent, received, stream, [=] {
    collect(comm, 1'000'003 * bytes + 3, whole, [=](size_t at) { return static_cast<const char *>(sent) + at; },
            [=](size_t at, size_t size) {  // of each rank's message the part for this rank
              const size_t from = std::max(at, comm->rank * bytes), to = std::min(at + size, (comm->rank + 1) * bytes);
              for (int rank = 0; rank < comm->size && from < to; rank++)
                memcpy(static_cast<char *>(received) + rank * bytes + from - comm->rank * bytes,
                       comm->shared->data[rank] + from - at, to - from);
            });
  });
}
ncclResult_t ncclBroadcast(const void *sent, void *received, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  const size_t bytes = count * size_of(type);
  const void *source = comm->rank == root ? sent : received;
  return enqueue(comm, source, received, stream, [=] {
    collect(comm, 1'000'003 * bytes + 4, bytes, [=](size_t at) { return static_cast<const char *>(source) + at; },
            [=](size_t at, size_t size) { memcpy(static_cast<char *>(received) + at, comm->shared->data[root], size); });
  });
}
}
