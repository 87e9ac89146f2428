// Groups of eight columns: from memory to fp32 registers and back.
#pragma once

#include "row_math.cuh"

namespace fastdpo {

struct Bf16 {
  uint16_t bits;
};

FASTDPO_DEVICE float to_float(float x) { return x; }
FASTDPO_DEVICE float to_float(Bf16 x) { return gpu::from_bits(uint32_t{x.bits} << 16); }

FASTDPO_DEVICE float raw(float x) { return x; }
FASTDPO_DEVICE uint16_t raw(Bf16 x) { return x.bits; }

FASTDPO_DEVICE void unpack(uint4 low, uint4 high, float* x) {
  const uint32_t words[kGroup] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] = gpu::from_bits(words[i]);
}

FASTDPO_DEVICE void unpack_bf16(uint4 packed, float* x) {
  const uint32_t words[kGroup / 2] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    x[2 * i] = gpu::from_bits(words[i] << 16);
    x[2 * i + 1] = gpu::from_bits(words[i] & 0xffff0000u);
  }
}

FASTDPO_DEVICE uint4 bits_of(const float* x) {
  return {gpu::to_bits(x[0]), gpu::to_bits(x[1]), gpu::to_bits(x[2]), gpu::to_bits(x[3])};
}

FASTDPO_DEVICE uint32_t pack(float low, float high, bool is_bf16) {
  return is_bf16 ? gpu::pack_bf16(low, high) : gpu::pack_f16(low, high);
}

// The first `count` columns of a group, zeros after them; nothing beyond them is read.
template <class T>
FASTDPO_DEVICE void load_group(const T* from, bool is_aligned, int count, float* x) {
  if (is_aligned && count >= kGroup) {
    if constexpr (sizeof(T) == 4) {
      unpack(gpu::load16_global(from), gpu::load16_global(from + 4), x);
    } else {
      unpack_bf16(gpu::load16_global(from), x);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

FASTDPO_DEVICE void store_group(float* to, bool is_whole, int count, const float* d) {
  if (is_whole) {
    gpu::store16_global(to, bits_of(d));
    gpu::store16_global(to + 4, bits_of(d + 4));
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) to[i] = d[i];
    }
  }
}

FASTDPO_DEVICE void store_group(uint16_t* to, bool is_whole, int count, bool is_bf16, const float* d) {
  const uint32_t words[] = {pack(d[0], d[1], is_bf16), pack(d[2], d[3], is_bf16), pack(d[4], d[5], is_bf16),
                            pack(d[6], d[7], is_bf16)};
  if (is_whole) {
    gpu::store16_global(to, {words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) to[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

}  // namespace fastdpo
