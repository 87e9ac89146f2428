// The row kernel: one cluster of thread blocks per row, each block with a slice of the row in shared memory.
//
//   fetch     16 bytes a lane, asynchronously, in quarters of the slice, up to half a row ahead of the work
//   reduce    u of every column and the sums over it (row_math.cuh), then the sums of all warps (sum_exchange.cuh)
//   write D   from shared memory; a quarter that is done is refilled with the quarter that comes next
//
// A logit is read from memory once. What does not fit (no clusters, or V beyond 360k) is read twice, the
// second time from L2 as far as it holds. Warps share nothing but the sums: a warp fetches, reduces and
// writes its own tiles.
//
// D in the place of the logits: no block may store before every block of the cluster has loaded its slice.
// That holds by construction: a warp gives its sums away after all it has loaded of the row has arrived, the
// label's logit too, since the sums hang on it; and it stores after it has the sums of all warps. Rows fetched
// ahead lie elsewhere.
//
// The includer brings the namespace fastdpo::gpu: gpu.cuh, or the tests' emulation of it.
#pragma once

#include "row_math.cuh"
#include "sum_exchange.cuh"
#include "tile_ring.cuh"

namespace fastdpo {

// X is float or Bf16. Without kTransform u is the logit as loaded; without kStats no statistics and no
// grad_coeffs.
template <class X, bool kHasD, bool kTransform, bool kStats>
class RowKernel {
 public:
  FASTDPO_DEVICE explicit RowKernel(const RowTask& task)
      : task_(task),
        args_(task.args),
        plan_(task.plan),
        row_step_(gpu::block_count() / plan_.cluster),
        slice_(task),
        ring_(task, slice_, row_step_),
        exchange_(plan_, slice_.rank, slice_.warp, slice_.lane) {}

  FASTDPO_DEVICE void run() {
    int64_t row = gpu::block_index() / plan_.cluster;
    ring_.fill(row);
    exchange_.set_up();
    int64_t label = args_.labels[row];
    for (int count = 0; row < args_.rows; ++count) {
      label_ = label >= 0 && label < args_.vocab ? static_cast<int>(label) : -1;
      const int64_t next_row = row + row_step_;
      if (next_row < args_.rows) label = args_.labels[next_row];  // a row early: the work on a row begins with it
      process(row, count);
      row = next_row;
    }
    // All that other blocks sent here has been waited for: a block may leave at once.
  }

 private:
  static constexpr bool kIsBf16 = sizeof(X) == 2;

  // Logits to u, in place.
  FASTDPO_DEVICE void transform(float (&x)[kLaneColumns], int tile) const {
    if constexpr (kIsBf16) {
      if (args_.target_logits) put_target(x, tile);
    }
    if constexpr (kTransform) {
      if (!task_.has_transform) return;
      if (args_.bias) add_bias(x, tile);
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) x[i] = mul_rn(x[i], task_.transform.pre);
      if (task_.transform.is_capped) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) x[i] = tanh_accurate(x[i]);
      }
    }
  }

  // Which of this lane's columns of a tile is the label's; -1: none.
  FASTDPO_DEVICE int label_place(int tile) const {
    const int offset = label_ - slice_.column(tile, 0);  // negative without a label
    if (offset < 0 || offset >= kTileColumns || offset % kWarpGroup >= kGroup) return -1;
    return offset / kWarpGroup * kGroup + offset % kWarpGroup;
  }

  FASTDPO_DEVICE void put_target(float (&x)[kLaneColumns], int tile) const {
    const int place = label_place(tile);
    if (place < 0) return;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) x[i] = i == place ? target_ : x[i];
  }

  FASTDPO_DEVICE void add_bias(float (&x)[kLaneColumns], int tile) const {
    float bias[kLaneColumns];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float* from = args_.bias + slice_.column(tile, group);
      load_group(from, task_.bias_aligned, slice_.available(tile, group), bias + group * kGroup);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) x[i] = add_rn(x[i], bias[i]);
  }

  FASTDPO_DEVICE float transform_one(float x, float bias) const {
    const float scaled = mul_rn(add_rn(x, bias), task_.transform.pre);
    return task_.transform.is_capped ? tanh_accurate(scaled) : scaled;
  }

  // Whether this thread writes the row's results: it holds the label's column, or it is the first and there
  // is none.
  FASTDPO_DEVICE bool owns_label() const {
    if (label_ < 0) return slice_.rank == 0 && gpu::thread_index() == 0;
    const int local = label_ - slice_.begin;
    return local >= 0 && local < plan_.tiles * kTileColumns && local / kTileColumns % plan_.warps == slice_.warp &&
           local % kWarpGroup / kGroup == slice_.lane;
  }

  FASTDPO_DEVICE void process(int64_t row, int count) {
    const bool is_own = owns_label();
    const bool has_own_label = is_own && label_ >= 0;
    if (kIsBf16 && args_.target_logits) target_ = args_.target_logits[row];
    // Loaded now and used after the work on the slice: no one waits for it.
    const gpu::Early<X> x_label(has_own_label ? logits_row<X>(task_, row) + label_ : nullptr);
    const float bias_label = has_own_label && args_.bias ? args_.bias[label_] : 0.0f;

    Sums sums = reduce(row);
    const float x = has_own_label ? to_float(x_label.value()) : 0.0f;
    const float u_label = transform_one(kIsBf16 && args_.target_logits ? target_ : x, bias_label);
    // It is among the columns already and changes nothing, but now the sums cannot be sent before it is here:
    // once they are, D of another block may lie over it.
    if (has_own_label) sums.top = fmaxf(sums.top, u_label);
    exchange_.add_up(sums, task_.transform.gain_log2, count);
    const RowLogs logs = row_logs<kStats>(sums);
    if (is_own) write_results(row, sums, logs, u_label);
    if constexpr (kHasD) {
      const GradCoeffs coeffs = load_grad_coeffs(row, logs);
      float label_grad[kGroup] = {};
      if (has_own_label) label_grad[0] = grad_of_label(u_label, logs, task_.transform, coeffs);
      write_d(row, logs.top, coeffs);
      // After the group that holds it, by the same thread: the two stores keep their order.
      if (has_own_label) store_d(d_at(row, label_), false, 1, label_grad);
    }
  }

  FASTDPO_DEVICE GradCoeffs load_grad_coeffs(int64_t row, const RowLogs& logs) const {
    if (!kStats || !args_.grad_coeffs) return make_grad_coeffs(1.0f, 0.0f, 0.0f, logs);
    const float* coeffs = args_.grad_coeffs + row;
    return make_grad_coeffs(coeffs[0], coeffs[args_.rows], coeffs[2 * args_.rows], logs);
  }

  // This lane's sums over its columns of the slice; keeps u in shared memory where D will need it.
  FASTDPO_DEVICE Sums reduce(int64_t row) {
    Sums sums;
    float x[kLaneColumns];
    int place = place_;
    int tile = slice_.warp;
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      // With D the quarters before this one are still held, without it they have been refilled.
      ring_.wait(plan_.ahead + kQuarters - 1 - (kHasD ? quarter : 0));
#pragma unroll 1
      for (int j = 0; j < plan_.tiles_per_quarter; ++j) {
        if (tile < slice_.tiles) {
          ring_.read_fetched(place, x);
          transform(x, tile);
          if (kHasD && (kIsBf16 || (kTransform && task_.has_transform))) ring_.keep(place, x);
          absorb_tile(sums, x, tile);
        }
        tile += plan_.warps;
        place = ring_.next(place);
      }
      if constexpr (!kHasD) ring_.refill();
    }
    if constexpr (!kHasD) place_ = place;
    for (; tile < slice_.tiles; tile += plan_.warps) {
      load_streamed(row, tile, x);
      absorb_tile(sums, x, tile);
    }
    return sums;
  }

  FASTDPO_DEVICE void absorb_tile(Sums& sums, float (&u)[kLaneColumns], int tile) const {
    const bool is_partial = tile >= slice_.whole_tiles;
    if (kStats && is_partial) set_missing(u, tile, 0.0f);
    const float sum_of_u = kStats ? tree_sum(u) : 0.0f;
    if (is_partial) set_missing(u, tile, -kInf);
    absorb<kHasD, kStats>(sums, u, kHasD ? label_place(tile) : -1, sum_of_u, task_.transform.gain_log2);
  }

  FASTDPO_DEVICE void set_missing(float (&u)[kLaneColumns], int tile, float value) const {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if (i % kGroup >= slice_.available(tile, i / kGroup)) u[i] = value;
    }
  }

  FASTDPO_DEVICE void load_streamed(int64_t row, int tile, float (&x)[kLaneColumns]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const X* from = logits_row<X>(task_, row) + slice_.column(tile, group);
      load_group(from, task_.logits_aligned, slice_.available(tile, group), x + group * kGroup);
    }
    transform(x, tile);
  }

  FASTDPO_DEVICE void write_d(int64_t row, float top, const GradCoeffs& coeffs) {
    char* d = d_at(row, slice_.column(0, 0));
    float u[kLaneColumns];
    int tile = slice_.warp;
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
#pragma unroll 1
      for (int j = 0; j < plan_.tiles_per_quarter; ++j) {
        if (tile < slice_.tiles) {
          ring_.read_kept(place_, u);
          write_tile(d, tile, u, top, coeffs);
        }
        tile += plan_.warps;
        place_ = ring_.next(place_);
      }
      ring_.refill();
    }
    // Only a block that has the whole row to itself streams. In place, D of these columns lands on logits
    // further to the front (or on the same), which every warp has read once it has passed the barrier. The
    // loop is the same for all.
    for (int first = plan_.resident_tiles(); first < slice_.tiles; first += plan_.warps, tile += plan_.warps) {
      if (tile < slice_.tiles) load_streamed(row, tile, u);
      if (task_.d_in_place) gpu::sync_block();
      if (tile < slice_.tiles) write_tile(d, tile, u, top, coeffs);
    }
  }

  // `d` is where this lane's first column of the slice goes.
  FASTDPO_DEVICE void write_tile(char* d, int tile, const float (&u)[kLaneColumns], float top,
                                 const GradCoeffs& coeffs) const {
    float grad[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      grad[i] = grad_of_column<kStats>(u[i], top, task_.transform.gain_log2, coeffs);
    }
    if (kTransform && task_.transform.is_capped) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) grad[i] *= cap_factor(u[i]);
    }
    const bool is_whole = task_.d_aligned && tile < slice_.whole_tiles;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      char* to = d + (tile * kTileColumns + group * kWarpGroup) * d_bytes();
      store_d(to, is_whole, is_whole ? kGroup : slice_.available(tile, group), grad + group * kGroup);
    }
  }

  FASTDPO_DEVICE int d_bytes() const { return args_.d_dtype == DType::f32 ? 4 : 2; }

  FASTDPO_DEVICE char* d_at(int64_t row, int column) const {
    return static_cast<char*>(args_.d_out) + (row * args_.d_stride + column) * d_bytes();
  }

  // A group of D, 16 bytes at a time if it `is_whole`, or else its first `count` columns one by one.
  FASTDPO_DEVICE void store_d(char* to, bool is_whole, int count, const float* d) const {
    if (args_.d_dtype == DType::f32) {
      store_group(reinterpret_cast<float*>(to), is_whole, count, d);
    } else {
      store_group(reinterpret_cast<uint16_t*>(to), is_whole, count, args_.d_dtype == DType::bf16, d);
    }
  }

  FASTDPO_DEVICE void write_results(int64_t row, const Sums& sums, const RowLogs& logs, float u_label) const {
    const float gain = task_.transform.gain;
    args_.lse[row] = fmaf(logs.top, gain, logs.log_sum);
    args_.logps[row] = label_ >= 0 ? log_prob(u_label, logs, gain) : NAN;
    const bool is_nan = logs.log_sum != logs.log_sum;
    if (args_.is_top1) args_.is_top1[row] = label_ >= 0 && u_label == logs.top && !is_nan;
    if constexpr (kStats) {
      if (args_.entropy) args_.entropy[row] = logs.entropy;
      if (args_.log_sum_sq_probs) args_.log_sum_sq_probs[row] = logf(sums.exp_sq) - 2.0f * logs.log_sum;
      if (args_.mean_logit) args_.mean_logit[row] = gain * sums.u / static_cast<float>(args_.vocab);
    }
  }

  const RowTask& task_;
  const RowArgs& args_;
  const RowPlan& plan_;
  const int row_step_;  // clusters in the grid
  const Slice slice_;
  TileRing<X> ring_;
  SumExchange<kHasD, kStats> exchange_;
  int place_ = 0;   // in the ring, of the current row's first tile, then of the next one to write
  int label_ = -1;  // its column; -1 for one that is out of range
  float target_ = 0.0f;
};

}  // namespace fastdpo
