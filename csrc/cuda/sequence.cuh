// The sequence kernel of fastdpo/kernels/sequence.py: a team of threads for each sequence, a block for each pair.
//
// A team's threads take turns with the tokens (coalesced, at any alignment), and their sums are added up in a tree:
// a sum's bits depend on its sequence alone. A pair's two teams work side by side. The block that finishes last adds
// up the losses of all pairs, in the order of the pairs, so that one launch does it all.
#pragma once

#include "../sequence_math.h"

namespace fastdpo {

constexpr int kTeamThreads = 256;
constexpr int kTeamWarps = kTeamThreads / 32;
constexpr int kPairThreads = 2 * kTeamThreads;

// Of one block, in shared memory.
struct SequenceShared {
  double sums[2 * kTeamWarps];      // of each warp
  float has_token[2 * kTeamWarps];  // 1 where a token of the warp counts
  double coeff;
  int is_last;
};

struct WarpSum {
  double sum = 0.0;
  float has_token = 0.0f;  // 1 where a token counts

  // Over all lanes of the warp; all get the same.
  FASTDPO_DEVICE void add_lanes() {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += gpu::from_lane_xor(sum, mask);
      has_token = fmaxf(has_token, gpu::from_lane_xor(has_token, mask));
    }
  }
};

FASTDPO_DEVICE SequenceShared& sequence_shared() { return *reinterpret_cast<SequenceShared*>(gpu::shared_memory()); }

// Leaves each warp's sum of the sequence in shared memory; `thread` is the thread's number in its team.
FASTDPO_DEVICE void add_up_warps(const SequenceArgs& args, Span span, int thread) {
  WarpSum own;
#pragma unroll 4
  for (int64_t token = span.begin + thread; token < span.end; token += kTeamThreads) {
    const bool is_counted = counts(args, token);
    own.sum += summand(args, token, is_counted);
    own.has_token = is_counted ? 1.0f : own.has_token;
  }
  own.add_lanes();
  const int warp = gpu::thread_index() / 32;
  if (thread % 32 == 0) {
    sequence_shared().sums[warp] = own.sum;
    sequence_shared().has_token[warp] = own.has_token;
  }
}

// The sum of `count` warps, from `first` on.
FASTDPO_DEVICE WarpSum add_up_team(int first, int count) {
  WarpSum total;
  for (int warp = first; warp < first + count; ++warp) {
    total.sum += sequence_shared().sums[warp];
    total.has_token = fmaxf(total.has_token, sequence_shared().has_token[warp]);
  }
  return total;
}

// A block of kTeamThreads for each sequence.
FASTDPO_DEVICE void sum_sequence(const SequenceArgs& args) {
  const int64_t sequence = gpu::block_index();
  add_up_warps(args, sequence_span(args, sequence), gpu::thread_index());
  gpu::sync_block();
  if (gpu::thread_index() == 0) args.sums[sequence] = static_cast<float>(add_up_team(0, kTeamWarps).sum);
}

// By one thread, when the warps' sums are there.
FASTDPO_DEVICE void finish_pair(const SigmoidArgs& args, int64_t pair) {
  const WarpSum chosen = add_up_team(0, kTeamWarps), rejected = add_up_team(kTeamWarps, kTeamWarps);
  const float chosen_sum = static_cast<float>(chosen.sum), rejected_sum = static_cast<float>(rejected.sum);
  args.sums[2 * pair] = chosen_sum;
  args.sums[2 * pair + 1] = rejected_sum;
  PairResult result{0.0, 0.0};
  if (chosen.has_token + rejected.has_token > 0.0f) result = sigmoid_pair(args, pair, chosen_sum, rejected_sum);
  args.pair_losses[pair] = result.loss;
  sequence_shared().coeff = result.coeff;
}

FASTDPO_DEVICE void write_g(const SigmoidArgs& args, Span span, double coeff, int thread) {
  for (int64_t token = span.begin + thread; token < span.end; token += kTeamThreads) {
    const double weight = args.weights ? static_cast<double>(args.weights[token]) : 1.0;
    args.g[token] = counts(args, token) ? static_cast<float>(coeff * weight) : 0.0f;
  }
}

// By all threads of the last block.
FASTDPO_DEVICE void add_up_losses(const SigmoidArgs& args) {
  const int thread = gpu::thread_index();
  WarpSum own;
  for (int64_t pair = thread; pair < args.sequences / 2; pair += kPairThreads) {
    own.sum += gpu::load_past_l1(args.pair_losses + pair);
  }
  own.add_lanes();
  if (thread % 32 == 0) sequence_shared().sums[thread / 32] = own.sum;
  gpu::sync_block();
  if (thread == 0) *args.loss = add_up_team(0, 2 * kTeamWarps).sum / at_pair(args.divisor, 0);
}

// A block of kPairThreads for each pair.
FASTDPO_DEVICE void process_pair(const SigmoidArgs& args) {
  const int64_t pair = gpu::block_index();
  const int answer = gpu::thread_index() / kTeamThreads, thread = gpu::thread_index() % kTeamThreads;
  const Span span = sequence_span(args, 2 * pair + answer);
  add_up_warps(args, span, thread);
  gpu::sync_block();
  if (gpu::thread_index() == 0) finish_pair(args, pair);
  gpu::sync_block();
  const double coeff = sequence_shared().coeff;
  // The thread that wrote the pair's loss; the others are already writing g.
  if (gpu::thread_index() == 0) sequence_shared().is_last = gpu::is_last_caller(args.counter, gpu::block_count());
  write_g(args, span, answer == 0 ? coeff : -coeff, thread);
  gpu::sync_block();
  if (sequence_shared().is_last) add_up_losses(args);
}

__global__ void __launch_bounds__(kTeamThreads) sequence_sums_kernel(const __grid_constant__ SequenceArgs args) {
  sum_sequence(args);
}

__global__ void __launch_bounds__(kPairThreads) sigmoid_pairs_kernel(const __grid_constant__ SigmoidArgs args) {
  process_pair(args);
}

}  // namespace fastdpo
