// The sequence kernel's own source, run on a CPU: a shared library for tests/kernels/emulation/sequence.py.
#include <algorithm>
#include <numeric>

#include "gpu.h"

// csrc/cuda/sequence_gpu.cuh on fibers.
namespace fastdpo::gpu {

inline double from_lane_xor(double value, int mask) {
  float halves[2];
  std::memcpy(halves, &value, sizeof(value));
  for (float& half : halves) half = from_lane_xor(half, mask);
  std::memcpy(&value, halves, sizeof(value));
  return value;
}

inline bool is_last_caller(uint32_t* counter, uint32_t count) {
  emulation::require(*counter < count, "more tickets were taken than there are blocks, or the counter was not 0");
  *counter = (*counter + 1) % count;
  return *counter == 0;
}

inline double load_past_l1(const double* p) { return *p; }

}  // namespace fastdpo::gpu

#include "../../../csrc/cuda/sequence.cuh"

namespace {

// Runs the blocks one after the other in any order. Returns null, or what went wrong.
template <class Kernel>
const char* run_blocks(const Kernel& kernel, int64_t blocks, int threads, uint32_t seed) {
  static std::string error;
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  try {
    for (int block : order) {
      emulation::Cluster cluster(1, threads, sizeof(fastdpo::SequenceShared), block, static_cast<int>(blocks),
                                 seed + block);
      cluster.run(kernel);
    }
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace

extern "C" {

const char* run_sums(const fastdpo::SequenceArgs* args, uint32_t seed) {
  return run_blocks([&] { fastdpo::sequence_sums_kernel(*args); }, args->sequences, fastdpo::kTeamThreads, seed);
}

const char* run_pairs(const fastdpo::SigmoidArgs* args, uint32_t seed) {
  if (args->sequences == 0) *args->loss = 0.0;  // as the launcher does
  return run_blocks([&] { fastdpo::sigmoid_pairs_kernel(*args); }, args->sequences / 2, fastdpo::kPairThreads, seed);
}

}  // extern "C"
