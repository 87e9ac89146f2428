// The launch of the row kernel: what the device offers, and how many clusters it takes at a time.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "gpu.cuh"
#include "probe.h"
#include "row_dispatch.cuh"

namespace fastdpo {
namespace {

#define RETURN_IF_ERROR(call)                    \
  do {                                           \
    const cudaError_t status = (call);           \
    if (status != cudaSuccess) return status;    \
  } while (false)

struct Launch {
  RowPlan plan;
  int max_clusters;  // that run at the same time
};

cudaError_t device_attribute(cudaDeviceAttr attribute, int device, int64_t& value) {
  int result = 0;
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&result, attribute, device));
  value = result;
  return cudaSuccess;
}

cudaError_t device_limits(int device, Kernel kernel, DeviceLimits& limits) {
  RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, limits.shared_per_block));
  RETURN_IF_ERROR(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, limits.shared_per_sm));
  RETURN_IF_ERROR(device_attribute(cudaDevAttrReservedSharedMemoryPerBlock, device, limits.reserved_per_block));
  int64_t can_cluster = 0;
  RETURN_IF_ERROR(device_attribute(cudaDevAttrClusterLaunch, device, can_cluster));
  // A newer device may run code that was built for an older one, and that has no cluster barrier.
  cudaFuncAttributes attributes;
  RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, kernel));
  limits.max_cluster = can_cluster && attributes.ptxVersion >= 90 ? kMaxCluster : 1;
  return cudaSuccess;
}

cudaLaunchConfig_t launch_config(const RowPlan& plan, int clusters, cudaStream_t stream,
                                 cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * plan.cluster);
  config.blockDim = dim3(plan.warps * 32);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return config;
}

cudaError_t make_launch(int device, Kernel kernel, int64_t vocab, Launch& launch) {
  DeviceLimits limits;
  RETURN_IF_ERROR(device_limits(device, kernel, limits));
  const int max_shared = static_cast<int>(limits.shared_per_block);
  RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared));
  RETURN_IF_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));

  // A part of a device (MIG) may have no room for a large cluster.
  for (;; limits.max_cluster /= 2) {
    launch.plan = plan_row(vocab, limits);
    if (launch.plan.cluster == 1) break;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(launch.plan, 1, nullptr, attribute);
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&launch.max_clusters, kernel, &config);
    if (error == cudaSuccess && launch.max_clusters > 0) return cudaSuccess;
    cudaGetLastError();
  }
  int64_t multiprocessors = 0;
  int blocks = 0;
  RETURN_IF_ERROR(device_attribute(cudaDevAttrMultiProcessorCount, device, multiprocessors));
  RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, launch.plan.warps * 32,
                                                                launch.plan.shared_bytes));
  launch.max_clusters = static_cast<int>(blocks * multiprocessors);
  return launch.max_clusters > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

// The same for every chunk of a run: asking the driver each time would cost more than a small launch.
cudaError_t cached_launch(Kernel kernel, int64_t vocab, Launch& launch) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Kernel, int64_t>, Launch> cache;
  int device = 0;
  RETURN_IF_ERROR(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, vocab);
  const auto found = cache.find(key);
  if (found == cache.end()) {
    RETURN_IF_ERROR(make_launch(device, kernel, vocab, launch));
    cache.emplace(key, launch);
  } else {
    launch = found->second;
  }
  return cudaSuccess;
}

cudaError_t launch_row_kernel(const RowArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.vocab < 1 || args.vocab > kMaxVocab) return cudaErrorInvalidValue;
  const Kernel kernel = pick_kernel(args);
  Launch launch;
  RETURN_IF_ERROR(cached_launch(kernel, args.vocab, launch));

  const RowTask task = make_task(args, launch.plan);
  const int clusters = static_cast<int>(std::min<int64_t>(args.rows, launch.max_clusters));
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = launch_config(launch.plan, clusters, stream, attribute);
  return cudaLaunchKernelEx(&config, kernel, task);
}

}  // namespace

int probe_row_kernels(int* code_version) { return probe_kernel(row_kernel<float, true, false, false>, code_version); }

}  // namespace fastdpo

int fastdpo_cuda_row_kernel(const fastdpo::RowArgs& args, void* stream) {
  const cudaError_t error = fastdpo::launch_row_kernel(args, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();  // reported here: the next call starts clean
  return error;
}

const char* fastdpo_cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
