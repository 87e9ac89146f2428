// What a launch would need, asked without one: a driver that this runtime can work with, and code for the GPU.
#include <cuda_runtime.h>

#include "../common.h"
#include "probe.h"

int fastdpo_cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int fastdpo_cuda_runtime_version() { return CUDART_VERSION; }

// One kernel of each file: driver and code are the same for all of a file.
int fastdpo_cuda_probe(int* code_version) {
  for (const auto ask : {&fastdpo::probe_row_kernels, &fastdpo::probe_sequence_kernels}) {
    const int error = ask(code_version);
    if (error == cudaSuccess) continue;
    cudaGetLastError();  // reported here: the next call starts clean
    return error;
  }
  return cudaSuccess;
}
