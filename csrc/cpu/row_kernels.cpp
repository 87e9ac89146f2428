// The row kernel of fastdpo/kernels/contract.py on a CPU: rows over OpenMP threads, one row in blocks that fit in L1.
//
// A row is read twice: once for the running maximum and the sums below it, once for D. Both passes go in ascending
// order, block by block: load to the stack, work there, store. So D may lie over the logits, and a row that fits in the
// cache comes from memory once. Sums run over kLanes fp32 lanes within a block and in double from block to block: their
// order depends on V only, and 262144 logits cost no accuracy.
//
// Loops over a block are written for the compiler to vectorise. Every function a row needs is inlined into process_row,
// because only that one is compiled once per instruction set (OpenMP's outlined bodies are not).
#include "../common.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#if __GNUC__ >= 12
#define PER_INSTRUCTION_SET __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PER_INSTRUCTION_SET __attribute__((target_clones("avx2", "default")))
#endif
#else
#define PER_INSTRUCTION_SET
#endif
#define INLINE __attribute__((always_inline)) inline

namespace {

using fastdpo::DType;
using fastdpo::RowArgs;

// The bytes of a row are logits first and D later, of another type.
using f32 = float __attribute__((may_alias));
using u16 = uint16_t __attribute__((may_alias));

constexpr int kLanes = 32;
constexpr int kBlock = 2048;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = -88.0f;  // exp of it is below the normal numbers and taken as 0

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// exp(x) for x <= 0 within 2 ulp down to kLowest, 0 below; NaN stays NaN; exp(0) is exactly 1.
INLINE float exp_f32(float x) {
  constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float y = x < kLowest ? kLowest : x;
  const float shifted = y * 1.44269504f + round_magic;
  const float n = shifted - round_magic;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // y - n ln 2, ln 2 in two parts
  float exp_r = 1.381454018e-3f;                                // minimax on |r| <= ln(2) / 2
  exp_r = exp_r * r + 8.368745109e-3f;
  exp_r = exp_r * r + 4.166839078e-2f;
  exp_r = exp_r * r + 1.66665204e-1f;
  exp_r = exp_r * r + 4.999999344e-1f;
  exp_r = exp_r * (r * r) + (r + 1.0f);
  return exp_r * bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2^n; 2^-127 comes out as 0
}

// tanh(x) within a few ulp: an odd polynomial near 0, where the quotient would cancel.
INLINE float tanh_f32(float x) {
  const float s = x * x;
  float q = -5.704986959e-3f;  // minimax on |x| <= 0.625
  q = q * s + 2.063908719e-2f;
  q = q * s - 5.373971505e-2f;
  q = q * s + 1.33314422e-1f;
  q = q * s - 3.333328194e-1f;
  const float near_zero = x * s * q + x;
  const float e = exp_f32(-2.0f * std::fabs(x));
  const float magnitude = (1.0f - e) / (1.0f + e);
  return std::fabs(x) < 0.625f ? near_zero : std::copysign(magnitude, x);
}

INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

INLINE uint16_t to_f16(float x) {
  const uint32_t sign = (bit_cast<uint32_t>(x) >> 16) & 0x8000u;
  const float magnitude = std::fabs(x);
  const uint32_t bits = bit_cast<uint32_t>(magnitude);
  // Normal numbers: move the exponent's bias from 127 to 15 and round away 13 bits, ties to even.
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24: adding 0.5 makes the hardware round to it.
  const uint32_t subnormal = bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t half = magnitude < 6.103515625e-5f ? subnormal : normal;
  half = magnitude >= 65520.0f ? 0x7c00u : half;
  half = x == x ? half : 0x7e00u;
  return static_cast<uint16_t>(half | sign);
}

// A block of a row on the stack: `size` logits, then -inf up to a whole number of lanes.
struct Block {
  alignas(64) float z[kBlock];
  alignas(64) float tanh[kBlock];  // tanh of the softcap; what the gradient's factor is made of
  alignas(64) float e[kBlock];     // exp(z - shift); in the second pass D
  int64_t start;
  int size;
  int padded;
};

// What the second pass needs of the first, and the outputs are made of.
struct RowSums {
  float max = -kInf;
  float shift = 0.0f;  // max, or 0 while that is -inf
  float label_logit = kNaN;
  double exp = 0.0;         // sum of e = exp(z - shift)
  double exp_sq = 0.0;      // sum of e^2
  double exp_offset = 0.0;  // sum of e (z - shift)
  double z = 0.0;
};

struct Row {
  const RowArgs& args;
  char* logits;
  char* d;
  int64_t index;
  int64_t label;       // -1 where it is none of 0..V-1
  bool tanh_in_place;  // the logits have been replaced by their tanh
};

INLINE void load_products(const Row& row, Block& block) {
  const RowArgs& args = row.args;
  if (args.logits_dtype == DType::f32) {
    const f32* raw = reinterpret_cast<const f32*>(row.logits) + block.start;
    for (int i = 0; i < block.size; ++i) block.z[i] = raw[i];
    return;
  }
  const u16* raw = reinterpret_cast<const u16*>(row.logits) + block.start;
  for (int i = 0; i < block.size; ++i) block.z[i] = bit_cast<float>(static_cast<uint32_t>(raw[i]) << 16);
  const int64_t offset = row.label - block.start;
  if (args.target_logits && offset >= 0 && offset < block.size) block.z[offset] = args.target_logits[row.index];
}

// Fills block.z with final logits, and block.tanh where there is a softcap.
INLINE void load(const Row& row, Block& block, int64_t start) {
  const RowArgs& args = row.args;
  const bool capped = args.softcap > 0.0f;
  block.start = start;
  block.size = static_cast<int>(std::min<int64_t>(kBlock, args.vocab - start));
  block.padded = (block.size + kLanes - 1) / kLanes * kLanes;
  load_products(row, block);

  if (row.tanh_in_place) {
    for (int i = 0; i < block.size; ++i) block.tanh[i] = block.z[i];
  } else {
    const float factor = args.scale / (capped ? args.softcap : args.temperature);
    if (args.bias) {
      const float* bias = args.bias + start;
      for (int i = 0; i < block.size; ++i) block.z[i] = (block.z[i] + bias[i]) * factor;
    } else {
      for (int i = 0; i < block.size; ++i) block.z[i] *= factor;
    }
    if (capped) {
      for (int i = 0; i < block.size; ++i) block.tanh[i] = tanh_f32(block.z[i]);
    }
  }
  if (capped) {
    const float factor = args.softcap / args.temperature;
    for (int i = 0; i < block.size; ++i) block.z[i] = block.tanh[i] * factor;
  }
  for (int i = block.size; i < block.padded; ++i) block.z[i] = -kInf;
}

INLINE float block_max(const Block& block) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInf;
  for (int i = 0; i < block.padded; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = block.z[i + l] > lanes[l] ? block.z[i + l] : lanes[l];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

template <class T>
INLINE double total(const T (&lanes)[kLanes]) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// Sums so far, made relative to a new maximum.
INLINE void raise_max(RowSums& sums, float max) {
  if (sums.max != -kInf) {  // otherwise there is nothing in the sums but, perhaps, NaN
    const double offset = static_cast<double>(sums.max) - max;
    const double factor = std::exp(offset);
    sums.exp_offset = factor * (sums.exp_offset + offset * sums.exp);
    sums.exp_sq *= factor * factor;
    sums.exp *= factor;
  }
  sums.max = sums.shift = max;
}

INLINE float offset_from(float z, float shift) {
  const float offset = z - shift;
  return offset < kLowest ? kLowest : offset;  // finite for a masked logit, whose probability of 0 it multiplies
}

INLINE void add_statistics(const RowArgs& args, const Block& block, RowSums& sums) {
  if (args.entropy || args.grad_coeffs) {
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += block.e[i + l] * offset_from(block.z[i + l], sums.shift);
    }
    sums.exp_offset += total(lanes);
  }
  if (args.log_sum_sq_probs) {
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += block.e[i + l] * block.e[i + l];
    }
    sums.exp_sq += total(lanes);
  }
  if (args.mean_logit) {
    double lanes[kLanes] = {};  // unlike probabilities, logits may be large and cancel
    const int whole = block.size / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += block.z[i + l];
    }
    for (int i = whole; i < block.size; ++i) lanes[i - whole] += block.z[i];
    sums.z += total(lanes);
  }
}

INLINE RowSums reduce(Row& row) {
  const RowArgs& args = row.args;
  const bool keep_tanh = args.softcap > 0.0f && args.logits_dtype == DType::f32 && args.d_out;
  RowSums sums;
  Block block;
  for (int64_t start = 0; start < args.vocab; start += kBlock) {
    load(row, block, start);
    if (keep_tanh) {
      f32* raw = reinterpret_cast<f32*>(row.logits) + start;
      for (int i = 0; i < block.size; ++i) raw[i] = block.tanh[i];
    }
    const int64_t offset = row.label - start;
    if (offset >= 0 && offset < block.size) sums.label_logit = block.z[offset];

    const float max = block_max(block);
    if (max > sums.max) raise_max(sums, max);
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        block.e[i + l] = exp_f32(block.z[i + l] - sums.shift);
        lanes[l] += block.e[i + l];
      }
    }
    sums.exp += total(lanes);
    add_statistics(args, block, sums);
  }
  if (sums.max == kInf) sums.exp = kInf;  // inf - inf has made it NaN
  row.tanh_in_place = keep_tanh;
  return sums;
}

INLINE void store_d(const Row& row, const Block& block) {
  if (row.args.d_dtype == DType::f32) {
    f32* raw = reinterpret_cast<f32*>(row.d) + block.start;
    for (int i = 0; i < block.size; ++i) raw[i] = block.e[i];
    return;
  }
  u16* raw = reinterpret_cast<u16*>(row.d) + block.start;
  if (row.args.d_dtype == DType::bf16) {
    for (int i = 0; i < block.size; ++i) raw[i] = to_bf16(block.e[i]);
  } else {
    for (int i = 0; i < block.size; ++i) raw[i] = to_f16(block.e[i]);
  }
}

// D = cf (a onehot + p (b - a - c (log p + entropy))), which is cf (onehot - p) for a, b, c = 1, 0, 0.
INLINE void write_d(const Row& row, const RowSums& sums) {
  const RowArgs& args = row.args;
  const float inverse_sum = static_cast<float>(1.0 / sums.exp);
  float at_label = 1.0f, of_p = -1.0f, of_p_log_p = 0.0f;
  if (args.grad_coeffs) {
    const float* coeffs = args.grad_coeffs + row.index;
    const double entropy_less_log_sum = -sums.exp_offset / sums.exp;  // log p + entropy = z - shift + this
    at_label = coeffs[0];
    of_p_log_p = -coeffs[2 * args.rows];
    of_p = static_cast<float>(coeffs[args.rows] - coeffs[0] + of_p_log_p * entropy_less_log_sum);
  }
  Block block;
  for (int64_t start = 0; start < args.vocab; start += kBlock) {
    load(row, block, start);
    if (args.grad_coeffs) {
      for (int i = 0; i < block.size; ++i) {
        const float p = exp_f32(block.z[i] - sums.shift) * inverse_sum;
        block.e[i] = p * (of_p + of_p_log_p * offset_from(block.z[i], sums.shift));
      }
    } else {
      for (int i = 0; i < block.size; ++i) block.e[i] = -exp_f32(block.z[i] - sums.shift) * inverse_sum;
    }
    const int64_t offset = row.label - start;
    if (offset >= 0 && offset < block.size) block.e[offset] += at_label;
    if (args.softcap > 0.0f) {
      for (int i = 0; i < block.size; ++i) block.e[i] *= 1.0f - block.tanh[i] * block.tanh[i];
    }
    store_d(row, block);
  }
}

INLINE void write_outputs(const Row& row, const RowSums& sums) {
  const RowArgs& args = row.args;
  const int64_t i = row.index;
  const double log_sum = std::log(sums.exp);
  const double lse = sums.shift + log_sum;
  args.lse[i] = static_cast<float>(lse);
  args.logps[i] = static_cast<float>(sums.label_logit - lse);
  if (args.entropy) args.entropy[i] = static_cast<float>(log_sum - sums.exp_offset / sums.exp);
  if (args.log_sum_sq_probs) args.log_sum_sq_probs[i] = static_cast<float>(std::log(sums.exp_sq) - 2.0 * log_sum);
  if (args.mean_logit) args.mean_logit[i] = static_cast<float>(sums.z / static_cast<double>(args.vocab));
  if (args.is_top1) args.is_top1[i] = sums.label_logit == sums.max && !std::isnan(sums.exp);
}

PER_INSTRUCTION_SET void process_row(const RowArgs& args, int64_t index) {
  const int64_t logits_size = args.logits_dtype == DType::f32 ? 4 : 2;
  const int64_t d_size = args.d_dtype == DType::f32 ? 4 : 2;
  const int64_t label = args.labels[index];
  Row row{args,
          static_cast<char*>(args.logits) + index * args.logits_stride * logits_size,
          static_cast<char*>(args.d_out) + index * args.d_stride * d_size,
          index,
          label >= 0 && label < args.vocab ? label : -1,
          false};
  const RowSums sums = reduce(row);
  write_outputs(row, sums);
  if (args.d_out) write_d(row, sums);
}

}  // namespace

void fastdpo_cpu_row_kernel(const RowArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(std::max(threads, 1))
  for (int64_t row = 0; row < args.rows; ++row) process_row(args, row);
}
