// The row kernel's own source, run on a CPU: a shared library for tests/kernels/test_cuda_emulation.py.
#include "gpu.h"

#include "../../../csrc/cuda/row_dispatch.cuh"

using fastdpo::DeviceLimits;
using fastdpo::RowArgs;
using fastdpo::RowPlan;

extern "C" {

void plan(int64_t vocab, const DeviceLimits* limits, RowPlan* out) { *out = fastdpo::plan_row(vocab, *limits); }

// As fastdpo_cuda_row_kernel, on a device with these limits that runs `max_clusters` at a time. Returns null,
// or what went wrong.
const char* run(const RowArgs* args, const DeviceLimits* limits, int max_clusters, uint32_t seed) {
  static std::string error;
  const fastdpo::Kernel kernel = fastdpo::pick_kernel(*args);
  const RowPlan plan = fastdpo::plan_row(args->vocab, *limits);
  const fastdpo::RowTask task = fastdpo::make_task(*args, plan);
  const int clusters = static_cast<int>(args->rows < max_clusters ? args->rows : max_clusters);
  try {
    for (int i = 0; i < clusters; ++i) {
      emulation::Cluster cluster(plan.cluster, plan.warps * 32, plan.shared_bytes, i * plan.cluster,
                                 clusters * plan.cluster, seed + i);
      cluster.run([&] { kernel(task); });
    }
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
  return nullptr;
}

}  // extern "C"
