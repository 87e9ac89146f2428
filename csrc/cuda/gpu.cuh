// What the row kernel needs of the machine: threads, barriers, asynchronous copies, 16-byte accesses.
// Everything that is not plain C++ is here, so that tests can run the kernel's own source on a CPU with
// another set of these.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../common.h"

#define FASTDPO_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTDPO_HAS_CLUSTERS 1
#else
#define FASTDPO_HAS_CLUSTERS 0
#endif

namespace fastdpo::gpu {

FASTDPO_DEVICE int thread_index() { return threadIdx.x; }
FASTDPO_DEVICE int block_index() { return blockIdx.x; }
FASTDPO_DEVICE int block_count() { return gridDim.x; }

FASTDPO_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// For the accesses in inner loops: one number, where a pointer makes the compiler look up its block's place
// in the cluster again and again.
using SharedAddress = uint32_t;

FASTDPO_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

FASTDPO_DEVICE uint4 load16_shared(SharedAddress address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

FASTDPO_DEVICE void store_shared(SharedAddress address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

FASTDPO_DEVICE void store_shared(SharedAddress address, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

FASTDPO_DEVICE void store16_shared(SharedAddress address, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

FASTDPO_DEVICE void sync_warp() { __syncwarp(); }
FASTDPO_DEVICE void sync_block() { __syncthreads(); }

// For all blocks of the cluster, and what they did to their barriers before.
FASTDPO_DEVICE void sync_cluster() {
#if FASTDPO_HAS_CLUSTERS
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

// A barrier in shared memory, for values that blocks of a cluster send each other. A round ends when
// `expect_bytes` was called once and that many bytes have come in, and the next one begins. Unlike a barrier
// of the whole cluster it waits for these values only, not for D on its way to memory.
using Barrier = uint64_t;

FASTDPO_DEVICE void init_barrier(Barrier* barrier) {
#if FASTDPO_HAS_CLUSTERS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

FASTDPO_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
#if FASTDPO_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Writes `value` where `to` lies in block `rank` of the cluster, and tells the barrier there. Both addresses
// are given as those of this block's own.
FASTDPO_DEVICE void send(float* to, float value, Barrier* barrier, int rank) {
#if FASTDPO_HAS_CLUSTERS
  uint32_t remote_to, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_to) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_to),
               "r"(__float_as_uint(value)), "r"(remote_barrier)
               : "memory");
#endif
}

// Returns when the round has ended; rounds have parities 0, 1, 0, ...
FASTDPO_DEVICE void wait_round(Barrier* barrier, int parity) {
#if FASTDPO_HAS_CLUSTERS
  uint32_t is_over = 0;
  while (!is_over) {
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n"
        "}"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

FASTDPO_DEVICE float from_lane_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Starts a copy of 16 bytes to shared memory; both addresses are multiples of 16.
FASTDPO_DEVICE void copy_async(SharedAddress to, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// Closes the group of the copies this thread started since the last call.
FASTDPO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
FASTDPO_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Returns when all groups of this thread but the newest `pending` have arrived, or later: the instruction
// takes a constant, and three are enough.
FASTDPO_DEVICE void wait_copies_but(int pending) {
  wait_copies<4>();
  if (pending < 4) wait_copies<2>();
  if (pending < 2) wait_copies<1>();
  if (pending < 1) wait_copies<0>();
}

// An element of memory that is loaded as this is made, and waited for where its value is used. None: null.
template <class T>
class Early {
 public:
  FASTDPO_DEVICE explicit Early(const T* from) : value_(from ? *from : T{}) {}
  FASTDPO_DEVICE T value() const { return value_; }

 private:
  T value_;
};

// Spelled out: the compiler would merge these with the accesses to a row's last columns, word by word.
FASTDPO_DEVICE uint4 load16_global(const void* p) {
  uint4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return value;
}

FASTDPO_DEVICE void store16_global(void* p, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

FASTDPO_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
FASTDPO_DEVICE uint32_t to_bits(float value) { return __float_as_uint(value); }

FASTDPO_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

FASTDPO_DEVICE uint32_t pack_f16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

}  // namespace fastdpo::gpu
