// The TensorFlow interface: names, attributes and shapes of the operations, and allocation of their outputs.
#include <cstring>
#include <vector>

#include "kernels.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/util/work_sharder.h"
#ifdef PIPELINE_WITH_CUDA
#include "xla/stream_executor/stream.h"
#endif

namespace pipeline {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::errors::InvalidArgument;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

tensorflow::Status same_shapes(InferenceContext* c) {
  ShapeHandle merged;
  TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->input(1), &merged));
  c->set_output(0, merged);
  return tensorflow::OkStatus();
}

// Output 0 has the shape of input `features`, whose last dimension must have the length of input `bias`.
tensorflow::Status biased_shape(InferenceContext* c, int features, int bias) {
  ShapeHandle shape = c->input(features), vector;
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(shape, 1, &shape));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(bias), 1, &vector));
  if (c->RankKnown(shape)) {
    tensorflow::shape_inference::DimensionHandle last;
    TF_RETURN_IF_ERROR(c->Merge(c->Dim(shape, -1), c->Dim(vector, 0), &last));
    TF_RETURN_IF_ERROR(c->ReplaceDim(shape, -1, last, &shape));
  }
  c->set_output(0, shape);
  return tensorflow::OkStatus();
}

REGISTER_OP("PipelineLeakyRelu")
    .Input("features: T")
    .Output("activations: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("alpha: float")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->input(0));
      return tensorflow::OkStatus();
    });

REGISTER_OP("PipelineLeakyReluGrad")
    .Input("gradients: T")
    .Input("features: T")
    .Output("backprops: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("alpha: float")
    .SetShapeFn(same_shapes);

REGISTER_OP("PipelineBiasGelu")
    .Input("features: T")
    .Input("bias: T")
    .Output("activations: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("approximate: bool")
    .SetShapeFn([](InferenceContext* c) { return biased_shape(c, 0, 1); });

REGISTER_OP("PipelineBiasGeluGrad")
    .Input("gradients: T")
    .Input("features: T")
    .Input("bias: T")
    .Output("backprops: T")
    .Output("bias_backprops: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("approximate: bool")
    .SetShapeFn([](InferenceContext* c) {
      TF_RETURN_IF_ERROR(biased_shape(c, 1, 2));
      ShapeHandle merged;
      TF_RETURN_IF_ERROR(c->Merge(c->input(0), c->output(0), &merged));
      c->set_output(0, merged);
      c->set_output(1, c->input(2));
      return tensorflow::OkStatus();
    });

Type type_of(const Tensor& tensor) {
  switch (tensor.dtype()) {
    case tensorflow::DT_HALF:
      return Type::kFloat16;
    case tensorflow::DT_BFLOAT16:
      return Type::kBfloat16;
    default:
      return Type::kFloat32;
  }
}

void* data_of(const Tensor& tensor) { return const_cast<char*>(tensor.tensor_data().data()); }

#ifdef PIPELINE_WITH_CUDA
void* stream_of(OpKernelContext* context) {
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

void report(OpKernelContext* context, const char* failure) {
  OP_REQUIRES(context, failure == nullptr, tensorflow::errors::Internal("CUDA in ", context->op_kernel().name(), ": ",
                                                                        failure));
}
#endif

// Divides `units` of work among TensorFlow's threads; `cycles` is the estimated cost of a unit.
template <typename Function>
void share(OpKernelContext* context, int64_t units, int64_t cycles, Function function) {
  const auto& workers = *context->device()->tensorflow_cpu_worker_threads();
  tensorflow::Shard(workers.num_threads, workers.workers, units, cycles, function);
}

constexpr int64_t kLeakyReluCycles = cpu::kUnit / 2;
constexpr int64_t kGeluCycles = cpu::kUnit * 4;

int64_t units_of(int64_t count) { return (count + cpu::kUnit - 1) / cpu::kUnit; }

template <bool on_gpu>
class LeakyRelu : public OpKernel {
 public:
  explicit LeakyRelu(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("alpha", &alpha_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& features = context->input(0);
    Tensor* activations = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, features.shape(), &activations));
    const int64_t count = features.NumElements();
    if (count == 0) return;
    const Type type = type_of(features);
    const void* x = data_of(features);
    void* y = data_of(*activations);
#ifdef PIPELINE_WITH_CUDA
    if (on_gpu) return report(context, gpu::leaky_relu(stream_of(context), type, x, y, count, alpha_));
#endif
    share(context, units_of(count), kLeakyReluCycles, [=, alpha = alpha_](int64_t first, int64_t last) {
      cpu::leaky_relu(type, x, y, count, alpha, first, last);
    });
  }

 private:
  float alpha_;
};

template <bool on_gpu>
class LeakyReluGrad : public OpKernel {
 public:
  explicit LeakyReluGrad(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("alpha", &alpha_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& gradients = context->input(0);
    const Tensor& features = context->input(1);
    OP_REQUIRES(context, gradients.shape() == features.shape(),
                InvalidArgument("gradients and features must have equal shapes, got ", gradients.shape().DebugString(),
                                " and ", features.shape().DebugString()));
    Tensor* backprops = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0, 1}, 0, features.shape(), &backprops));
    const int64_t count = features.NumElements();
    if (count == 0) return;
    const Type type = type_of(features);
    const void *dy = data_of(gradients), *x = data_of(features);
    void* dx = data_of(*backprops);
#ifdef PIPELINE_WITH_CUDA
    if (on_gpu) return report(context, gpu::leaky_relu_grad(stream_of(context), type, dy, x, dx, count, alpha_));
#endif
    share(context, units_of(count), kLeakyReluCycles, [=, alpha = alpha_](int64_t first, int64_t last) {
      cpu::leaky_relu_grad(type, dy, x, dx, count, alpha, first, last);
    });
  }

 private:
  float alpha_;
};

bool fits(OpKernelContext* context, const Tensor& features, const Tensor& bias) {
  const bool fitting = features.dims() >= 1 && bias.dims() == 1 &&
                       features.dim_size(features.dims() - 1) == bias.dim_size(0);
  if (!fitting) {
    context->CtxFailure(InvalidArgument("bias must be a vector as long as the last dimension of features, got ",
                                        bias.shape().DebugString(), " for ", features.shape().DebugString()));
  }
  return fitting;
}

template <bool on_gpu>
class BiasGelu : public OpKernel {
 public:
  explicit BiasGelu(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("approximate", &approximate_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& features = context->input(0);
    const Tensor& bias = context->input(1);
    if (!fits(context, features, bias)) return;
    Tensor* activations = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0}, 0, features.shape(), &activations));
    if (features.NumElements() == 0) return;
    const Type type = type_of(features);
    const Matrix matrix{features.NumElements(), bias.NumElements()};
    const void* x = data_of(features);
    void* y = data_of(*activations);
#ifdef PIPELINE_WITH_CUDA
    if (on_gpu) {
      return report(context, gpu::bias_gelu(stream_of(context), type, approximate_, x, data_of(bias), y, matrix));
    }
#endif
    const cpu::Walk walk(matrix);
    std::vector<float> expanded(walk.period);
    cpu::expand_bias(type, data_of(bias), walk, expanded.data());
    share(context, walk.periods * walk.tiles, kGeluCycles, [&](int64_t first, int64_t last) {
      cpu::bias_gelu(type, approximate_, x, expanded.data(), y, walk, first, last);
    });
  }

 private:
  bool approximate_;
};

template <bool on_gpu>
class BiasGeluGrad : public OpKernel {
 public:
  explicit BiasGeluGrad(OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, context->GetAttr("approximate", &approximate_));
  }

  void Compute(OpKernelContext* context) override {
    const Tensor& gradients = context->input(0);
    const Tensor& features = context->input(1);
    const Tensor& bias = context->input(2);
    if (!fits(context, features, bias)) return;
    OP_REQUIRES(context, gradients.shape() == features.shape(),
                InvalidArgument("gradients and features must have equal shapes, got ", gradients.shape().DebugString(),
                                " and ", features.shape().DebugString()));
    Tensor *backprops = nullptr, *bias_backprops = nullptr;
    OP_REQUIRES_OK(context, context->forward_input_or_allocate_output({0, 1}, 0, features.shape(), &backprops));
    OP_REQUIRES_OK(context, context->allocate_output(1, bias.shape(), &bias_backprops));
    if (bias.NumElements() == 0) return;
    const Type type = type_of(features);
    const Matrix matrix{features.NumElements(), bias.NumElements()};
    const void *dy = data_of(gradients), *x = data_of(features);
    void *dx = data_of(*backprops), *dbias = data_of(*bias_backprops);
#ifdef PIPELINE_WITH_CUDA
    if (on_gpu) {
      Tensor workspace;
      const int64_t size = gpu::bias_gelu_grad_workspace(type, matrix);
      OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_FLOAT, tensorflow::TensorShape({size}), &workspace));
      return report(context,
                    gpu::bias_gelu_grad(stream_of(context), type, approximate_, dy, x, data_of(bias), dx, dbias,
                                        static_cast<float*>(data_of(workspace)), matrix));
    }
#endif
    if (matrix.count == 0) {  // the sum of no rows is 0
      std::memset(dbias, 0, bias_backprops->TotalBytes());
      return;
    }
    const cpu::Walk walk(matrix);
    std::vector<float> expanded(walk.period);
    std::vector<double> sums(walk.blocks * walk.period);
    cpu::expand_bias(type, data_of(bias), walk, expanded.data());
    share(context, walk.blocks * walk.tiles, 2 * kGeluCycles * walk.periods_a_block, [&](int64_t first, int64_t last) {
      cpu::bias_gelu_grad(type, approximate_, dy, x, expanded.data(), dx, sums.data(), walk, first, last);
    });
    share(context, walk.columns, walk.blocks * walk.period / walk.columns, [&](int64_t first, int64_t last) {
      cpu::reduce_bias(type, sums.data(), dbias, walk, first, last);
    });
  }

 private:
  bool approximate_;
};

#define REGISTER_TYPE(type, device, on_gpu)                                                                       \
  REGISTER_KERNEL_BUILDER(Name("PipelineLeakyRelu").Device(device).TypeConstraint<type>("T"), LeakyRelu<on_gpu>); \
  REGISTER_KERNEL_BUILDER(Name("PipelineLeakyReluGrad").Device(device).TypeConstraint<type>("T"),                 \
                          LeakyReluGrad<on_gpu>);                                                                 \
  REGISTER_KERNEL_BUILDER(Name("PipelineBiasGelu").Device(device).TypeConstraint<type>("T"), BiasGelu<on_gpu>);   \
  REGISTER_KERNEL_BUILDER(Name("PipelineBiasGeluGrad").Device(device).TypeConstraint<type>("T"), BiasGeluGrad<on_gpu>)

#define REGISTER_DEVICE(device, on_gpu)            \
  REGISTER_TYPE(float, device, on_gpu);            \
  REGISTER_TYPE(Eigen::half, device, on_gpu);      \
  REGISTER_TYPE(tensorflow::bfloat16, device, on_gpu)

REGISTER_DEVICE(tensorflow::DEVICE_CPU, false);
#ifdef PIPELINE_WITH_CUDA
REGISTER_DEVICE(tensorflow::DEVICE_GPU, true);
#endif

}  // namespace
}  // namespace pipeline
