// What the kernels take, shared by the C++ and the CUDA side. No torch header: addresses, sizes and scalars only.
//
// `RowArgs` is fastdpo/kernels/contract.py in C++; the maths and the rules are written there. fastdpo/kernels/native.py
// fills it from tensors and has checked every dtype, shape and stride before a kernel sees it.
#pragma once

#include <cstdint>

namespace fastdpo {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// z = softcap(scale * (x + bias)) / temperature over one chunk of C rows ("rows") and V columns ("vocab").
// Strides count elements of the buffer they belong to; the elements of a row are contiguous.
struct RowArgs {
  int64_t rows = 0;
  int64_t vocab = 0;

  void* logits = nullptr;  // (C, V) f32 or bf16; scratch: a kernel may overwrite it
  DType logits_dtype = DType::f32;
  int64_t logits_stride = 0;
  const int64_t* labels = nullptr;  // (C,); outside 0..V-1 means logp = NaN and no one-hot

  const float* bias = nullptr;  // (V,) or null
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  float temperature = 1.0f;

  float* logps = nullptr;  // (C,), as all outputs; these two are always wanted
  float* lse = nullptr;
  float* entropy = nullptr;  // null: not wanted, as the rest
  float* log_sum_sq_probs = nullptr;
  float* mean_logit = nullptr;
  bool* is_top1 = nullptr;

  const float* target_logits = nullptr;  // (C,) or null; only with bf16 logits

  void* d_out = nullptr;  // (C, V) or null; disjoint from logits, or at its address with the same stride in bytes
  DType d_dtype = DType::f32;
  int64_t d_stride = 0;
  const float* grad_coeffs = nullptr;  // (3, C) contiguous: a, b, c; or null: D itself. Only with d_out.
};

// Raw products of one head over a chunk of C rows, with its transform as in RowArgs.
struct HeadArgs {
  float* logits = nullptr;  // (C, V), scratch; null: there is no such head
  int64_t stride = 0;
  const float* bias = nullptr;  // (V,) or null
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  float temperature = 1.0f;
};

// Where a D goes, (C, V); null: not wanted.
struct DArgs {
  void* d = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
};

// The divergence kernel's arguments: fastdpo/kernels/divergence.py in C++, filled by
// fastdpo/kernels/divergence_native.py.
struct DivergenceArgs {
  int64_t rows = 0;
  int64_t vocab = 0;
  HeadArgs policy;
  HeadArgs first;   // teacher
  HeadArgs second;  // null logits: one teacher
  const int64_t* labels = nullptr;  // (C,)

  const float* coefficients = nullptr;  // (2, C) contiguous: a and b of two teachers' combination
  float first_slope = 0.0f;             // what their distance is multiplied by and added to a
  float second_slope = 0.0f;            // and to b
  float jsd_beta = 0.5f;

  float* forward_kl = nullptr;  // (C,), as all outputs; null: not wanted
  float* reverse_kl = nullptr;
  float* jsd = nullptr;
  float* logps = nullptr;
  float* l1_distance = nullptr;
  float* ref_logps = nullptr;

  DArgs d_out;
  DArgs logps_d_out;                   // only with d_out
  const float* grad_coeffs = nullptr;  // (4, C) contiguous, or null: of the one divergence
};

// The sequence kernel's arguments: fastdpo/kernels/sequence.py in C++, filled by fastdpo/kernels/sequence_native.py.
// N tokens ("tokens") in S sequences ("sequences"), one after the other.
struct SequenceArgs {
  int64_t tokens = 0;
  int64_t sequences = 0;
  const float* values = nullptr;     // (N,)
  const float* weights = nullptr;    // (N,) or null: all 1
  const bool* mask = nullptr;        // (N,) or null: every token counts
  const int64_t* offsets = nullptr;  // (S + 1,), rising from 0 to N
  float* sums = nullptr;             // (S,)
};

// One number for each pair, or one for all.
struct PerPair {
  const float* values = nullptr;  // (P,), or null: `number`
  double number = 0.0;
};

// P pairs: sequence 2p is pair p's chosen answer, 2p + 1 its rejected one.
struct SigmoidArgs : SequenceArgs {
  const float* ref_sums = nullptr;  // (2P,) or null: zeros
  PerPair beta;
  PerPair margin;
  PerPair preferred;  // the probability that the chosen answer is the better one
  PerPair pair_weights;
  PerPair divisor;                // of all pairs: `values` is one number
  double* pair_losses = nullptr;  // (P,) scratch
  double* loss = nullptr;         // ()
  float* g = nullptr;             // (N,)
  uint32_t* counter = nullptr;    // CUDA: one that is 0, and is left 0; no other launch may use it meanwhile
};

}  // namespace fastdpo

// C linkage, so that nvcc's host compiler and the C++ compiler agree on the names.
extern "C" {

// Return when the rows are done; use at most `threads` threads (at least 1).
void fastdpo_cpu_row_kernel(const fastdpo::RowArgs& args, int threads);
void fastdpo_cpu_divergence_kernel(const fastdpo::DivergenceArgs& args, int threads);

// Launches on `stream` (a cudaStream_t) of the current device and returns the launch's cudaError_t, 0 for success.
int fastdpo_cuda_row_kernel(const fastdpo::RowArgs& args, void* stream);

// The same for the sequence kernel.
void fastdpo_cpu_sequence_sums(const fastdpo::SequenceArgs& args, int threads);
void fastdpo_cpu_sigmoid_pairs(const fastdpo::SigmoidArgs& args, int threads);
int fastdpo_cuda_sequence_sums(const fastdpo::SequenceArgs& args, void* stream);
int fastdpo_cuda_sigmoid_pairs(const fastdpo::SigmoidArgs& args, void* stream);

const char* fastdpo_cuda_error_string(int code);

// Whether the current device can run the kernels: a cudaError_t, 0 for yes. Then `code_version` is what the machine
// code was compiled for, 90 for sm_90.
int fastdpo_cuda_probe(int* code_version);
// What the driver and the runtime that is linked in are of, 13000 for CUDA 13.0; 0: there is no driver.
int fastdpo_cuda_driver_version();
int fastdpo_cuda_runtime_version();
}
