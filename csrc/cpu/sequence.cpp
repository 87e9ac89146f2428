// The sequence kernel of fastdpo/kernels/sequence.py on a CPU: sequences or pairs over OpenMP threads.
//
// A sequence's sum runs over kLanes double lanes, added up in one order: its bits depend on the sequence alone, not on
// the threads, nor on what lies beside it.
#include "../sequence_math.h"

#include <algorithm>

namespace {

using fastdpo::PairResult;
using fastdpo::SequenceArgs;
using fastdpo::SigmoidArgs;
using fastdpo::Span;

constexpr int kLanes = 8;
constexpr int64_t kTokensPerThread = 16384;  // fewer are done before another thread has woken up

struct Sum {
  float value;    // rounded
  bool is_empty;  // no token counts
};

Sum add_up(const SequenceArgs& args, Span span) {
  double lanes[kLanes] = {};
  bool is_empty = true;
  int64_t token = span.begin;
  const auto add = [&](int lane, int64_t at) {
    const bool is_counted = counts(args, at);
    lanes[lane] += summand(args, at, is_counted);
    is_empty &= !is_counted;
  };
  for (; token + kLanes <= span.end; token += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(lane, token + lane);
  }
  for (int lane = 0; token < span.end; ++lane, ++token) add(lane, token);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return {static_cast<float>(lanes[0]), is_empty};
}

void write_g(const SigmoidArgs& args, Span span, double coeff) {
  for (int64_t token = span.begin; token < span.end; ++token) {
    const double weight = args.weights ? static_cast<double>(args.weights[token]) : 1.0;
    args.g[token] = counts(args, token) ? static_cast<float>(coeff * weight) : 0.0f;
  }
}

void process_pair(const SigmoidArgs& args, int64_t pair) {
  const Span spans[2] = {sequence_span(args, 2 * pair), sequence_span(args, 2 * pair + 1)};
  const Sum chosen = add_up(args, spans[0]), rejected = add_up(args, spans[1]);
  args.sums[2 * pair] = chosen.value;
  args.sums[2 * pair + 1] = rejected.value;
  PairResult result{0.0, 0.0};
  if (!(chosen.is_empty && rejected.is_empty)) result = sigmoid_pair(args, pair, chosen.value, rejected.value);
  args.pair_losses[pair] = result.loss;
  write_g(args, spans[0], result.coeff);
  write_g(args, spans[1], -result.coeff);
}

int useful_threads(const SequenceArgs& args, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, args.tokens / kTokensPerThread)));
}

}  // namespace

void fastdpo_cpu_sequence_sums(const SequenceArgs& args, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(useful_threads(args, threads))
  for (int64_t sequence = 0; sequence < args.sequences; ++sequence) {
    args.sums[sequence] = add_up(args, sequence_span(args, sequence)).value;
  }
}

void fastdpo_cpu_sigmoid_pairs(const SigmoidArgs& args, int threads) {
  const int64_t pairs = args.sequences / 2;
#pragma omp parallel for schedule(dynamic, 4) num_threads(useful_threads(args, threads))
  for (int64_t pair = 0; pair < pairs; ++pair) process_pair(args, pair);
  double total = 0.0;
  for (int64_t pair = 0; pair < pairs; ++pair) total += args.pair_losses[pair];
  *args.loss = total / at_pair(args.divisor, 0);
}
