// The operations on device memory. All of them are limited by memory bandwidth: they use 16-byte accesses, several
// loads in flight per thread, and no index arithmetic for single elements.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "formulas.h"
#include "kernels.h"

namespace pipeline {
namespace gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;      // vectors of each input that a thread loads before it computes
constexpr int kBlocksPerSm = 4;   // of the gradient kernel: enough loads in flight, and few partial sums
constexpr int64_t kMaxGridY = 65535;

// `width` elements that are loaded and stored at once: 16 bytes if the pointers are aligned, otherwise single elements.
// Two 16-bit elements share a register, so that a vector stays in the registers it was loaded into until it is used.
template <typename T, int width>
struct alignas(sizeof(T) * width) Vector {
  T element[width];
};
template <>
struct alignas(16) Vector<__half, 8> {
  uint32_t pair[4];
};
template <>
struct alignas(16) Vector<__nv_bfloat16, 8> {
  uint32_t pair[4];
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float2 widen(__half, uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
__device__ __forceinline__ float2 widen(__nv_bfloat16, uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float value) {
  return __float2bfloat16_rn(value);
}
__device__ __forceinline__ uint32_t narrow(__half, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t narrow(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T, int width>
__device__ __forceinline__ void widen(const Vector<T, width>& vector, float (&values)[width]) {
  if constexpr (sizeof(T) == 2 && width > 1) {
#pragma unroll
    for (int i = 0; i < width / 2; ++i) {
      const float2 pair = widen(T(), vector.pair[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = widen(vector.element[i]);
  }
}

template <typename T, int width>
__device__ __forceinline__ void narrow(const float (&values)[width], Vector<T, width>& vector) {
  if constexpr (sizeof(T) == 2 && width > 1) {
#pragma unroll
    for (int i = 0; i < width / 2; ++i) vector.pair[i] = narrow(T(), values[2 * i], values[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < width; ++i) vector.element[i] = narrow<T>(values[i]);
  }
}

// Elements [first, first + width) of `count`; elements beyond the end are 0 when loaded and are not stored. Pairs of
// 16-bit elements are unpacked where they are used: if they were unpacked here, the compiler would do it in the branch,
// wait there for the memory, and load one vector after the other.
template <typename T, int width>
__device__ __forceinline__ Vector<T, width> load(const T* source, int64_t first, int64_t count) {
  Vector<T, width> vector;
  if (first + width <= count) {
    vector = *reinterpret_cast<const Vector<T, width>*>(source + first);
  } else {
    float values[width];
#pragma unroll
    for (int i = 0; i < width; ++i) values[i] = first + i < count ? widen(source[first + i]) : 0.0f;
    narrow<T, width>(values, vector);  // exact
  }
  return vector;
}

template <typename T, int width>
__device__ __forceinline__ void store(T* target, int64_t first, int64_t count, const float (&values)[width]) {
  if (first + width <= count) {
    Vector<T, width> vector;
    narrow<T, width>(values, vector);
    *reinterpret_cast<Vector<T, width>*>(target + first) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    if (first + i < count) target[first + i] = narrow<T>(values[i]);
  }
}

// Forward: y = leaky_relu(x), dy is not used. Backward: dx = dy * slope(x). The output may overwrite x or dy.
template <typename T, int width, bool backward>
__global__ void __launch_bounds__(kThreads) leaky_relu_kernel(const T* dy, const T* x, T* output, int64_t count,
                                                              float alpha) {
  constexpr int64_t kBlock = int64_t{kThreads} * kInFlight * width;
  for (int64_t block = blockIdx.x * kBlock; block < count; block += gridDim.x * kBlock) {
    const int64_t first = block + int64_t{threadIdx.x} * width;
    Vector<T, width> features[kInFlight], gradients[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      features[k] = load<T, width>(x, first + k * kThreads * width, count);
      if constexpr (backward) gradients[k] = load<T, width>(dy, first + k * kThreads * width, count);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      float values[width], along[width];
      widen<T, width>(features[k], values);
      if constexpr (backward) widen<T, width>(gradients[k], along);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if constexpr (backward) {
          values[i] = leaky_relu_slope(along[i], values[i], alpha);
        } else {
          values[i] = leaky_relu_of(values[i], alpha);
        }
      }
      store<T, width>(output, first + k * kThreads * width, count, values);
    }
  }
}

// The order in which threads process a matrix with one bias per column. A period is a sequence of whole vectors and
// whole rows: one row if its length is a multiple of the vector's, otherwise `width` rows. Vector
// number `slot` of every period covers the same columns. A thread always processes the same slot, so its biases and the
// sums of their gradients stay in registers, and no index division is needed.
struct Walk {
  int64_t count, columns;
  int64_t slots;    // vectors in a period
  int64_t periods;  // the last one may be short
  dim3 block, grid; // x: slots, y: periods
  int64_t group;    // rows in a period
};

Walk walk_of(Matrix matrix, int width, bool backward) {
  Walk walk;
  walk.count = matrix.count;
  walk.columns = matrix.columns;
  walk.group = matrix.columns % width == 0 ? 1 : width;
  walk.slots = matrix.columns * walk.group / width;
  walk.periods = (matrix.count + walk.slots * width - 1) / (walk.slots * width);
  const int64_t tiles = (walk.slots + kThreads - 1) / kThreads;
  const int64_t lanes = (walk.slots + tiles - 1) / tiles;  // equal for all tiles, so that none is nearly empty
  const int64_t rows = std::min<int64_t>(kThreads / lanes, walk.periods);
  const int64_t in_flight = backward ? kInFlight / 2 : kInFlight;
  int64_t blocks = std::min((walk.periods + rows * in_flight - 1) / (rows * in_flight), kMaxGridY);
  if (backward) {
    int device = 0, multiprocessors = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    blocks = std::min(blocks, std::max<int64_t>(1, multiprocessors * kBlocksPerSm / tiles));
  }
  walk.block = dim3(lanes, rows);
  walk.grid = dim3(tiles, blocks);
  return walk;
}

template <typename T, int width>
__device__ __forceinline__ void load_bias(const T* bias, const Walk& walk, int64_t slot, float (&values)[width]) {
  if (walk.group == 1) {
    widen<T, width>(reinterpret_cast<const Vector<T, width>*>(bias)[slot], values);
    return;
  }
  int64_t column = slot * width % walk.columns;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    values[i] = widen(bias[column]);
    if (++column == walk.columns) column = 0;
  }
}

template <typename T, int width, bool approximate>
__global__ void __launch_bounds__(kThreads) bias_gelu_kernel(const T* x, const T* bias, T* y, Walk walk) {
  const int64_t slot = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (slot >= walk.slots) return;
  float biases[width];
  load_bias<T, width>(bias, walk, slot, biases);
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t period = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; period < walk.periods;
       period += kInFlight * stride) {
    const int64_t first = (period * walk.slots + slot) * width, step = stride * walk.slots * width;
    Vector<T, width> features[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) features[k] = load<T, width>(x, first + k * step, walk.count);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      float values[width];
      widen<T, width>(features[k], values);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = Gelu<approximate>::value(values[i] + biases[i]);
      store<T, width>(y, first + k * step, walk.count, values);
    }
  }
}

// dx, and the block's sums of dx: sums [gridDim.y, slots * width], which is [gridDim.y * group, columns].
template <typename T, int width, bool approximate>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    bias_gelu_grad_kernel(const T* dy, const T* x, const T* bias, T* dx, float* sums, Walk walk) {
  constexpr int kPairs = kInFlight / 2;
  __shared__ float shared[kThreads * width];
  const int64_t slot = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  float totals[width] = {};
  if (slot < walk.slots) {
    float biases[width];
    load_bias<T, width>(bias, walk, slot, biases);
    const int64_t stride = int64_t{gridDim.y} * blockDim.y;
    for (int64_t period = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; period < walk.periods;
         period += kPairs * stride) {
      const int64_t first = (period * walk.slots + slot) * width, step = stride * walk.slots * width;
      Vector<T, width> features[kPairs], gradients[kPairs];
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        features[k] = load<T, width>(x, first + k * step, walk.count);
        gradients[k] = load<T, width>(dy, first + k * step, walk.count);  // 0 beyond the end
      }
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        float values[width], along[width];
        widen<T, width>(features[k], values);
        widen<T, width>(gradients[k], along);
#pragma unroll
        for (int i = 0; i < width; ++i) {
          values[i] = along[i] * Gelu<approximate>::slope(values[i] + biases[i]);
          totals[i] += values[i];
        }
        store<T, width>(dx, first + k * step, walk.count, values);
      }
    }
  }
  const int lanes = blockDim.x * width;
#pragma unroll
  for (int i = 0; i < width; ++i) shared[threadIdx.y * lanes + threadIdx.x * width + i] = totals[i];
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * lanes;
  for (int lane = threadIdx.y * blockDim.x + threadIdx.x; lane < lanes; lane += blockDim.x * blockDim.y) {
    if (begin + lane >= walk.slots * width) continue;
    float total = 0.0f;
    for (int row = 0; row < blockDim.y; ++row) total += shared[row * lanes + lane];
    sums[blockIdx.y * walk.slots * width + begin + lane] = total;
  }
}

// dbias[c] = sum over the rows of sums [rows, columns], in a fixed order; blockDim.x columns per block.
template <typename T>
__global__ void __launch_bounds__(1024) reduce_kernel(const float* sums, T* dbias, int64_t rows, int64_t columns) {
  __shared__ float shared[1024];
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  float total = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += blockDim.y) total += sums[row * columns + column];
  }
  shared[threadIdx.y * blockDim.x + threadIdx.x] = total;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      shared[threadIdx.y * blockDim.x + threadIdx.x] += shared[(threadIdx.y + half) * blockDim.x + threadIdx.x];
    }
  }
  if (threadIdx.y == 0 && column < columns) dbias[column] = narrow<T>(shared[threadIdx.x]);
}

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <typename T>
struct Storage {
  using Element = T;
  static constexpr int kWidth = 16 / sizeof(T);
};

template <typename Function>
void with_type(Type type, Function function) {
  switch (type) {
    case Type::kFloat32:
      return function(Storage<float>());
    case Type::kFloat16:
      return function(Storage<__half>());
    case Type::kBfloat16:
      return function(Storage<__nv_bfloat16>());
  }
}

template <bool backward>
const char* leaky_relu_of_either(void* stream, Type type, const void* dy, const void* x, void* output, int64_t count,
                                 float alpha) {
  with_type(type, [=](auto storage) {
    using T = typename decltype(storage)::Element;
    constexpr int kWidth = decltype(storage)::kWidth;
    const bool wide = aligned(dy, x, output);
    const int64_t block = int64_t{kThreads} * kInFlight * (wide ? kWidth : 1);
    const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + block - 1) / block, 1 << 30));
    const auto kernel = wide ? leaky_relu_kernel<T, kWidth, backward> : leaky_relu_kernel<T, 1, backward>;
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(output), count, alpha);
  });
  return outcome();
}

// Number of float sums of a walk. Whether vectors or single elements are used depends on the alignment of pointers that
// are not known when the workspace is allocated, so it has the larger of both sizes.
int64_t sums_of(const Walk& walk) { return walk.grid.y * walk.group * walk.columns; }

}  // namespace

const char* leaky_relu(void* stream, Type type, const void* x, void* y, int64_t count, float alpha) {
  return leaky_relu_of_either<false>(stream, type, nullptr, x, y, count, alpha);
}

const char* leaky_relu_grad(void* stream, Type type, const void* dy, const void* x, void* dx, int64_t count,
                            float alpha) {
  return leaky_relu_of_either<true>(stream, type, dy, x, dx, count, alpha);
}

const char* bias_gelu(void* stream, Type type, bool approximate, const void* x, const void* bias, void* y,
                      Matrix matrix) {
  with_type(type, [=](auto storage) {
    using T = typename decltype(storage)::Element;
    constexpr int kWidth = decltype(storage)::kWidth;
    const bool wide = aligned(x, bias, y);
    const Walk walk = walk_of(matrix, wide ? kWidth : 1, false);
    const auto kernel = wide ? (approximate ? bias_gelu_kernel<T, kWidth, true> : bias_gelu_kernel<T, kWidth, false>)
                             : (approximate ? bias_gelu_kernel<T, 1, true> : bias_gelu_kernel<T, 1, false>);
    kernel<<<walk.grid, walk.block, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), walk);
  });
  return outcome();
}

int64_t bias_gelu_grad_workspace(Type type, Matrix matrix) {
  if (matrix.count == 0) return 0;
  int64_t size = 0;
  with_type(type, [&](auto storage) {
    constexpr int kWidth = decltype(storage)::kWidth;
    size = std::max(sums_of(walk_of(matrix, kWidth, true)), sums_of(walk_of(matrix, 1, true)));
  });
  return size;
}

const char* bias_gelu_grad(void* stream, Type type, bool approximate, const void* dy, const void* x, const void* bias,
                           void* dx, void* dbias, float* workspace, Matrix matrix) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (matrix.count == 0) {  // the sum of no rows is 0
    cudaMemsetAsync(dbias, 0, matrix.columns * (type == Type::kFloat32 ? 4 : 2), queue);
    return outcome();
  }
  with_type(type, [=](auto storage) {
    using T = typename decltype(storage)::Element;
    constexpr int kWidth = decltype(storage)::kWidth;
    const bool wide = aligned(dy, x, bias, dx);
    const Walk walk = walk_of(matrix, wide ? kWidth : 1, true);
    const auto kernel =
        wide ? (approximate ? bias_gelu_grad_kernel<T, kWidth, true> : bias_gelu_grad_kernel<T, kWidth, false>)
             : (approximate ? bias_gelu_grad_kernel<T, 1, true> : bias_gelu_grad_kernel<T, 1, false>);
    kernel<<<walk.grid, walk.block, 0, queue>>>(static_cast<const T*>(dy), static_cast<const T*>(x),
                                                static_cast<const T*>(bias), static_cast<T*>(dx), workspace, walk);
    unsigned lanes = 1;
    while (lanes < 32 && lanes < matrix.columns) lanes *= 2;
    const auto blocks = static_cast<unsigned>((matrix.columns + lanes - 1) / lanes);
    reduce_kernel<T><<<blocks, dim3(lanes, 1024 / lanes), 0, queue>>>(workspace, static_cast<T*>(dbias),
                                                                      walk.grid.y * walk.group, matrix.columns);
  });
  return outcome();
}

}  // namespace gpu
}  // namespace pipeline
