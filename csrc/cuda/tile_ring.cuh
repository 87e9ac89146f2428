// The logits of a warp on their way from memory through shared memory to registers.
//
// The ring holds `stages` quarters of a slice, each with some tiles of every warp. A warp fills, reads and
// frees its own tiles only, so that nothing but its own lanes has to wait for it.
#pragma once

#include "row_group.cuh"
#include "row_plan.h"

namespace fastdpo {

struct RowTask {
  RowArgs args;
  RowPlan plan;
  Transform transform;
  bool has_transform;   // u is not the logit as loaded
  bool logits_aligned;  // every row starts at a multiple of 16 bytes
  bool bias_aligned;
  bool d_aligned;
  bool d_in_place;
};

// This thread's place in the work: columns from `begin` on in tiles of which every warp takes every
// `warps`th.
struct Slice {
  const int vocab;
  const int lane;
  const int warp;
  const int rank;  // of this block in its cluster
  const int begin;
  const int tiles;
  const int whole_tiles;  // without one that the end of the row cuts

  FASTDPO_DEVICE explicit Slice(const RowTask& task)
      : vocab(static_cast<int>(task.args.vocab)),
        lane(gpu::thread_index() % 32),
        warp(gpu::thread_index() / 32),
        rank(gpu::block_index() % task.plan.cluster),
        begin(rank * task.plan.tiles * kTileColumns),
        tiles(clamp(ceil_div(vocab - begin, kTileColumns), 0, task.plan.tiles)),
        whole_tiles(clamp((vocab - begin) / kTileColumns, 0, task.plan.tiles)) {}

  FASTDPO_DEVICE static int clamp(int value, int low, int high) {
    return value < low ? low : (value > high ? high : value);
  }

  // This lane's columns: the first of a group, and how many there are from it to the end of the row.
  FASTDPO_DEVICE int column(int tile, int group) const {
    return begin + tile * kTileColumns + group * kWarpGroup + lane * kGroup;
  }
  FASTDPO_DEVICE int available(int tile, int group) const { return vocab - column(tile, group); }
};

template <class X>
FASTDPO_DEVICE const X* logits_row(const RowTask& task, int64_t row) {
  return static_cast<const X*>(task.args.logits) + row * task.args.logits_stride;
}

// One lane's share of a warp's group in shared memory: columns 0..3 of its eight in one half of the group,
// 4..7 in the other, both 16 bytes from those of the next lane. The xor keeps the copies, which go column by
// column, off each other's banks.
FASTDPO_DEVICE int half_offset(int lane, int half) { return (half * 32 + (lane ^ (half * 4))) * 16; }

// X is the type of the logits, float or Bf16.
template <class X>
class TileRing {
 public:
  FASTDPO_DEVICE TileRing(const RowTask& task, const Slice& slice, int row_step)
      : task_(task),
        plan_(task.plan),
        slice_(slice),
        row_step_(row_step),
        start_(gpu::shared_address(gpu::shared_memory()) + slice.warp * kTileBytes),
        low_half_(start_ + half_offset(slice.lane, 0)),
        high_half_(start_ + half_offset(slice.lane, 1)) {}

  // The rows to come are `row`, `row` + `row_step`, ...
  FASTDPO_DEVICE void fill(int64_t row) {
    fetch_from_row(row);
    for (int i = 0; i < plan_.stages(); ++i) fetch_quarter();
  }

  // Returns when a quarter has come, the first of all if `newer` quarters were fetched since.
  FASTDPO_DEVICE void wait(int newer) const {
    gpu::wait_copies_but(newer);
    gpu::sync_warp();  // a lane reads what other lanes have copied
  }

  // A quarter has been read for the last time: its place is free once all lanes are done with it.
  FASTDPO_DEVICE void refill() {
    gpu::sync_warp();
    fetch_quarter();
  }

  // A place in the ring is the offset of one of this warp's tiles; they follow each other as they are
  // fetched.
  FASTDPO_DEVICE int next(int place) const {
    const int step = plan_.warps * kTileBytes;
    return place + step == plan_.stages() * plan_.tiles_per_quarter * step ? 0 : place + step;
  }

  FASTDPO_DEVICE void keep(int place, const float (&u)[kLaneColumns]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int offset = place + group * kWarpGroup * 4;
      gpu::store16_shared(low_half_ + offset, bits_of(u + group * kGroup));
      gpu::store16_shared(high_half_ + offset, bits_of(u + group * kGroup + 4));
    }
  }

  FASTDPO_DEVICE void read_kept(int place, float (&u)[kLaneColumns]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int offset = place + group * kWarpGroup * 4;
      unpack(gpu::load16_shared(low_half_ + offset), gpu::load16_shared(high_half_ + offset), u + group * kGroup);
    }
  }

  FASTDPO_DEVICE void read_fetched(int place, float (&x)[kLaneColumns]) const {
    if constexpr (kIsBf16) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        unpack_bf16(gpu::load16_shared(low_half_ + place + group * kWarpGroup * 4), x + group * kGroup);
      }
    } else {
      read_kept(place, x);
    }
  }

 private:
  static constexpr bool kIsBf16 = sizeof(X) == 2;
  static constexpr int kCopyColumns = 16 / sizeof(X);
  static constexpr int kCopies = kTileColumns / (32 * kCopyColumns);

  FASTDPO_DEVICE void fetch_from_row(int64_t row) {
    fetch_row_ = row;
    fetch_from_ = logits_row<X>(task_, row) + slice_.begin + slice_.lane * kCopyColumns;
    fetch_tile_ = slice_.warp;
  }

  // Starts the loads of this warp's tiles of the next quarter that is due, as one group even if there are
  // none.
  FASTDPO_DEVICE void fetch_quarter() {
    const int tiles = fetch_row_ < task_.args.rows ? slice_.tiles : 0;
#pragma unroll 1
    for (int j = 0; j < plan_.tiles_per_quarter; ++j) {
      if (fetch_tile_ < tiles) fetch_tile();
      fetch_place_ = next(fetch_place_);
      fetch_tile_ += plan_.warps;
    }
    gpu::commit_copies();
    if (fetch_tile_ >= plan_.resident_tiles()) fetch_from_row(fetch_row_ + row_step_);
  }

  // Lane by lane in the order of the columns: of bf16 a lane's own group, of fp32 half a group, the halves of
  // 16 lanes' groups first and then those of the other 16.
  FASTDPO_DEVICE void fetch_tile() const {
    const X* from = fetch_from_ + fetch_tile_ * kTileColumns;
    const gpu::SharedAddress first_copy = kIsBf16 ? low_half_ : start_ + half_offset(slice_.lane / 2, slice_.lane % 2);
    const gpu::SharedAddress to = first_copy + fetch_place_;
    if (task_.logits_aligned && fetch_tile_ < slice_.whole_tiles) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) gpu::copy_async(to + copy_offset(i), from + i * 32 * kCopyColumns);
    } else {
      const int available = slice_.vocab - (slice_.begin + fetch_tile_ * kTileColumns + slice_.lane * kCopyColumns);
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) {
        fetch_columns(to + copy_offset(i), from + i * 32 * kCopyColumns, available - i * 32 * kCopyColumns);
      }
    }
  }

  FASTDPO_DEVICE static int copy_offset(int i) {
    return kIsBf16 ? i * kWarpGroup * 4 : i / 2 * kWarpGroup * 4 + i % 2 * 16 * 16;
  }

  // 16 bytes if they are there, else column by column; the rest is left as it was.
  FASTDPO_DEVICE void fetch_columns(gpu::SharedAddress to, const X* from, int available) const {
    if (available >= kCopyColumns && task_.logits_aligned) {
      gpu::copy_async(to, from);
    } else {
#pragma unroll 1
      for (int i = 0; i < kCopyColumns && i < available; ++i) {
        gpu::store_shared(to + i * static_cast<int>(sizeof(X)), raw(from[i]));
      }
    }
  }

  const RowTask& task_;
  const RowPlan& plan_;
  const Slice slice_;  // its own: a reference into the object that holds this one would keep both out of registers
  const int row_step_;
  const gpu::SharedAddress start_;      // of this warp's first tile
  const gpu::SharedAddress low_half_;   // this lane's columns 0..3 of that tile's first group
  const gpu::SharedAddress high_half_;  // and 4..7
  int64_t fetch_row_ = 0;
  const X* fetch_from_ = nullptr;  // in that row, the start of the slice and this lane's first copy
  int fetch_tile_ = 0;
  int fetch_place_ = 0;
};

}  // namespace fastdpo
