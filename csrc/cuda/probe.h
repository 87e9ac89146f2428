// For probe.cu: each file of kernels asks for its own.
#pragma once

#include <cuda_runtime.h>

namespace fastdpo {

// A cudaError_t; 0 where every kernel of the file is there for the current device. `code_version` is of what the
// code was compiled for, 90 for sm_90: less than the device's where an older architecture's code runs.
int probe_row_kernels(int* code_version);
int probe_sequence_kernels(int* code_version);

template <class Kernel>
int probe_kernel(Kernel kernel, int* code_version) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) *code_version = attributes.ptxVersion;
  return error;
}

}  // namespace fastdpo
