// The launches of the sequence kernel: one block for each sequence, or for each pair.
#include <climits>

#include "sequence_gpu.cuh"

#include "probe.h"
#include "sequence.cuh"

namespace fastdpo {
namespace {

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, void* stream) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = sizeof(SequenceShared);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: the next call starts clean
  return error;
}

}  // namespace

int probe_sequence_kernels(int* code_version) { return probe_kernel(sigmoid_pairs_kernel, code_version); }

}  // namespace fastdpo

int fastdpo_cuda_sequence_sums(const fastdpo::SequenceArgs& args, void* stream) {
  using namespace fastdpo;
  if (args.sequences == 0) return cudaSuccess;
  return launch(sequence_sums_kernel, args, args.sequences, kTeamThreads, stream);
}

int fastdpo_cuda_sigmoid_pairs(const fastdpo::SigmoidArgs& args, void* stream) {
  using namespace fastdpo;
  // Without a pair there is no last block to write the loss.
  if (args.sequences == 0) return cudaMemsetAsync(args.loss, 0, sizeof(double), static_cast<cudaStream_t>(stream));
  return launch(sigmoid_pairs_kernel, args, args.sequences / 2, kPairThreads, stream);
}
