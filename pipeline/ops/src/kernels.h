// What operations.cc (TensorFlow's side) calls in cpu.cc and gpu.cu. Neither of those two knows TensorFlow, so that the
// arithmetic compiles in seconds and with any flags.
#pragma once

#include <cstdint>

namespace pipeline {

enum class Type { kFloat32, kFloat16, kBfloat16 };

// A contiguous tensor seen as a matrix whose last dimension has `columns` values, one for each bias.
// `count` = rows * columns; both are greater than 0.
struct Matrix {
  int64_t count;
  int64_t columns;
};

namespace cpu {

// Each function does the units [first, last) of its work; TensorFlow's threads share them out. `kUnit` is the number of
// elements in a unit, at most.
constexpr int64_t kUnit = 1024;

void leaky_relu(Type type, const void* x, void* y, int64_t count, float alpha, int64_t first, int64_t last);
void leaky_relu_grad(Type type, const void* dy, const void* x, void* dx, int64_t count, float alpha, int64_t first,
                     int64_t last);

// How bias_gelu walks through a matrix. Narrow rows are joined into one period, so that the inner loops are long; a
// period is cut into tiles, and consecutive periods form a block, whose bias gradient is summed by one thread. It
// depends on the shape alone, never on the number of threads: the sums come out the same on every machine.
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

// All pointers are device memory; the work is queued on `stream` (a CUstream). Each returns nullptr, or CUDA's sentence
// about what went wrong.
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
