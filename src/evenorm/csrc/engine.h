// What the binding and the kernels say to each other: plain data, no torch.
//
// Canonical view of an input: (N, C, L): N samples, C channels, L positions. Two layouts in memory, both dense:
//   planes  element (n, c, l) at (n*C + c)*L + l     a channel is N runs of L elements
//   rows    element (n, c, l) at (n*L + l)*C + c     a channel is a column of a matrix of N*L rows
// Statistics belong to (group, channel); a group is a run of consecutive samples.
#pragma once

#include <cstdint>

namespace evenorm {

constexpr int activation_count = 10;  // evenorm.activations.TABLE

enum class Type : int { float32, float64, bfloat16, float16 };

constexpr int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// C values, or (G, C) values, of any floating type and any strides; absent when data is null.
struct Values {
  const void* data = nullptr;
  Type type = Type::float64;
  int64_t channel_stride = 0;
  int64_t group_stride = 0;
};

using Range = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t count, Range range, void* context);

// The operands of one operation; what an operation does not use stays null.
struct Task {
  int64_t samples = 0, channels = 0, positions = 0;
  bool rows = false;
  int64_t groups = 1;
  const int64_t* starts = nullptr;  // groups + 1 sample numbers, from 0 to samples
  Type type = Type::float32;        // of x, y, dy, dx, extra, dresidual

  const void* x = nullptr;
  const void* dy = nullptr;
  const void* extra = nullptr;    // forward: the residual; backward: what was saved for it (see `extra_is_output`)
  const uint8_t* mask = nullptr;  // (N, L), 1 = valid
  void* out = nullptr;            // y or dx
  void* dresidual = nullptr;
  bool extra_is_output = false;  // backward: extra holds y, whose sign is the sign of z

  Values mean, var, weight, bias, offset, slope;
  const double* var_count = nullptr;  // when set, `var` holds m2 and the variance is m2 / var_count[group]
  double eps = 0;
  int activation = 0;
  double parameter = 0;

  double* count = nullptr;                 // (G,)
  double* sums[2] = {nullptr, nullptr};    // (G, C) each: mean and m2, or sum_g and sum_g_xhat
  int threads = 1;
  Parallel parallel = nullptr;
};

// One table per instruction set. Each returns false when memory for the partial sums could not be had.
struct Kernels {
  bool (*moments)(const Task&);
  bool (*normalize)(const Task&);
  bool (*train_forward)(const Task&);
  bool (*backward_sums)(const Task&);
  bool (*input_gradient)(const Task&);
  bool (*train_backward)(const Task&);
  bool (*eval_backward)(const Task&);  // one pass: the gradient, and the sums when `sums` is set
};

const Kernels& kernels();  // the best this processor runs
extern const bool rounds_to_bfloat16;  // whether it has an instruction for that, which no level of instruction sets includes

double read(const Values& values, int64_t group, int64_t channel);
void write(const Values& values, int64_t first, int64_t count, const double* from);  // channels, of one group

// An update of running statistics; see track.cpp.
struct Update {
  Values running_mean, running_var;     // (C,), written
  Values count, mean, m2;               // (G,) by group_stride; (G, C)
  int64_t groups = 1, channels = 0;
  double momentum = 0;                  // NaN: cumulative
  bool debias = false;
  bool skip_nonfinite = false;
  int64_t* batches = nullptr;           // num_batches_tracked; may be absent
  int64_t* skipped = nullptr;           // how many batches some channel left out; may be absent
};
void track(const Update& update);

// Merge rows of 2 C + 1 numbers, the count, C means and C m2 each; see track.cpp.
void merge(const double* rows, int64_t row_count, int64_t channels, double* count, double* mean, double* m2);
// Add up rows and divide by the count, where there is one.
void mean_of_sums(const double* rows, int64_t row_count, int64_t numbers, double count, double* means);

}  // namespace evenorm
