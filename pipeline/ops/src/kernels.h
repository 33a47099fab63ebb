// The functions of cpu.cc and gpu.cu that operations.cc calls. These two files do not include TensorFlow, so that they
// compile in seconds and with any flags.
#pragma once

#include <cstdint>

namespace pipeline {

enum class Type { kFloat32, kFloat16, kBfloat16 };

// A contiguous tensor as a matrix with `columns` columns, one for each bias.
// `count` = rows * columns; both are greater than 0.
struct Matrix {
  int64_t count;
  int64_t columns;
};

namespace cpu {

// Each function processes the units [first, last) of its work, which is divided among TensorFlow's threads. A unit has
// at most `kUnit` elements.
constexpr int64_t kUnit = 1024;

void leaky_relu(Type type, const void* x, void* y, int64_t count, float alpha, int64_t first, int64_t last);
void leaky_relu_grad(Type type, const void* dy, const void* x, void* dx, int64_t count, float alpha, int64_t first,
                     int64_t last);

// The order in which bias_gelu processes a matrix. Short rows are joined into one period, so that the inner loops are
// long; a period is divided into tiles, and consecutive periods form a block, whose bias gradient is summed by one
// thread. The order depends only on the shape and not on the number of threads, so the sums are reproducible.
struct Walk {
  explicit Walk(Matrix matrix);
  int64_t count, columns;
  int64_t period;  // a multiple of `columns`
  int64_t periods, tiles, blocks, periods_a_block;
};

// `bias` is float32 [period], from `expand_bias`.
void expand_bias(Type type, const void* bias, const Walk& walk, float* expanded);
// Units: walk.periods * walk.tiles.
void bias_gelu(Type type, bool approximate, const void* x, const float* bias, void* y, const Walk& walk, int64_t first,
               int64_t last);
// Units: walk.blocks * walk.tiles. Writes dx, and the sums of dx into `sums`, float64 [blocks, period].
void bias_gelu_grad(Type type, bool approximate, const void* dy, const void* x, const float* bias, void* dx,
                    double* sums, const Walk& walk, int64_t first, int64_t last);
// Units: walk.columns.
void reduce_bias(Type type, const double* sums, void* dbias, const Walk& walk, int64_t first, int64_t last);

}  // namespace cpu

namespace gpu {

// All pointers are device memory; the kernels are queued on `stream` (a CUstream). Each function returns nullptr, or
// CUDA's error message.
const char* leaky_relu(void* stream, Type type, const void* x, void* y, int64_t count, float alpha);
const char* leaky_relu_grad(void* stream, Type type, const void* dy, const void* x, void* dx, int64_t count,
                            float alpha);
const char* bias_gelu(void* stream, Type type, bool approximate, const void* x, const void* bias, void* y,
                      Matrix matrix);
// Number of float32 values that bias_gelu_grad needs as `workspace`.
int64_t bias_gelu_grad_workspace(Type type, Matrix matrix);
const char* bias_gelu_grad(void* stream, Type type, bool approximate, const void* dy, const void* x, const void* bias,
                           void* dx, void* dbias, float* workspace, Matrix matrix);

}  // namespace gpu
}  // namespace pipeline
