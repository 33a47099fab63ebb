// The arithmetic of one element in float32, for CPU and CUDA. It has no branches, so that compilers can vectorise it.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define PIPELINE_INLINE __device__ __forceinline__
#else
#define PIPELINE_INLINE inline __attribute__((always_inline))
#endif

namespace pipeline {

#ifdef __CUDACC__
// One instruction each; their errors of about 1e-7 are similar to the rounding error of float32.
PIPELINE_INLINE float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

PIPELINE_INLINE float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#else
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2^x: the integer part of x becomes the exponent bits; a polynomial of the fraction (interpolated at Chebyshev nodes,
// relative error 3e-9) gives the mantissa. Results below 2^-126 are 0, from 2^128 infinity; NaN stays NaN.
PIPELINE_INLINE float exp2_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float bounded = x < -127.0f ? -127.0f : (x > 128.0f ? 128.0f : x);
  const float shifted = bounded + kRound;
  const float fraction = bounded - (shifted - kRound);
  float power = 0.00015461445f;
  power = power * fraction + 0.00134004282f;
  power = power * fraction + 0.00961805668f;
  power = power * fraction + 0.05550327227f;
  power = power * fraction + 0.24022650922f;
  power = power * fraction + 0.69314720670f;
  power = power * fraction + 1.0f;
  return power * float_of((bits_of(shifted) - bits_of(kRound) + 127u) << 23);
}

PIPELINE_INLINE float reciprocal(float x) { return 1.0f / x; }
#endif

// Maas, Hannun and Ng (2013): x if it is positive, alpha * x otherwise. alpha is the negative slope.
PIPELINE_INLINE float leaky_relu_of(float x, float alpha) { return x > 0.0f ? x : alpha * x; }
PIPELINE_INLINE float leaky_relu_slope(float dy, float x, float alpha) { return x > 0.0f ? dy : alpha * dy; }

// Hendrycks and Gimpel (2016): x * P(X <= x) for a standard normal X, and its derivative. `approximate` is their
// approximation with tanh.
template <bool approximate>
struct Gelu;

template <>
struct Gelu<false> {
  // P(X > |x|) = erfc(z) / 2 with z = |x| / sqrt(2). erfc(z) = exp(-z^2) t Q(t) with t = 1 / (1 + 0.392 z), the form of
  // Hastings (1955); Q is fitted by reweighted least squares that minimise the largest error of erfc, 1.1e-8.
  struct Normal {
    float cdf, density;  // density without its factor 1 / sqrt(2 pi)
  };

  static PIPELINE_INLINE Normal normal(float x) {
    const float density = exp2_of(x * x * -0.72134752f);  // exp(-x^2 / 2)
    const float t = reciprocal(1.0f + 0.27718585823f * (x < 0.0f ? -x : x));
    float tail = -0.11120036812f;
    tail = tail * t + 0.42541942700f;
    tail = tail * t - 0.29028387902f;
    tail = tail * t + 0.30560985616f;
    tail = tail * t + 0.05321375619f;
    tail = tail * t + 0.11724120252f;
    tail = tail * t * density;
    return {x < 0.0f ? tail : 1.0f - tail, density};
  }

  static PIPELINE_INLINE float value(float x) { return x * normal(x).cdf; }

  static PIPELINE_INLINE float slope(float x) {
    const Normal at = normal(x);
    return at.cdf + x * at.density * 0.39894228f;
  }
};

template <>
struct Gelu<true> {
  // P(X <= x) = 0.5 * (1 + tanh(u)) = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) * (x + 0.044715 x^3). Computed from |x|
  // for both signs, so that the exponential is at most 1 and no digits cancel.
  struct Normal {
    float cdf, product;  // product = P(X <= x) * P(X > x)
  };

  static PIPELINE_INLINE Normal normal(float x) {
    constexpr float kLinear = -2.30220818f;  // -2 sqrt(2 / pi) / ln(2)
    const float exponential = exp2_of((x < 0.0f ? -x : x) * (kLinear + kLinear * 0.044715f * x * x));
    const float larger = reciprocal(1.0f + exponential), smaller = exponential * larger;
    return {x < 0.0f ? smaller : larger, smaller * larger};
  }

  static PIPELINE_INLINE float value(float x) { return x * normal(x).cdf; }

  static PIPELINE_INLINE float slope(float x) {
    constexpr float kLinear = 1.59576912f;               // 2 sqrt(2 / pi)
    const float square = x * x < 256.0f ? x * x : 256.0f;  // the product is 0 for larger x; 0 * infinity is NaN
    const Normal at = normal(x);
    return at.cdf + x * at.product * (kLinear + kLinear * 3.0f * 0.044715f * square);
  }
};

}  // namespace pipeline
