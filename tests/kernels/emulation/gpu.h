// The namespace fastdpo::gpu of csrc/cuda/gpu.cuh on a CPU: on the fibers of cluster.h.
#pragma once

#include "../../../csrc/common.h"
#include "cluster.h"

#define FASTDPO_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  uint32_t x, y, z, w;
};

namespace fastdpo::gpu {

inline int thread_index() { return emulation::current->running->thread; }
inline int block_index() { return emulation::current->first_block + emulation::current->running->block; }
inline int block_count() { return emulation::current->block_count; }
inline char* shared_memory() { return emulation::current->shared[emulation::current->running->block]->data(); }

using SharedAddress = char*;

inline SharedAddress shared_address(char* p) { return p; }

inline bool is_aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// The return address tells one place in the kernel from another.
__attribute__((noinline)) inline void sync_warp() {
  emulation::current->meet(emulation::current->own_warp(), __builtin_return_address(0));
}
inline void sync_block() {
  emulation::Cluster& cluster = *emulation::current;
  cluster.meet(cluster.whole_blocks[cluster.running->block], "block");
}
inline void sync_cluster() { emulation::current->meet(emulation::current->everyone, "cluster"); }

inline float from_lane_xor(float value, int mask) {
  emulation::Cluster& cluster = *emulation::current;
  const int self = cluster.running->block * cluster.threads + cluster.running->thread;
  cluster.exchanged[self] = value;
  cluster.meet(cluster.own_warp(), "shuffle");
  const float result = cluster.exchanged[self ^ mask];
  cluster.meet(cluster.own_warp(), "shuffled");
  return result;
}

using Barrier = uint64_t;

inline emulation::BarrierState* state(Barrier* barrier) { return reinterpret_cast<emulation::BarrierState*>(barrier); }

inline void init_barrier(Barrier* barrier) {
  emulation::require(is_aligned(barrier, 8), "a barrier is misaligned");
  *state(barrier) = {0, 1, 0, 0};
}

inline void expect_bytes(Barrier* barrier, int bytes) {
  emulation::require(state(barrier)->is_set_up && !state(barrier)->is_expecting, "a barrier expects bytes twice");
  state(barrier)->is_expecting = 1;
  state(barrier)->missing_bytes += bytes;
  emulation::current->finish_round(state(barrier));
}

inline void send(float* to, float value, Barrier* barrier, int rank) {
  emulation::Cluster& cluster = *emulation::current;
  char* there = cluster.shared[rank]->data();
  const char* here = shared_memory();
  float* remote_to = reinterpret_cast<float*>(there + (reinterpret_cast<char*>(to) - here));
  auto* remote_barrier = reinterpret_cast<emulation::BarrierState*>(there + (reinterpret_cast<char*>(barrier) - here));
  cluster.send({rank, remote_to, value, remote_barrier});
}

inline void wait_round(Barrier* barrier, int parity) {
  emulation::Cluster& cluster = *emulation::current;
  while (state(barrier)->round % 2 == parity) {
    cluster.round_waiters.push_back(cluster.running);
    cluster.suspend();
  }
}

inline void copy_async(SharedAddress to, const void* global) {
  emulation::Cluster& cluster = *emulation::current;
  emulation::require(is_aligned(to, 16), "a copy to a misaligned address");
  emulation::require(is_aligned(global, 16), "a copy from a misaligned address");
  const emulation::Copy copy{to, global};
  if (cluster.dice() % 2) {
    copy.run();
  } else {
    cluster.running->open_group.push_back(copy);
  }
}

inline void commit_copies() {
  emulation::Fiber& fiber = *emulation::current->running;
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

inline void wait_copies_but(int pending) {
  emulation::Fiber& fiber = *emulation::current->running;
  while (static_cast<int>(fiber.groups.size()) > pending) {
    for (const emulation::Copy& copy : fiber.groups.front()) copy.run();
    fiber.groups.erase(fiber.groups.begin());
  }
}

// Whether the load is done at once or when its value is used, the dice decide.
template <class T>
class Early {
 public:
  explicit Early(const T* from) : from_(from), value_(from ? *from : T{}) {
    is_late_ = from && emulation::current->dice() % 2;
  }
  T value() const { return is_late_ ? *from_ : value_; }

 private:
  const T* from_;
  T value_;
  bool is_late_;
};

inline uint4 load16_shared(const char* address) {
  emulation::require(is_aligned(address, 16), "a misaligned load");
  uint4 value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}
inline void store16_shared(char* address, uint4 value) {
  emulation::require(is_aligned(address, 16), "a misaligned store");
  std::memcpy(address, &value, sizeof(value));
}
inline void store_shared(SharedAddress address, float value) { std::memcpy(address, &value, sizeof(value)); }
inline void store_shared(SharedAddress address, uint16_t value) { std::memcpy(address, &value, sizeof(value)); }

inline uint4 load16_global(const void* p) { return load16_shared(static_cast<const char*>(p)); }
inline void store16_global(void* p, uint4 value) { store16_shared(static_cast<char*>(p), value); }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t bf16_bits(float value) {
  const uint32_t bits = to_bits(value);
  return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline uint32_t f16_bits(float value) {
  const uint32_t sign = (to_bits(value) >> 16) & 0x8000u;
  const float magnitude = std::fabs(value);
  const uint32_t bits = to_bits(magnitude);
  if (value != value) return 0x7fffu;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  return sign | (((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10));
}
inline uint32_t pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

}  // namespace fastdpo::gpu
