// The divergence kernel of fastdpo/kernels/divergence.py on a CPU: rows over OpenMP threads, a row in blocks that fit in
// L1, walked over from the first block to the last:
//
// 1. with two teachers: each one's maximum and, where their distance is wanted, sum of exponentials and that distance;
// 2. policy and teacher (or the teachers' combination, made here): maxima, sums of exponentials, and the sums that
//    forward_kl and reverse_kl are made of, so that those need no walk of their own;
// 3. where jsd is wanted, its two sums, which need normalised probabilities;
// 4. where a gradient is wanted, D.
//
// The logits are scratch: tanh of a softcap, the sum with a bias and the combination are made once and put in their
// place. So are, where D is of one divergence, the exponentials and what D is the product of: its walk needs no exp then.
//
// With b = z - shift and a = c - shift of the policy's and the teacher's logits, e the exp of them and S the sum of e:
//
//     delta = log q - log p = a - b + k,                k = log S_p - log S_q
//     forward_kl = sum e_q (a - b) / S_q + k,           reverse_kl = -sum e_p (a - b) / S_p - k
//
// Sums run over kLanes fp32 lanes within a block and in double from block to block, in an order that depends on V only.
#include <vector>

#include "row_math.h"

namespace {

using namespace fastdpo;

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
  get(stream, block, z);
  if (stream.is_raw) {
    scale_block(z, stream.bias ? stream.bias + block.start : nullptr, stream.factor, block.size);
    if (stream.is_capped) {
      for (int i = 0; i < block.size; ++i) z[i] = tanh_f32(z[i]);
    }
    put(stream, block, z);
  }
  for (int i = 0; i < block.size; ++i) {
    const float logit = z[i] * stream.slope;
    z[i] = logit - shift;
  }
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
  softmax.max = softmax.shift = max;
  return raised;
}

// A sum times a factor of 0 or more: infinity of probabilities that are now 0 is no NaN.
INLINE double scaled(double sum, double factor) { return factor == 0.0 && sum == sum ? 0.0 : sum * factor; }

INLINE void take_label(Softmax& softmax, const Row& row, const Block& block, const float* z) {
  const int64_t offset = row.label - block.start;
  if (offset >= 0 && offset < block.size) softmax.label_logit = z[offset];
}

// ---- Two teachers ----

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
    float lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        lanes[l] += std::fabs(exp_f32(block.a[i + l]) * of_first - exp_f32(block.b[i + l]) * of_second);
      }
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

// ---- Softmaxes, forward_kl and reverse_kl ----

INLINE void fold(Row& row, Block& block) {
  const Raised p = raise_max(row.p, padded_max(block.b, block.padded));
  const Raised q = raise_max(row.q, padded_max(block.a, block.padded));
  const double gained = q.offset - p.offset;  // by every a - b
  if (gained != 0.0 || p.factor != 1.0 || q.factor != 1.0) {
    row.q_apart = scaled(row.q_apart, q.factor) + gained * row.q.sum;
    row.p_apart = scaled(row.p_apart, p.factor) + gained * row.p.sum;
  }
  const float p_shift = row.p.shift, q_shift = row.q.shift;
  float p_sums[kLanes] = {}, q_sums[kLanes] = {}, p_aparts[kLanes] = {}, q_aparts[kLanes] = {};
  for (int i = 0; i < block.padded; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float b = block.b[i + l] - p_shift, a = block.a[i + l] - q_shift;
      const float e_p = exp_f32(b), e_q = exp_f32(a);
      block.p[i + l] = e_p;
      block.x[i + l] = e_q;
      block.d[i + l] = a - b;
      p_sums[l] += e_p;
      q_sums[l] += e_q;
      p_aparts[l] += weighted(e_p, a - b);
      q_aparts[l] += weighted(e_q, a - b);
    }
  }
  row.p.sum += total(p_sums);
  row.q.sum += total(q_sums);
  row.p_apart += total(p_aparts);
  row.q_apart += total(q_aparts);
}

INLINE void keep(Row& row, Block& block) {
  if (row.kept == Kept::minus_delta) {
    for (int i = 0; i < block.size; ++i) block.x[i] = -block.d[i];
  }
  put(row.policy, block, block.p);
  put(row.teacher, block, block.x);
  row.shifts.push_back({row.p.shift, row.q.shift});
}

INLINE void reduce(Row& row, Block& block) {
  const Combination mix = row.second.row ? combination_of(row, block) : Combination{};
  const bool keeps = row.kept == Kept::e_q || row.kept == Kept::minus_delta;
  for (int64_t start = 0; start < row.args.vocab; start += kBlock) {
    move_to(block, row, start);
    load(row.policy, block, 0.0f, block.b);
    load_teacher(row, mix, block);
    take_label(row.p, row, block, block.b);
    take_label(row.q, row, block, block.a);
    if (row.second.row) put(row.teacher, block, block.a);
    fold(row, block);
    if (keeps) keep(row, block);
  }
  row.policy.is_raw = row.teacher.is_raw = false;
  if (row.second.row) row.teacher.slope = 1.0f;
}

// ---- jsd ----

struct Logs {
  float p, q;   // of the sums
  float apart;  // k
};

INLINE Logs logs_of(const Row& row) {
  const double p = std::log(row.p.sum), q = std::log(row.q.sum);
  return {static_cast<float>(p), static_cast<float>(q), static_cast<float>(p - q)};
}

// p, q and the ratios of the mixture m = beta q + (1 - beta) p at one token.
struct Mixture {
  float p, q;
  float p_ratio;  // log p - log m
  float q_ratio;  // log q - log m
};

INLINE Mixture mixture(float b, float a, const Logs& logs, float beta) {
  const float log_p = b - logs.p, log_q = a - logs.q, delta = (a - b) + logs.apart;
  const bool is_teachers = delta > 0.0f;
  const float larger = exp_f32(log_p > log_q ? log_p : log_q);
  const Reduced apart = reduce_exponent(-std::fabs(delta));
  const float smaller = weighted(larger, exp_of(apart));  // delta of two masked tokens is NaN
  const float s = log1p_f32((is_teachers ? 1.0f - beta : beta) * expm1_of(apart));
  return {is_teachers ? smaller : larger, is_teachers ? larger : smaller,
          -((is_teachers ? delta : 0.0f) + s), (is_teachers ? 0.0f : delta) - s};
}

INLINE void load_both(const Row& row, Block& block) {
  load(row.policy, block, row.p.shift, block.b);
  load(row.teacher, block, row.q.shift, block.a);
}

INLINE void reduce_jsd(Row& row, Block& block) {
  const float beta = row.args.jsd_beta;
  const Logs logs = logs_of(row);
  double to_mean = 0.0, teacher_to_mean = 0.0;
  for (int64_t start = 0; start < row.args.vocab; start += kBlock) {
    move_to(block, row, start);
    load_both(row, block);
    float p_lanes[kLanes] = {}, q_lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const Mixture at = mixture(block.b[i + l], block.a[i + l], logs, beta);
        block.p[i + l] = at.p;
        block.x[i + l] = at.p_ratio;
        p_lanes[l] += weighted(at.p, at.p_ratio);
        q_lanes[l] += weighted(at.q, at.q_ratio);
      }
    }
    to_mean += total(p_lanes);
    teacher_to_mean += total(q_lanes);
    if (row.kept == Kept::log_ratio) {
      put(row.policy, block, block.p);
      put(row.teacher, block, block.x);
    }
  }
  row.kl_to_mean = to_mean;
  row.args.jsd[row.index] = static_cast<float>(beta * teacher_to_mean + (1.0 - beta) * to_mean);
}

// ---- D ----

struct Weights {
  float forward = 1.0f, reverse = 1.0f, jsd = 1.0f, logps = 0.0f;
};

INLINE Weights weights_of(const Row& row) {
  Weights weights;
  if (const float* at = row.args.grad_coeffs) {
    at += row.index;
    const int64_t rows = row.args.rows;
    weights = {at[0], at[rows], at[2 * rows], row.args.logps ? at[3 * rows] : 0.0f};
  }
  return weights;
}

// A loop of its own wherever two products are subtracted later: each is rounded, and equal ones give 0.
INLINE void multiply(float* values, float factor, int size) {
  for (int i = 0; i < size; ++i) values[i] *= factor;
}

// d += weight p (x + offset)
INLINE void add_product(Block& block, float weight, float offset) {
  for (int i = 0; i < block.size; ++i) block.d[i] += weight * weighted(block.p[i], block.x[i] + offset);
}

INLINE void add_difference(Block& block, float weight) {
  for (int i = 0; i < block.size; ++i) block.d[i] += weight * (block.p[i] - block.x[i]);
}

// Every divergence's share of D, from what was kept, or else from the logits.
INLINE void add_divergences(const Row& row, const Weights& weights, Block& block) {
  const DivergenceArgs& args = row.args;
  const bool is_kept = row.kept != Kept::nothing;
  double p_moved = 0.0, q_moved = 0.0;  // of the shifts since the block was kept
  if (is_kept && row.kept != Kept::log_ratio) {
    const Shifts& then = row.shifts[block.start / kBlock];
    p_moved = static_cast<double>(then.p) - row.p.shift;
    q_moved = static_cast<double>(then.q) - row.q.shift;
  }
  if (is_kept) {
    get(row.policy, block, block.p);
    get(row.teacher, block, block.x);
  } else {
    for (int i = 0; i < block.size; ++i) block.p[i] = exp_f32(block.b[i]);
  }
  if (row.kept != Kept::log_ratio) multiply(block.p, static_cast<float>(std::exp(p_moved) / row.p.sum), block.size);
  for (int i = 0; i < block.size; ++i) block.d[i] = -weights.logps * block.p[i];

  if (args.forward_kl) {
    if (!is_kept) {
      for (int i = 0; i < block.size; ++i) block.x[i] = exp_f32(block.a[i]);
    }
    multiply(block.x, static_cast<float>(std::exp(q_moved) / row.q.sum), block.size);
    add_difference(block, weights.forward);
  }
  if (args.reverse_kl) {
    if (!is_kept) {
      for (int i = 0; i < block.size; ++i) block.x[i] = block.b[i] - block.a[i];
    }
    const double k = std::log(row.p.sum) - std::log(row.q.sum);
    add_product(block, weights.reverse, static_cast<float>(p_moved - q_moved - (k + row.reverse_kl)));
  }
  if (args.jsd) {
    const Logs logs = logs_of(row);
    if (!is_kept) {
      for (int i = 0; i < block.size; ++i) block.x[i] = mixture(block.b[i], block.a[i], logs, args.jsd_beta).p_ratio;
    }
    add_product(block, (1.0f - args.jsd_beta) * weights.jsd, -static_cast<float>(row.kl_to_mean));
  }
}

INLINE void finish_d(const Row& row, const DArgs& out, float at_label, Block& block) {
  const int64_t offset = row.label - block.start;
  if (offset >= 0 && offset < block.size) block.d[offset] += at_label;
  if (row.policy.is_capped) {
    for (int i = 0; i < block.size; ++i) block.d[i] *= 1.0f - block.tanh[i] * block.tanh[i];
  }
  char* d = static_cast<char*>(out.d) + row.index * out.stride * size_of(out.dtype);
  store_d(d, out.dtype, block.start, block.d, block.size);
}

INLINE void write_d(const Row& row, Block& block) {
  const Weights weights = weights_of(row);
  for (int64_t start = 0; start < row.args.vocab; start += kBlock) {
    move_to(block, row, start);
    if (row.policy.is_capped) get(row.policy, block, block.tanh);
    if (row.kept == Kept::nothing) load_both(row, block);
    add_divergences(row, weights, block);
    finish_d(row, row.args.d_out, weights.logps, block);
    if (row.args.logps_d_out.d) {
      for (int i = 0; i < block.size; ++i) block.d[i] = -block.p[i];
      finish_d(row, row.args.logps_d_out, 1.0f, block);
    }
  }
}

// A capped policy's tanh is needed to the end, and two divergences need two things of the teacher.
INLINE Kept what_to_keep(const DivergenceArgs& args) {
  const int count = (args.forward_kl != nullptr) + (args.reverse_kl != nullptr) + (args.jsd != nullptr);
  if (!args.d_out.d || count != 1 || args.policy.softcap > 0.0f) return Kept::nothing;
  return args.forward_kl ? Kept::e_q : args.reverse_kl ? Kept::minus_delta : Kept::log_ratio;
}

INLINE void write_outputs(const Row& row) {
  const DivergenceArgs& args = row.args;
  const double k = std::log(row.p.sum) - std::log(row.q.sum);
  if (args.forward_kl) args.forward_kl[row.index] = static_cast<float>(row.q_apart / row.q.sum + k);
  if (args.reverse_kl) args.reverse_kl[row.index] = static_cast<float>(row.reverse_kl);
  if (args.logps) args.logps[row.index] = static_cast<float>(row.p.log_prob(row.p.label_logit));
  if (args.ref_logps) args.ref_logps[row.index] = static_cast<float>(row.q.log_prob(row.q.label_logit));
}

PER_INSTRUCTION_SET void process_row(const DivergenceArgs& args, int64_t index) {
  const int64_t label = args.labels[index];
  Row row{args, index, label >= 0 && label < args.vocab ? label : -1, open(args.policy, index),
          open(args.first, index), open(args.second, index)};
  row.kept = what_to_keep(args);
  Block block;
  reduce(row, block);
  row.reverse_kl = -row.p_apart / row.p.sum - (std::log(row.p.sum) - std::log(row.q.sum));
  write_outputs(row);
  if (args.jsd) reduce_jsd(row, block);
  if (args.d_out.d) write_d(row, block);
}

}  // namespace

void fastdpo_cpu_divergence_kernel(const DivergenceArgs& args, int threads) {
#pragma omp parallel for schedule(static) num_threads(std::max(threads, 1))
  for (int64_t row = 0; row < args.rows; ++row) process_row(args, row);
}
