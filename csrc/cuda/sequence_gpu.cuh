// What the sequence kernel needs of the machine beside gpu.cuh; tests run its source on a CPU with another set.
#pragma once

#include "gpu.cuh"

namespace fastdpo::gpu {

FASTDPO_DEVICE double from_lane_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// True for the last of `count` callers, one thread of each block, since the counter was 0; it is 0 again then. That
// block's threads see, after their next barrier, what each caller wrote before its call, if they read it past L1.
FASTDPO_DEVICE bool is_last_caller(uint32_t* counter, uint32_t count) {
  __threadfence();
  const bool is_last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return is_last;
}

FASTDPO_DEVICE double load_past_l1(const double* p) { return __ldcg(p); }

}  // namespace fastdpo::gpu
