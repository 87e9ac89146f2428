// How one row is spread over thread blocks, warps and shared memory. Depends on the vocabulary and the device
// alone, and with it the order of every sum: rows, dtypes, and whether D is wanted change no bit of a
// logsumexp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#ifdef __CUDACC__
#define FASTDPO_INLINE __host__ __device__ __forceinline__
#else
#define FASTDPO_INLINE inline
#endif

namespace fastdpo {

constexpr int kGroup = 8;                         // consecutive columns of one lane
constexpr int kWarpGroup = 32 * kGroup;           // and of its warp
constexpr int kGroups = 2;                        // that a warp handles together
constexpr int kLaneColumns = kGroups * kGroup;
constexpr int kTileColumns = kGroups * kWarpGroup;
constexpr int kTileBytes = 4 * kTileColumns;      // in shared memory a tile is fp32, whatever the logits are
constexpr int kQuarters = 4;                      // a slice is loaded and released in four steps
constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 8;
constexpr int kSumFields = 6;                     // of Sums
constexpr int64_t kMaxVocab = int64_t{1} << 28;   // the bytes of a row are counted with 32 bits

struct DeviceLimits {
  int64_t shared_per_block;  // most that one block may ask for
  int64_t shared_per_sm;
  int64_t reserved_per_block;
  int max_cluster;  // 1: no thread-block clusters
};

struct RowPlan {
  int cluster;            // blocks per row, each with a slice of it
  int warps;              // per block
  int tiles;              // per slice; the last slices of a row may have fewer
  int tiles_per_quarter;  // per warp
  int ahead;              // quarters of the next row in flight while this row is held
  int64_t shared_bytes;

  // Tiles of a slice that stay in shared memory; the rest is read twice.
  FASTDPO_INLINE int resident_tiles() const { return kQuarters * tiles_per_quarter * warps; }
  FASTDPO_INLINE int stages() const { return kQuarters + ahead; }
};

FASTDPO_INLINE int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

FASTDPO_INLINE int64_t ring_bytes(const RowPlan& plan) {
  return int64_t{kTileBytes} * plan.stages() * plan.tiles_per_quarter * plan.warps;
}

// Two sets, for odd and even rows, of the sums of every warp that works on a row.
FASTDPO_INLINE int64_t inbox_bytes(const RowPlan& plan) {
  return int64_t{sizeof(float)} * 2 * kSumFields * plan.cluster * plan.warps;
}

constexpr int kBarrierBytes = 16;  // two barriers, likewise

FASTDPO_INLINE RowPlan sized(int cluster, int warps, int tiles, int tiles_per_quarter, int ahead) {
  RowPlan plan{cluster, warps, tiles, tiles_per_quarter, ahead, 0};
  plan.shared_bytes = (ring_bytes(plan) + inbox_bytes(plan) + kBarrierBytes + 15) / 16 * 16;
  return plan;
}

// The smallest cluster whose slices leave room for a second block on each multiprocessor, to work while the
// first one waits at its barrier; else the smallest that holds the row at all; else one block that keeps the
// front of the row.
inline RowPlan plan_row(int64_t vocab, const DeviceLimits& limits) {
  const int row_tiles = ceil_div(vocab, kTileColumns);
  const int64_t two_blocks = limits.shared_per_sm / 2 - limits.reserved_per_block;
  for (const int64_t budget : {two_blocks < limits.shared_per_block ? two_blocks : limits.shared_per_block,
                               limits.shared_per_block}) {
    for (int cluster = 1; cluster <= limits.max_cluster && cluster <= kMaxCluster; cluster *= 2) {
      const int tiles = ceil_div(row_tiles, cluster);
      const int tiles_per_quarter = ceil_div(tiles, kQuarters * kMaxWarps);
      const int warps = ceil_div(tiles, kQuarters * tiles_per_quarter);
      for (const int ahead : {2, 1}) {
        const RowPlan plan = sized(cluster, warps, tiles, tiles_per_quarter, ahead);
        if (plan.shared_bytes <= budget) return plan;
      }
    }
  }
  int warps = kMaxWarps;
  while (warps > 1 && sized(1, warps, row_tiles, 1, 1).shared_bytes > limits.shared_per_block) --warps;
  return sized(1, warps, row_tiles, 1, 1);
}

}  // namespace fastdpo
