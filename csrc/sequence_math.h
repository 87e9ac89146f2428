// The maths of the sequence kernel that C++ and CUDA share: where a sequence lies, what a token adds, a pair's loss.
// fastdpo/kernels/sequence.py states the contract.
#pragma once

#include <cmath>

#include "common.h"

#ifdef __CUDACC__
#define FASTDPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTDPO_HOST_DEVICE inline
#endif

namespace fastdpo {

struct Span {
  int64_t begin;
  int64_t end;
};

FASTDPO_HOST_DEVICE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Offsets are not validated, which would need a synchronisation; clamped, wrong ones touch no foreign memory.
FASTDPO_HOST_DEVICE Span sequence_span(const SequenceArgs& args, int64_t sequence) {
  const int64_t begin = clamp(args.offsets[sequence], 0, args.tokens);
  return {begin, clamp(args.offsets[sequence + 1], begin, args.tokens)};
}

FASTDPO_HOST_DEVICE bool counts(const SequenceArgs& args, int64_t token) { return !args.mask || args.mask[token]; }

// What a token adds to its sequence's sum: the product of two floats is exact in double. A masked token is selected
// away, not multiplied by 0, since it may be NaN.
FASTDPO_HOST_DEVICE double summand(const SequenceArgs& args, int64_t token, bool is_counted) {
  const double weight = args.weights ? static_cast<double>(args.weights[token]) : 1.0;
  return is_counted ? weight * static_cast<double>(args.values[token]) : 0.0;
}

FASTDPO_HOST_DEVICE double at_pair(const PerPair& number, int64_t pair) {
  return number.values ? static_cast<double>(number.values[pair]) : number.number;
}

// softplus(x) = log(1 + e^x) and sigmoid(x), to double precision for every x.
FASTDPO_HOST_DEVICE double softplus(double x) { return (x > 0.0 ? x : 0.0) + log1p(exp(-fabs(x))); }
FASTDPO_HOST_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// probability * penalty, where an outcome of probability 0 costs nothing however large its penalty. NaN stays NaN.
FASTDPO_HOST_DEVICE double expected(double probability, double penalty) {
  return probability != 0.0 ? probability * penalty : 0.0;
}

struct PairResult {
  double loss;   // before the division
  double coeff;  // d loss / d sum of the chosen answer, divided; that of the rejected answer is its negative
};

// `chosen` and `rejected` are the rounded sums: those that the caller sees, and equal to a reference's bit for bit.
FASTDPO_HOST_DEVICE PairResult sigmoid_pair(const SigmoidArgs& args, int64_t pair, float chosen, float rejected) {
  double chosen_ratio = chosen, rejected_ratio = rejected;
  if (args.ref_sums) {
    chosen_ratio -= args.ref_sums[2 * pair];
    rejected_ratio -= args.ref_sums[2 * pair + 1];
  }
  const double beta = at_pair(args.beta, pair), preferred = at_pair(args.preferred, pair);
  const double weight = at_pair(args.pair_weights, pair);
  const double h = beta * (chosen_ratio - rejected_ratio) - at_pair(args.margin, pair);
  const double loss = expected(preferred, softplus(-h)) + expected(1.0 - preferred, softplus(h));
  const double slope = (1.0 - preferred) * sigmoid(h) - preferred * sigmoid(-h);
  return {weight * loss, weight * slope * beta / at_pair(args.divisor, 0)};
}

}  // namespace fastdpo
