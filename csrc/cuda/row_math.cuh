// The arithmetic of one row: no memory, no threads, the same on a GPU and on a host.
//
// A kernel keeps one number u per logit, with z = gain * u and gain > 0: the raw logit (its sign flipped if
// the scale is negative), or, under a softcap, the tanh. So a tanh is taken once, and a row without bias or
// softcap stays as loaded.
//
//   no softcap   u = sign(scale) (x + b)             gain = |scale| / temperature
//   softcap      u = tanh((scale / cap) (x + b))     gain = cap / temperature          dz/dx ~ 1 - u^2
//
// Every rounding on the way to the logsumexp is spelled out (add_rn, mul_rn, fmaf), for a compiler free to
// fuse would give the kernel that writes D another logsumexp than the one that does not.
#pragma once

#include <cmath>

#include "row_plan.h"

namespace fastdpo {

constexpr float kInf = INFINITY;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kFloor = -1000.0f;  // 2 to less than this is 0, and 0 times this is still 0

FASTDPO_INLINE float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTDPO_INLINE float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// 2^x within 2 ulp, results below the normal numbers flushed to 0; NaN stays NaN.
FASTDPO_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

FASTDPO_INLINE float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// Within a few ulp: an odd polynomial near 0, where the quotient would cancel. +-inf gives +-1, NaN gives
// NaN.
FASTDPO_INLINE float tanh_accurate(float x) {
  const float square = mul_rn(x, x);
  float p = -5.70498872745e-3f;  // minimax on |x| <= 0.625
  p = fmaf(p, square, 2.06390887954e-2f);
  p = fmaf(p, square, -5.37397155531e-2f);
  p = fmaf(p, square, 1.33314422036e-1f);
  p = fmaf(p, square, -3.33332819422e-1f);
  const float near_zero = fmaf(mul_rn(p, square), x, x);
  const float e = exp2_fast(mul_rn(fabsf(x), 2.0f * kLog2E));
  const float magnitude = fmaf(-2.0f, reciprocal_fast(add_rn(e, 1.0f)), 1.0f);
  return fabsf(x) < 0.625f ? near_zero : copysignf(magnitude, x);
}

struct Transform {
  float pre;       // u = pre (x + b), or its tanh
  float gain;      // z = gain u
  float gain_log2;  // z in units of ln 2
  bool is_capped;
};

FASTDPO_INLINE Transform make_transform(float scale, float softcap, float temperature) {
  const bool is_capped = softcap > 0.0f;
  const float pre = is_capped ? scale / softcap : (scale < 0.0f ? -1.0f : 1.0f);
  const float gain = (is_capped ? softcap : fabsf(scale)) / temperature;
  return {pre, gain, gain * kLog2E, is_capped};
}

// Of the u of some columns: the largest, and sums over e = 2^t, t = (z - z_top) / ln 2. The starting value is
// that of no columns, and of columns that are all -inf.
struct Sums {
  float top = -kInf;   // NaN is passed over here and shows in `exp`
  float exp = 0.0f;    // sum of e
  float others = 0.0f;  // the same but for the label's; only where D is wanted
  float exp_t = 0.0f;  // sum of e t; this and what follows only where statistics are wanted
  float exp_sq = 0.0f;
  float u = 0.0f;      // sum of u
};

// What u is measured from: not -inf, or the masked logits of columns that have no others would turn into NaN.
FASTDPO_INLINE float origin_of(float top) { return top == -kInf ? 0.0f : top; }

// t. The difference first: a number that all columns have in common is gone before anything is rounded.
FASTDPO_INLINE float exponent(float u, float origin, float gain_log2) { return mul_rn(add_rn(u, -origin), gain_log2); }

// The same sums for a larger top.
template <bool kHasD, bool kStats>
FASTDPO_INLINE void raise_top(Sums& sums, float top, float gain_log2) {
  const float t = fmaxf(exponent(sums.top, origin_of(top), gain_log2), kFloor);
  const float shrink = exp2_fast(t);
  if (kStats) {
    sums.exp_t = mul_rn(shrink, fmaf(t, sums.exp, sums.exp_t));
    sums.exp_sq = mul_rn(mul_rn(shrink, shrink), sums.exp_sq);
  }
  if (kHasD) sums.others = mul_rn(shrink, sums.others);
  sums.exp = mul_rn(shrink, sums.exp);
  sums.top = top;
}

FASTDPO_INLINE float tree_sum(const float (&values)[kLaneColumns]) {
  float sums[kLaneColumns / 2];
#pragma unroll
  for (int i = 0; i < kLaneColumns / 2; ++i) sums[i] = add_rn(values[i], values[i + kLaneColumns / 2]);
#pragma unroll
  for (int half = kLaneColumns / 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = add_rn(sums[i], sums[i + half]);
  }
  return sums[0];
}

// Adds some columns, of which the one at `label` is the label's, if any (-1); those that do not exist have a u
// of -inf, and no part in the sum of u.
template <bool kHasD, bool kStats>
FASTDPO_INLINE void absorb(Sums& sums, const float (&u)[kLaneColumns], int label, float sum_of_u, float gain_log2) {
  float top = sums.top;
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) top = fmaxf(top, u[i]);
  raise_top<kHasD, kStats>(sums, top, gain_log2);

  const float origin = origin_of(top);
  float e[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) {
    const float t = exponent(u[i], origin, gain_log2);
    e[i] = exp2_fast(t);
    if (kStats) {
      sums.exp_t = fmaf(e[i], fmaxf(t, kFloor), sums.exp_t);
      sums.exp_sq = fmaf(e[i], e[i], sums.exp_sq);
    }
  }
  const float sum = tree_sum(e);
  sums.exp = add_rn(sums.exp, sum);
  if (kHasD) {
    float others = sum;
    if (label >= 0) {  // in one tile of a row
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) e[i] = i == label ? 0.0f : e[i];
      others = tree_sum(e);
    }
    sums.others = add_rn(sums.others, others);
  }
  if (kStats) sums.u = add_rn(sums.u, sum_of_u);
}

// What the sums of a whole row say.
struct RowLogs {
  float top;
  float log_sum;  // ln of the sum of exp(z - z_top)
  float inverse_sum;
  float others;  // the sum of all p but the label's
  float entropy;
};

template <bool kStats>
FASTDPO_INLINE RowLogs row_logs(const Sums& sums) {
  const float log_sum = logf(sums.exp);
  const float inverse_sum = reciprocal_fast(sums.exp);
  const float entropy = kStats ? log_sum - kLn2 * sums.exp_t * inverse_sum : 0.0f;
  return {sums.top, log_sum, inverse_sum, sums.others * inverse_sum, entropy};
}

// log p. Not z - lse: again the difference to the top comes first.
FASTDPO_INLINE float log_prob(float u, const RowLogs& logs, float gain) {
  return fmaf(add_rn(u, -logs.top), gain, -logs.log_sum);
}

// D without a softcap's factor, a onehot + e (of_exp + of_exp_t t): onehot - p, or the gradient of a logp + b
// lse + c entropy.
struct GradCoeffs {
  float a, b, c;
  float of_exp, of_exp_t;
};

FASTDPO_INLINE GradCoeffs make_grad_coeffs(float a, float b, float c, const RowLogs& logs) {
  // p (b - a - c (log p + entropy)), with log p = t ln 2 - log_sum.
  const float of_p = b - a - c * (logs.entropy - logs.log_sum);
  return {a, b, c, of_p * logs.inverse_sum, -c * kLn2 * logs.inverse_sum};
}

template <bool kStats>
FASTDPO_INLINE float grad_of_column(float u, float top, float gain_log2, const GradCoeffs& coeffs) {
  const float t = exponent(u, top, gain_log2);
  return exp2_fast(t) * (kStats ? fmaf(fmaxf(t, kFloor), coeffs.of_exp_t, coeffs.of_exp) : coeffs.of_exp);
}

// What a softcap makes of a gradient.
FASTDPO_INLINE float cap_factor(float u) { return fmaf(-u, u, 1.0f); }

// The label's entry, factor included. 1 - p is the sum of the other probabilities: where p is nearly 1, or
// rounds to it, that has all its digits.
FASTDPO_INLINE float grad_of_label(float u, const RowLogs& logs, const Transform& transform, const GradCoeffs& coeffs) {
  const float log_p = log_prob(u, logs, transform.gain);
  const float p = expf(log_p);
  const float grad = coeffs.a * logs.others + p * (coeffs.b - coeffs.c * (fmaxf(log_p, kFloor) + logs.entropy));
  return transform.is_capped ? grad * cap_factor(u) : grad;
}

}  // namespace fastdpo
