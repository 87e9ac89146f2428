// From the arguments of a call to the instantiation of the kernel and what it is given.
#pragma once

#include "row_kernel.cuh"

namespace fastdpo {

// More threads than any block has: with that many the compiler may use 96 registers a thread, and two blocks
// of the 10 warps that V = 152k takes share a multiprocessor.
constexpr int kThreadBound = 640;

template <class X, bool kHasD, bool kTransform, bool kStats>
__global__ void __launch_bounds__(kThreadBound, 1) row_kernel(const __grid_constant__ RowTask task) {
  RowKernel<X, kHasD, kTransform, kStats>(task).run();
}

using Kernel = void (*)(RowTask);

inline bool has_transform(const RowArgs& args) { return args.bias || args.softcap > 0.0f || args.scale < 0.0f; }

// Softmax alone, with a transform, or with everything: few kernels, and the one that most models use does no
// more.
template <class X, bool kHasD>
Kernel pick_for(const RowArgs& args) {
  if (args.entropy || args.log_sum_sq_probs || args.mean_logit || args.grad_coeffs) {
    return row_kernel<X, kHasD, true, true>;
  }
  return has_transform(args) ? Kernel{row_kernel<X, kHasD, true, false>} : Kernel{row_kernel<X, kHasD, false, false>};
}

inline Kernel pick_kernel(const RowArgs& args) {
  if (args.logits_dtype == DType::f32) return args.d_out ? pick_for<float, true>(args) : pick_for<float, false>(args);
  return args.d_out ? pick_for<Bf16, true>(args) : pick_for<Bf16, false>(args);
}

inline bool is_aligned(const void* start, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(start) % 16 == 0 && row_bytes % 16 == 0;
}

inline int64_t row_bytes(int64_t rows, int64_t stride, DType dtype) {
  return rows > 1 ? stride * (dtype == DType::f32 ? 4 : 2) : 0;
}

inline RowTask make_task(const RowArgs& args, const RowPlan& plan) {
  return {args,
          plan,
          make_transform(args.scale, args.softcap, args.temperature),
          has_transform(args),
          is_aligned(args.logits, row_bytes(args.rows, args.logits_stride, args.logits_dtype)),
          is_aligned(args.bias, 0),
          is_aligned(args.d_out, row_bytes(args.rows, args.d_stride, args.d_dtype)),
          args.d_out == args.logits};
}

}  // namespace fastdpo
