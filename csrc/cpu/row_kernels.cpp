// The row kernel of fastdpo/kernels/contract.py on a CPU: rows over OpenMP threads, one row in blocks that fit in L1.
//
// A row is read twice: once for the running maximum and the sums below it, once for D. Both passes go in ascending
// order, block by block: load to the stack, work there, store. So D may lie over the logits, and a row that fits in the
// cache comes from memory once. Sums run over kLanes fp32 lanes within a block and in double from block to block: their
// order depends on V only, and 262144 logits cost no accuracy.
//
// Loops over a block are written for the compiler to vectorise; row_math.h has what they are made of.
#include "row_math.h"

namespace {

using namespace fastdpo;

constexpr int kBlock = 2048;

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
  double others = 0.0;      // the same but for the label's
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
  block.padded = padded_size(block.size);
  load_products(row, block);

  if (row.tanh_in_place) {
    for (int i = 0; i < block.size; ++i) block.tanh[i] = block.z[i];
  } else {
    const float factor = args.scale / (capped ? args.softcap : args.temperature);
    scale_block(block.z, args.bias ? args.bias + start : nullptr, factor, block.size);
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

// Sums so far, made relative to a new maximum.
INLINE void raise_max(RowSums& sums, float max) {
  if (sums.max != -kInf) {  // otherwise there is nothing in the sums but, perhaps, NaN
    const double offset = static_cast<double>(sums.max) - max;
    const double factor = std::exp(offset);
    sums.exp_offset = factor * (sums.exp_offset + offset * sums.exp);
    sums.exp_sq *= factor * factor;
    sums.exp *= factor;
    sums.others *= factor;
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

    const float max = padded_max(block.z, block.padded);
    if (max > sums.max) raise_max(sums, max);
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        block.e[i + l] = exp_f32(block.z[i + l] - sums.shift);
        lanes[l] += block.e[i + l];
      }
    }
    const double sum = total(lanes);
    sums.exp += sum;
    sums.others += offset >= 0 && offset < block.size ? sum_without(block.e, offset, block.padded) : sum;
    add_statistics(args, block, sums);
  }
  if (sums.max == kInf) sums.exp = kInf;  // inf - inf has made it NaN
  row.tanh_in_place = keep_tanh;
  return sums;
}

// D = cf (a onehot + p (b - a - c (log p + entropy))), which is cf (onehot - p) for a, b, c = 1, 0, 0. The label's
// a (1 - p) is made of the sum of the other p.
INLINE void write_d(const Row& row, const RowSums& sums) {
  const RowArgs& args = row.args;
  const float inverse_sum = static_cast<float>(1.0 / sums.exp);
  const double others = sums.others / sums.exp;
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
    if (offset >= 0 && offset < block.size) {
      const float p = exp_f32(block.z[offset] - sums.shift) * inverse_sum;
      const float of_label = of_p + at_label + of_p_log_p * offset_from(block.z[offset], sums.shift);
      block.e[offset] = static_cast<float>(at_label * others) + (p == 0.0f ? 0.0f : p * of_label);
    }
    if (args.softcap > 0.0f) {
      for (int i = 0; i < block.size; ++i) block.e[i] *= 1.0f - block.tanh[i] * block.tanh[i];
    }
    store_d(row.d, args.d_dtype, start, block.e, block.size);
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
  const int64_t label = args.labels[index];
  Row row{args,
          static_cast<char*>(args.logits) + index * args.logits_stride * size_of(args.logits_dtype),
          static_cast<char*>(args.d_out) + index * args.d_stride * size_of(args.d_dtype),
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
