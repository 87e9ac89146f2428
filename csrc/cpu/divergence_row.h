// A row of the divergence kernel on a CPU: the heads' logits in blocks, and two teachers as one.
#pragma once

#include <vector>

#include "row_math.h"

namespace fastdpo {

constexpr int kBlock = 1024;

struct Block {
  int64_t start;
  int size;
  int padded;
  alignas(64) float b[kBlock];  // the policy's logits less their shift; -inf from `size` to `padded`
  alignas(64) float a[kBlock];  // the teacher's
  alignas(64) float p[kBlock];
  alignas(64) float x[kBlock];  // of the teacher: q, or what p is multiplied by
  alignas(64) float d[kBlock];
  alignas(64) float tanh[kBlock];  // of the policy's softcap
};

// One head's logits: z = slope * value, and values are in place once is_raw is false.
struct Stream {
  f32* row = nullptr;
  const float* bias = nullptr;
  float factor = 1.0f;
  float slope = 1.0f;
  bool is_capped = false;
  bool is_raw = false;
};

struct Softmax {
  float max = -kInf;
  float shift = 0.0f;  // max, or 0 while that is -inf
  double sum = 0.0;    // of exp(z - shift)
  double others = 0.0;  // the same but for the label's
  float label_logit = kNaN;

  double log_prob(float z) const { return (static_cast<double>(z) - shift) - std::log(sum); }
};

// What D's walk finds in the place of the teacher's logits (and e_p, or p, in the policy's).
enum class Kept { nothing, e_q, minus_delta, log_ratio };

struct Shifts {
  float p;
  float q;
};

struct Row {
  const DivergenceArgs& args;
  int64_t index;
  int64_t label;  // -1 where it is none of 0..V-1
  Stream policy, teacher, second;
  Softmax p{}, q{};
  double q_apart = 0.0;  // sum of e_q (a - b)
  double p_apart = 0.0;  // sum of e_p (a - b)
  double reverse_kl = 0.0;
  double kl_to_mean = 0.0;  // KL(p || m)
  Kept kept = Kept::nothing;
  std::vector<Shifts> shifts{};  // of each block when it was kept
};

INLINE Stream open(const HeadArgs& head, int64_t index) {
  Stream stream;
  if (!head.logits) return stream;
  stream.row = reinterpret_cast<f32*>(head.logits) + index * head.stride;
  stream.bias = head.bias;
  stream.is_capped = head.softcap > 0.0f;
  stream.factor = head.scale / (stream.is_capped ? head.softcap : head.temperature);
  stream.is_raw = stream.is_capped || head.bias;
  stream.slope = stream.is_capped ? head.softcap / head.temperature : head.bias ? 1.0f : stream.factor;
  return stream;
}

INLINE void move_to(Block& block, const Row& row, int64_t start) {
  block.start = start;
  block.size = static_cast<int>(std::min<int64_t>(kBlock, row.args.vocab - start));
  block.padded = padded_size(block.size);
}

INLINE void put(const Stream& stream, const Block& block, const float* values) {
  f32* row = stream.row + block.start;
  for (int i = 0; i < block.size; ++i) row[i] = values[i];
}

INLINE void get(const Stream& stream, const Block& block, float* values) {
  const f32* row = stream.row + block.start;
  for (int i = 0; i < block.size; ++i) values[i] = row[i];
}

// z less `shift`, and -inf up to a whole number of lanes.
INLINE void load(const Stream& stream, const Block& block, float shift, float* z) {
  if (stream.is_raw) {
    get(stream, block, z);
    scale_block(z, stream.bias ? stream.bias + block.start : nullptr, stream.factor, block.size);
    if (stream.is_capped) {
      for (int i = 0; i < block.size; ++i) z[i] = tanh_f32(z[i]);
    }
    put(stream, block, z);
  }
  const f32* row = stream.row + block.start;
  for (int i = 0; i < block.size; ++i) z[i] = row[i] * stream.slope - shift;
  for (int i = block.size; i < block.padded; ++i) z[i] = -kInf;
}

// value * weight, 0 where the weight is: a probability of 0 contributes nothing, whatever it is multiplied by.
INLINE float weighted(float weight, float value) { return weight == 0.0f ? 0.0f : weight * value; }

struct Raised {
  double offset = 0.0;  // of the old shift from the new one
  double factor = 1.0;  // of sums of exponentials
};

INLINE Raised raise_max(Softmax& softmax, float max) {
  Raised raised;
  if (!(max > softmax.max)) return raised;
  raised.offset = static_cast<double>(softmax.shift) - max;
  if (softmax.max != -kInf) raised.factor = std::exp(raised.offset);  // else there is nothing in the sums, or NaN
  softmax.sum *= raised.factor;
  softmax.others *= raised.factor;
  softmax.max = softmax.shift = max;
  return raised;
}

// A sum times a factor of 0 or more: infinity of probabilities that are now 0 is no NaN.
INLINE double scaled(double sum, double factor) { return factor == 0.0 && sum == sum ? 0.0 : sum * factor; }

INLINE void take_label(Softmax& softmax, const Row& row, const Block& block, const float* z) {
  const int64_t offset = row.label - block.start;
  if (offset >= 0 && offset < block.size) softmax.label_logit = z[offset];
}

// The maximum of a teacher; with `sums` also its sum of exponentials.
INLINE Softmax teacher_softmax(const Row& row, Stream& stream, Block& block, bool sums) {
  Softmax softmax;
  for (int64_t start = 0; start < row.args.vocab; start += kBlock) {
    move_to(block, row, start);
    load(stream, block, 0.0f, block.a);
    raise_max(softmax, padded_max(block.a, block.padded));
    if (!sums) continue;
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += exp_f32(block.a[i + l] - softmax.shift);
    }
    softmax.sum += total(lanes);
  }
  stream.is_raw = false;
  return softmax;
}

INLINE double teachers_distance(const Row& row, const Softmax& first, const Softmax& second, Block& block) {
  const float of_first = static_cast<float>(1.0 / first.sum), of_second = static_cast<float>(1.0 / second.sum);
  double distance = 0.0;
  for (int64_t start = 0; start < row.args.vocab; start += kBlock) {
    move_to(block, row, start);
    load(row.teacher, block, first.shift, block.a);
    load(row.second, block, second.shift, block.b);
    for (int i = 0; i < block.padded; ++i) block.a[i] = exp_f32(block.a[i]) * of_first;
    for (int i = 0; i < block.padded; ++i) block.b[i] = exp_f32(block.b[i]) * of_second;
    // Both rounded: with one product fused into the difference, equal ones would not cancel.
    asm volatile("" ::"r"(block.a), "r"(block.b) : "memory");
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) lanes[l] += std::fabs(block.a[i + l] - block.b[i + l]);
    }
    distance += total(lanes);
  }
  return distance;
}

// a first + b second, up to a constant of the row.
struct Combination {
  float a = 1.0f, b = 0.0f;
  float first_shift = 0.0f, second_shift = 0.0f;
};

INLINE Combination combination_of(Row& row, Block& block) {
  const DivergenceArgs& args = row.args;
  const bool needs_distance = args.l1_distance || args.first_slope != 0.0f || args.second_slope != 0.0f;
  const Softmax first = teacher_softmax(row, row.teacher, block, needs_distance);
  const Softmax second = teacher_softmax(row, row.second, block, needs_distance);
  const float* coefficients = args.coefficients + row.index;
  Combination mix{coefficients[0], coefficients[args.rows], first.shift, second.shift};
  if (needs_distance) {
    const float distance = static_cast<float>(teachers_distance(row, first, second, block));
    if (args.l1_distance) args.l1_distance[row.index] = distance;
    mix.a += args.first_slope * distance;
    mix.b += args.second_slope * distance;
  }
  return mix;
}

// The teacher's logits of a block into block.a: of the one, or of two combined.
INLINE void load_teacher(const Row& row, const Combination& mix, Block& block) {
  load(row.teacher, block, mix.first_shift, block.a);
  if (!row.second.row) return;
  load(row.second, block, mix.second_shift, block.x);
  for (int i = 0; i < block.padded; ++i) {
    const bool is_masked = block.a[i] == -kInf || block.x[i] == -kInf;
    const float combined = mix.a * block.a[i] + mix.b * block.x[i];
    block.a[i] = is_masked ? -kInf : combined;
  }
}

}  // namespace fastdpo
