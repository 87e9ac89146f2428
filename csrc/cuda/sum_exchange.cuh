// Sums over all lanes of all warps that work on a row: over a warp by shuffles, then over the block or the
// cluster.
//
// Every warp sends its sums to every block of the cluster; each block waits for those of all warps, and each
// of its warps adds them up in the same order. So every thread has the same bits, and a block waits once per
// row.
#pragma once

#include "row_math.cuh"
#include "row_plan.h"

namespace fastdpo {

FASTDPO_DEVICE float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, gpu::from_lane_xor(value, mask));
  return value;
}

FASTDPO_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = add_rn(value, gpu::from_lane_xor(value, mask));
  return value;
}

template <bool kHasD, bool kStats>
class SumExchange {
 public:
  FASTDPO_DEVICE SumExchange(const RowPlan& plan, int rank, int warp, int lane)
      : plan_(plan), rank_(rank), warp_(warp), lane_(lane) {}

  // Before the first row. Nothing may be sent to a block that has not started.
  FASTDPO_DEVICE void set_up() {
    if (plan_.cluster == 1) return;
    if (gpu::thread_index() == 0) {
      gpu::init_barrier(barrier(0));
      gpu::init_barrier(barrier(1));
    }
    gpu::sync_cluster();
  }

  // Turns the sums of a lane into those of the row. `count` is 0 for this block's first row, 1 for its
  // second, ...
  FASTDPO_DEVICE void add_up(Sums& sums, float gain_log2, int count) {
    // Rows take turns with two inboxes: a warp may send the sums of the next row while another still reads
    // those of this one, but not those of the row after, since it first needs the other's sums of the next
    // row.
    const int turn = count % 2;
    float* inbox = inboxes() + turn * kSumFields * senders();

    add_up_warp(sums, gain_log2);
    if (plan_.cluster > 1) {
      send(inbox + rank_ * plan_.warps + warp_, barrier(turn), sums);
      gpu::wait_round(barrier(turn), count / 2 % 2);
    } else {
      if (lane_ == 0) {
        for_each_field(sums, [&](int field, float& value) { inbox[field * senders() + warp_] = value; });
      }
      gpu::sync_block();
    }
    float top = -kInf;
    for (int i = lane_; i < senders(); i += 32) top = fmaxf(top, inbox[i]);
    sums = Sums();
    sums.top = warp_max(top);
    for (int i = lane_; i < senders(); i += 32) add(sums, inbox + i, gain_log2);
    add_up_warp(sums, gain_log2);
  }

 private:
  FASTDPO_DEVICE int senders() const { return plan_.cluster * plan_.warps; }
  FASTDPO_DEVICE float* inboxes() const { return reinterpret_cast<float*>(gpu::shared_memory() + ring_bytes(plan_)); }
  FASTDPO_DEVICE gpu::Barrier* barrier(int turn) const {
    return reinterpret_cast<gpu::Barrier*>(gpu::shared_memory() + ring_bytes(plan_) + inbox_bytes(plan_)) + turn;
  }

  template <class F>
  FASTDPO_DEVICE static void for_each_field(Sums& sums, F f) {
    f(0, sums.top);
    f(1, sums.exp);
    if constexpr (kHasD) f(2, sums.others);
    if constexpr (kStats) {
      f(3, sums.exp_t);
      f(4, sums.exp_sq);
      f(5, sums.u);
    }
  }

  FASTDPO_DEVICE static void add_up_warp(Sums& sums, float gain_log2) {
    raise_top<kHasD, kStats>(sums, warp_max(sums.top), gain_log2);
    sums.exp = warp_sum(sums.exp);
    if constexpr (kHasD) sums.others = warp_sum(sums.others);
    if constexpr (kStats) {
      sums.exp_t = warp_sum(sums.exp_t);
      sums.exp_sq = warp_sum(sums.exp_sq);
      sums.u = warp_sum(sums.u);
    }
  }

  // One lane for each block of the cluster.
  FASTDPO_DEVICE void send(float* to, gpu::Barrier* barrier, Sums& sums) const {
    constexpr int kBytes = (2 + kHasD + 3 * kStats) * sizeof(float);
    if (gpu::thread_index() == 0) gpu::expect_bytes(barrier, kBytes * senders());
    if (lane_ < plan_.cluster) {
      for_each_field(sums, [&](int field, float& value) { gpu::send(to + field * senders(), value, barrier, lane_); });
    }
  }

  // `total.top` is at least the top of what is added.
  FASTDPO_DEVICE void add(Sums& total, const float* from, float gain_log2) const {
    Sums part;
    for_each_field(part, [&](int field, float& value) { value = from[field * senders()]; });
    raise_top<kHasD, kStats>(part, total.top, gain_log2);
    total.exp = add_rn(total.exp, part.exp);
    if constexpr (kHasD) total.others = add_rn(total.others, part.others);
    if constexpr (kStats) {
      total.exp_t = add_rn(total.exp_t, part.exp_t);
      total.exp_sq = add_rn(total.exp_sq, part.exp_sq);
      total.u = add_rn(total.u, part.u);
    }
  }

  const RowPlan& plan_;
  const int rank_;  // of this block in its cluster
  const int warp_;
  const int lane_;
};

}  // namespace fastdpo
