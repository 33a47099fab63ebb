// The operations on host memory. float16 and bfloat16 are converted to float32 in pieces that fit in the L1 cache; the
// arithmetic is a plain loop that the compiler vectorises.
#include <algorithm>
#include <type_traits>

#include "formulas.h"
#include "kernels.h"

namespace pipeline {
namespace cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(Bfloat16 value) { return float_of(uint32_t{value.bits} << 16); }

inline float widen(Half value) {
  const uint32_t shifted = (value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const float normal = float_of(shifted + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u));
  // A subnormal is an integer times 2^-24. No intermediate float32 is subnormal: the processor may flush those to 0.
  const float subnormal = float_of(shifted + 0x38800000u) - float_of(0x38800000u);
  const float magnitude = exponent == 0 ? subnormal : normal;
  return float_of(bits_of(magnitude) | (uint32_t{value.bits} & 0x8000u) << 16);
}

template <typename T>
T narrow(float value);

template <>
inline float narrow(float value) {
  return value;
}

template <>
inline Bfloat16 narrow(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  const uint32_t nan = bits >> 16 | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
inline Half narrow(float value) {
  const uint32_t sign = bits_of(value) & 0x80000000u;
  const uint32_t bits = bits_of(value) ^ sign;
  const uint32_t normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;  // to nearest, ties to even
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000u;  // 0.5's last bit is 2^-24
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = bits >= 0x47800000u ? special : (bits < 0x38800000u ? subnormal : normal);
  return {static_cast<uint16_t>(magnitude | sign >> 16)};
}

template <typename T>
void widen_all(const T* source, float* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = widen(source[i]);
}

template <typename T>
void narrow_all(const float* source, T* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = narrow<T>(source[i]);
}

// Calls function(T*) with a null pointer of the storage type.
template <typename Function>
void with_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat32:
      return function(static_cast<float*>(nullptr));
    case Type::kFloat16:
      return function(static_cast<Half*>(nullptr));
    case Type::kBfloat16:
      return function(static_cast<Bfloat16*>(nullptr));
  }
}

template <typename T, bool approximate>
void gelu_unit(const T* x, const float* bias, T* y, int64_t count) {
  float values[kUnit];
  widen_all(x, values, count);
  for (int64_t i = 0; i < count; ++i) values[i] = Gelu<approximate>::value(values[i] + bias[i]);
  narrow_all(values, y, count);
}

template <typename T, bool approximate>
void gelu_grad_unit(const T* dy, const T* x, const float* bias, T* dx, float* sums, int64_t count) {
  float values[kUnit], gradients[kUnit];
  widen_all(x, values, count);
  widen_all(dy, gradients, count);
  for (int64_t i = 0; i < count; ++i) gradients[i] *= Gelu<approximate>::slope(values[i] + bias[i]);
  for (int64_t i = 0; i < count; ++i) sums[i] += gradients[i];
  narrow_all(gradients, dx, count);
}

// The elements of one tile in one period; empty for tiles of the last period that are beyond the end.
struct Range {
  int64_t begin, size;
  Range(const Walk& walk, int64_t period, int64_t tile) : begin(period * walk.period + tile * kUnit) {
    size = std::max<int64_t>(0, std::min({kUnit, walk.period - tile * kUnit, walk.count - begin}));
  }
};

}  // namespace

void leaky_relu(Type type, const void* x, void* y, int64_t count, float alpha, int64_t first, int64_t last) {
  with_type(type, [=](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    float values[kUnit];
    for (int64_t begin = first * kUnit; begin < std::min(last * kUnit, count); begin += kUnit) {
      const int64_t size = std::min(kUnit, count - begin);
      widen_all(static_cast<const T*>(x) + begin, values, size);
      for (int64_t i = 0; i < size; ++i) values[i] = leaky_relu_of(values[i], alpha);
      narrow_all(values, static_cast<T*>(y) + begin, size);
    }
  });
}

void leaky_relu_grad(Type type, const void* dy, const void* x, void* dx, int64_t count, float alpha, int64_t first,
                     int64_t last) {
  with_type(type, [=](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    float values[kUnit], gradients[kUnit];
    for (int64_t begin = first * kUnit; begin < std::min(last * kUnit, count); begin += kUnit) {
      const int64_t size = std::min(kUnit, count - begin);
      widen_all(static_cast<const T*>(x) + begin, values, size);
      widen_all(static_cast<const T*>(dy) + begin, gradients, size);
      for (int64_t i = 0; i < size; ++i) gradients[i] = leaky_relu_slope(gradients[i], values[i], alpha);
      narrow_all(gradients, static_cast<T*>(dx) + begin, size);
    }
  });
}

Walk::Walk(Matrix matrix) : count(matrix.count), columns(matrix.columns) {
  const int64_t wanted = (kUnit / 2 + columns - 1) / columns;
  period = columns * std::min(wanted, count / columns);
  periods = (count + period - 1) / period;
  tiles = (period + kUnit - 1) / kUnit;
  // At most 64 blocks: enough for all threads, with little memory for the sums.
  periods_a_block = std::max<int64_t>(16, (periods + 63) / 64);
  blocks = (periods + periods_a_block - 1) / periods_a_block;
}

void expand_bias(Type type, const void* bias, const Walk& walk, float* expanded) {
  with_type(type, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    widen_all(static_cast<const T*>(bias), expanded, walk.columns);
  });
  for (int64_t begin = walk.columns; begin < walk.period; begin += walk.columns) {
    std::copy(expanded, expanded + walk.columns, expanded + begin);
  }
}

void bias_gelu(Type type, bool approximate, const void* x, const float* bias, void* y, const Walk& walk, int64_t first,
               int64_t last) {
  with_type(type, [=, &walk](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    const auto one_unit = approximate ? gelu_unit<T, true> : gelu_unit<T, false>;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t tile = unit % walk.tiles;
      const Range range(walk, unit / walk.tiles, tile);
      one_unit(static_cast<const T*>(x) + range.begin, bias + tile * kUnit, static_cast<T*>(y) + range.begin,
               range.size);
    }
  });
}

void bias_gelu_grad(Type type, bool approximate, const void* dy, const void* x, const float* bias, void* dx,
                    double* sums, const Walk& walk, int64_t first, int64_t last) {
  with_type(type, [=, &walk](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    const auto one_unit = approximate ? gelu_grad_unit<T, true> : gelu_grad_unit<T, false>;
    constexpr int64_t kSingle = 16;  // periods summed in float32, then added to the float64 total
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t tile = unit % walk.tiles, block = unit / walk.tiles;
      const int64_t size = std::min(kUnit, walk.period - tile * kUnit);
      double* const total = sums + block * walk.period + tile * kUnit;
      std::fill(total, total + size, 0.0);
      const int64_t end = std::min((block + 1) * walk.periods_a_block, walk.periods);
      for (int64_t begin = block * walk.periods_a_block; begin < end; begin += kSingle) {
        float partial[kUnit] = {};
        for (int64_t period = begin; period < std::min(begin + kSingle, end); ++period) {
          const Range range(walk, period, tile);
          one_unit(static_cast<const T*>(dy) + range.begin, static_cast<const T*>(x) + range.begin,
                   bias + tile * kUnit, static_cast<T*>(dx) + range.begin, partial, range.size);
        }
        for (int64_t i = 0; i < size; ++i) total[i] += partial[i];
      }
    }
  });
}

void reduce_bias(Type type, const double* sums, void* dbias, const Walk& walk, int64_t first, int64_t last) {
  with_type(type, [=, &walk](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    for (int64_t column = first; column < last; ++column) {
      double total = 0.0;
      for (int64_t i = column; i < walk.blocks * walk.period; i += walk.columns) total += sums[i];
      static_cast<T*>(dbias)[column] = narrow<T>(static_cast<float>(total));
    }
  });
}

}  // namespace cpu
}  // namespace pipeline
