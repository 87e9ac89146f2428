// The divergence kernel of fastdpo/kernels/divergence.py on a CPU: rows over OpenMP threads, a row in blocks that fit
// in L1, walked over from the first block to the last:
//
// 1. with two teachers: each one's maximum and, where their distance is wanted, sum of exponentials and that distance;
// 2. policy and teacher (or the teachers' combination, made here): maxima, sums of exponentials, and the sums that
//    forward_kl and reverse_kl are made of, so that those need no walk of their own;
// 3. where jsd is wanted, its two sums, which need normalised probabilities;
// 4. where a gradient is wanted, D.
//
// The logits are scratch: tanh of a softcap, the sum with a bias and the combination are made once and put in their
// place. So are, where D is of one divergence, the exponentials and what D multiplies them by: its walk needs no exp.
//
// With b = z - shift and a = c - shift of the policy's and the teacher's logits, e the exp of them and S the sum of e:
//
//     delta = log q - log p = a - b + k,                k = log S_p - log S_q
//     forward_kl = sum e_q (a - b) / S_q + k,           reverse_kl = -sum e_p (a - b) / S_p - k
//
// Sums run over kLanes fp32 lanes within a block and in double from block to block, in an order that depends on V only.
#include "divergence_row.h"

namespace {

using namespace fastdpo;

// Adds a block to all sums, and leaves e_p, e_q and a - b in block.p, block.x and block.d.
INLINE void fold(Row& row, Block& block) {
  const Raised p = raise_max(row.p, padded_max(block.b, block.padded));
  const Raised q = raise_max(row.q, padded_max(block.a, block.padded));
  const double gained = q.offset - p.offset;  // by every a - b
  if (gained != 0.0 || p.factor != 1.0 || q.factor != 1.0) {
    row.q_apart = scaled(row.q_apart, q.factor) + gained * row.q.sum;
    row.p_apart = scaled(row.p_apart, p.factor) + gained * row.p.sum;
  }
  const float p_shift = row.p.shift, q_shift = row.q.shift;
  for (int i = 0; i < block.padded; ++i) {
    const float b = block.b[i] - p_shift, a = block.a[i] - q_shift;
    block.p[i] = exp_f32(b);
    block.x[i] = exp_f32(a);
    block.d[i] = a - b;
  }
  float p_sums[kLanes] = {}, q_sums[kLanes] = {}, p_aparts[kLanes] = {}, q_aparts[kLanes] = {};
  for (int i = 0; i < block.padded; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      p_sums[l] += block.p[i + l];
      q_sums[l] += block.x[i + l];
      p_aparts[l] += weighted(block.p[i + l], block.d[i + l]);
      q_aparts[l] += weighted(block.x[i + l], block.d[i + l]);
    }
  }
  const double p_sum = total(p_sums);
  const int64_t label = row.label - block.start;
  row.p.others += label >= 0 && label < block.size ? sum_without(block.p, label, block.padded) : p_sum;
  row.p.sum += p_sum;
  row.q.sum += total(q_sums);
  row.p_apart += total(p_aparts);
  row.q_apart += total(q_aparts);
}

// What D's walk is to find in the place of the block's logits.
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

struct Logs {
  float p, q;   // of the sums
  float apart;  // k
};

INLINE Logs logs_of(const Row& row) {
  const double p = std::log(row.p.sum), q = std::log(row.q.sum);
  return {static_cast<float>(p), static_cast<float>(q), static_cast<float>(p - q)};
}

// Of the mixture m = beta q + (1 - beta) p at a block's tokens: p and q into block.p and block.x, log p - log m and
// log q - log m into block.b and block.a. Two loops, because one would be a single long chain of operations.
INLINE void mix(Block& block, const Logs& logs, float beta) {
  for (int i = 0; i < block.padded; ++i) {
    const float log_p = block.b[i] - logs.p, log_q = block.a[i] - logs.q;
    const float delta = (block.a[i] - block.b[i]) + logs.apart;
    const bool is_teachers = delta > 0.0f;
    const float larger = exp_f32(log_p > log_q ? log_p : log_q);
    const Reduced apart = reduce_exponent(-std::fabs(delta));
    const float smaller = weighted(larger, exp_of(apart));  // delta of two masked tokens is NaN
    block.p[i] = is_teachers ? smaller : larger;
    block.x[i] = is_teachers ? larger : smaller;
    block.a[i] = delta;
    block.b[i] = (is_teachers ? 1.0f - beta : beta) * expm1_of(apart);
  }
  for (int i = 0; i < block.padded; ++i) {
    const float s = log1p_f32(block.b[i]), delta = block.a[i];
    block.b[i] = -((delta > 0.0f ? delta : 0.0f) + s);
    block.a[i] = (delta > 0.0f ? 0.0f : delta) - s;
  }
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
    mix(block, logs, beta);
    float p_lanes[kLanes] = {}, q_lanes[kLanes] = {};
    for (int i = 0; i < block.padded; i += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        p_lanes[l] += weighted(block.p[i + l], block.b[i + l]);
        q_lanes[l] += weighted(block.x[i + l], block.a[i + l]);
      }
    }
    to_mean += total(p_lanes);
    teacher_to_mean += total(q_lanes);
    if (row.kept == Kept::log_ratio) {
      put(row.policy, block, block.p);
      put(row.teacher, block, block.b);
    }
  }
  row.kl_to_mean = to_mean;
  row.args.jsd[row.index] = static_cast<float>(beta * teacher_to_mean + (1.0 - beta) * to_mean);
}

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
INLINE void add_product(Block& block, const float* x, float weight, float offset) {
  for (int i = 0; i < block.size; ++i) block.d[i] += weight * weighted(block.p[i], x[i] + offset);
}

INLINE void add_difference(Block& block, float weight) {
  for (int i = 0; i < block.size; ++i) block.d[i] += weight * (block.p[i] - block.x[i]);
}

// `weight` (1 - p) of the label, from the sum of the other probabilities, in the place of its share `weight` (-p).
INLINE void put_label(const Row& row, float weight, Block& block) {
  const int64_t offset = row.label - block.start;
  if (offset < 0 || offset >= block.size) return;
  block.d[offset] = static_cast<float>(weight * (row.p.others / row.p.sum));
}

// Every divergence's share of D, from what was kept, or else from the logits.
INLINE void add_divergences(const Row& row, const Weights& weights, Block& block) {
  const DivergenceArgs& args = row.args;
  const bool is_kept = row.kept != Kept::nothing;
  double p_moved = 0.0, q_moved = 0.0;  // of the shifts since the block was kept
  if (is_kept && row.kept != Kept::log_ratio) {
    const Shifts& then = row.shifts[block.start / kBlock];
    // Above 0 where nothing but masked tokens had come, whose exponentials of 0 stay 0.
    p_moved = std::min(static_cast<double>(then.p) - row.p.shift, 0.0);
    q_moved = std::min(static_cast<double>(then.q) - row.q.shift, 0.0);
  }
  if (is_kept) {
    get(row.policy, block, block.p);
    get(row.teacher, block, block.x);
  } else {
    for (int i = 0; i < block.size; ++i) block.p[i] = exp_f32(block.b[i]);
  }
  if (row.kept != Kept::log_ratio) multiply(block.p, static_cast<float>(std::exp(p_moved) / row.p.sum), block.size);
  for (int i = 0; i < block.size; ++i) block.d[i] = -weights.logps * block.p[i];
  put_label(row, weights.logps, block);

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
    add_product(block, block.x, weights.reverse, static_cast<float>(p_moved - q_moved - (k + row.reverse_kl)));
  }
  if (args.jsd) {
    if (!is_kept) mix(block, logs_of(row), args.jsd_beta);
    const float* log_ratio = is_kept ? block.x : block.b;
    add_product(block, log_ratio, (1.0f - args.jsd_beta) * weights.jsd, -static_cast<float>(row.kl_to_mean));
  }
}

// block.d as D of one of the two outputs: the slope of the cap, the dtype.
INLINE void finish_d(const Row& row, const DArgs& out, Block& block) {
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
    finish_d(row, row.args.d_out, block);
    if (row.args.logps_d_out.d) {
      for (int i = 0; i < block.size; ++i) block.d[i] = -block.p[i];
      put_label(row, 1.0f, block);
      finish_d(row, row.args.logps_d_out, block);
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
