// What the CPU kernels' walks over a row are made of: exp, log and tanh that the compiler vectorises, 16-bit stores,
// sums in lanes.
//
// Every function here is inlined into the one that processes a row, because only that one is compiled once per
// instruction set (OpenMP's outlined bodies are not).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common.h"

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

namespace fastdpo {

// The bytes of a row are logits first and D later, of another type.
using f32 = float __attribute__((may_alias));
using u16 = uint16_t __attribute__((may_alias));

constexpr int kLanes = 32;
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

// x <= 0 as n ln 2 + r, |r| <= ln(2) / 2: exp(x) = 2^n (1 + r + r^2 tail).
struct Reduced {
  float r;
  float tail;
  float power;  // 2^n; 2^-127 comes out as 0
};

INLINE Reduced reduce_exponent(float x) {
  constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const float y = x < kLowest ? kLowest : x;
  const float shifted = y * 1.44269504f + round_magic;
  const float n = shifted - round_magic;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // y - n ln 2, ln 2 in two parts
  float tail = 1.381454018e-3f;                                 // minimax on |r| <= ln(2) / 2
  tail = tail * r + 8.368745109e-3f;
  tail = tail * r + 4.166839078e-2f;
  tail = tail * r + 1.66665204e-1f;
  tail = tail * r + 4.999999344e-1f;
  return {r, tail, bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23)};
}

INLINE float exp_of(const Reduced& x) { return (x.tail * (x.r * x.r) + (x.r + 1.0f)) * x.power; }

// exp(x) - 1 to a few ulp, near 0 too; 0 gives exactly 0.
INLINE float expm1_of(const Reduced& x) { return (x.tail * (x.r * x.r) + x.r) * x.power + (x.power - 1.0f); }

// exp(x) for x <= 0 within 2 ulp down to kLowest, 0 below; NaN stays NaN; exp(0) is exactly 1.
INLINE float exp_f32(float x) { return exp_of(reduce_exponent(x)); }

// log(1 + x) for -1 < x <= 0 to a few ulp, near 0 too; NaN stays NaN; 0 gives exactly 0.
INLINE float log1p_f32(float x) {
  const float u = 1.0f + x;
  const float lost = x - (u - 1.0f);  // what 1 has swallowed of x; of use where u is near 1
  constexpr uint32_t half_root = 0x3f3504f3u;  // sqrt(1/2)
  const uint32_t bits = bit_cast<uint32_t>(u) - half_root;
  const float n = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = bit_cast<float>((bits & 0x7fffffu) + half_root) - 1.0f;  // u = 2^n (1 + f), 1 + f around 1
  float tail = -7.634492964e-2f;  // minimax on sqrt(1/2) <= 1 + f <= sqrt(2), relative to log(1 + f)
  tail = tail * f + 1.276157498e-1f;
  tail = tail * f - 1.316018254e-1f;
  tail = tail * f + 1.420175880e-1f;
  tail = tail * f - 1.662335694e-1f;
  tail = tail * f + 2.000122666e-1f;
  tail = tail * f - 2.500081956e-1f;
  tail = tail * f + 3.333333135e-1f;
  const float square = f * f;
  const float correction = lost - lost * x - n * 2.12194440e-4f;  // lost / u, and the rest of ln 2
  return n * 0.693359375f + (f + (square * (tail * f - 0.5f) + correction));
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

// v = (v + bias) * factor over a block; no bias: null.
INLINE void scale_block(float* v, const float* bias, float factor, int size) {
  if (bias) {
    for (int i = 0; i < size; ++i) v[i] = (v[i] + bias[i]) * factor;
  } else {
    for (int i = 0; i < size; ++i) v[i] *= factor;
  }
}

// Stores `size` values from element `start` of a row of D on.
INLINE void store_d(void* row, DType dtype, int64_t start, const float* values, int size) {
  if (dtype == DType::f32) {
    f32* out = static_cast<f32*>(row) + start;
    for (int i = 0; i < size; ++i) out[i] = values[i];
    return;
  }
  u16* out = static_cast<u16*>(row) + start;
  if (dtype == DType::bf16) {
    for (int i = 0; i < size; ++i) out[i] = to_bf16(values[i]);
  } else {
    for (int i = 0; i < size; ++i) out[i] = to_f16(values[i]);
  }
}

INLINE int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Whole lanes of `size` values; what is behind those is the caller's to fill.
INLINE int padded_size(int size) { return (size + kLanes - 1) / kLanes * kLanes; }

INLINE float padded_max(const float* values, int padded) {
  float lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = -kInf;
  for (int i = 0; i < padded; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

template <class T>
INLINE double total(const T (&lanes)[kLanes]) {
  double sum = 0.0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// The sum of the first `size` values but for one: a loop of its own for the block that has a row's label.
INLINE double sum_without(const float* values, int64_t left_out, int size) {
  double sum = 0.0;
  for (int i = 0; i < size; ++i) sum += i == left_out ? 0.0f : values[i];
  return sum;
}

}  // namespace fastdpo
