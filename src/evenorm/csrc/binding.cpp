// The one file that knows torch, with views.h and running.h: operators on the ABI-stable interface. It checks, allocates, conforms
// layouts and calls the kernels. Arguments are taken off the stack by hand rather than by TORCH_BOX, which copies every tensor's
// handle.

#include <algorithm>
#include <cstdlib>

#include "recycle.h"
#include "running.h"

// Of torch 2.11 and newer; with 2.10 the symbol stays null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t,
                                                                int32_t, int32_t, AtenTensorHandle*, int32_t, const uint8_t*, int64_t,
                                                                void (*)(void*, void*), void*);

namespace {

Handle allocate(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t code) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, types().cpu, 0, &made));
  return Handle(made);
}

double* data_of(const Handle& handle) {
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle.get(), &data));
  return static_cast<double*>(data);
}

Handle doubles(int64_t groups, int64_t channels) {
  const int64_t sizes[2] = {groups, channels}, strides[2] = {channels, 1};
  return allocate(2, sizes, strides, types().codes[int(Type::float64)]);
}

Handle vector(int64_t length, int32_t code) {
  const int64_t stride = 1;
  return allocate(1, &length, &stride, code);
}

// An output of x's shape. A large one lies in recycled memory, to which its storage gives it back.
Handle allocate_output(const View& x, const int64_t* strides, int64_t bytes) {
  if (torch_from_blob == nullptr) return allocate(x.dim, x.sizes, strides, x.code);
  const Recycler::Block block = Recycler::only().take(size_t(bytes));
  if (block.data == nullptr) return allocate(x.dim, x.sizes, strides, x.code);
  const auto give_back = [](void* data, void* size) { Recycler::only().give(data, reinterpret_cast<uintptr_t>(size)); };
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block.data, x.dim, x.sizes, strides, 0, x.code, types().cpu, -1, &made,
                                                aoti_torch_layout_strided(), nullptr, 0, give_back,
                                                reinterpret_cast<void*>(block.size)));
  return Handle(made);
}

bool dense(const View& x, bool rows) {
  if (x.count() == 0) return !rows;
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool right = x.sizes[d] == 1 || x.strides[d] == expected;
    expected *= x.sizes[d];
    return right;
  };
  if (rows && !fits(1)) return false;
  for (int64_t d = x.dim - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return (rows || fits(1)) && fits(0);
}

// x in one of the two dense layouts, and the strides that all other operands of its shape are brought to.
struct Canonical {
  View x;
  std::vector<int64_t> strides;
  int64_t samples, channels, positions = 1;
  bool rows;
};

Handle copied(const View& from, const std::vector<int64_t>& strides) {
  Handle made = allocate(from.dim, from.sizes, strides.data(), from.code);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(made.get(), from.handle.get(), 0));
  return made;
}

Canonical canonical(View x) {
  CHECK(x.dim >= 2, "x must have 2 dimensions or more, got ", x.dim);
  Canonical found;
  found.samples = x.sizes[0];
  found.channels = x.sizes[1];
  for (int64_t d = 2; d < x.dim; ++d) found.positions *= x.sizes[d];
  const bool planes = dense(x, false);
  const bool rows = dense(x, true);
  found.rows = rows && (!planes || found.positions == 1);
  if (planes || rows) {
    found.strides.assign(x.strides, x.strides + x.dim);
    found.x = std::move(x);
    return found;
  }
  found.strides.assign(size_t(x.dim), 1);
  for (int64_t d = x.dim - 2; d >= 0; --d)
    found.strides[size_t(d)] = found.strides[size_t(d) + 1] * (x.sizes[d + 1] > 1 ? x.sizes[d + 1] : 1);
  found.rows = found.positions == 1;
  found.x = View(copied(x, found.strides));
  return found;
}

// An operand of x's shape and dtype, in x's layout.
View conformed(View given, const Canonical& like, const char* name) {
  if (!given) return given;
  CHECK(given.code == like.x.code, name, " must have x's dtype");
  CHECK(given.dim == like.x.dim, name, " must have x's shape");
  bool same = true;
  for (int64_t d = 0; d < given.dim; ++d) {
    CHECK(given.sizes[d] == like.x.sizes[d], name, " must have x's shape; dimension ", d, " is ", given.sizes[d],
          ", not ", like.x.sizes[d]);
    same = same && (given.sizes[d] == 1 || given.strides[d] == like.strides[size_t(d)]);
  }
  return same ? std::move(given) : View(copied(given, like.strides));
}

View conformed_mask(View mask, const Canonical& like) {
  if (!mask) return mask;
  CHECK(mask.code == types().boolean, "mask must be bool");
  CHECK(mask.dim == like.x.dim - 1 && mask.count() == like.samples * like.positions,
        "mask must have shape (N, *positions)");
  std::vector<int64_t> strides(size_t(mask.dim), 1);
  bool same = true;
  for (int64_t d = mask.dim - 1; d >= 0; --d) {
    if (d + 1 < mask.dim) strides[size_t(d)] = strides[size_t(d) + 1] * mask.sizes[d + 1];
    same = same && (mask.sizes[d] == 1 || mask.strides[d] == strides[size_t(d)]);
  }
  return same ? std::move(mask) : View(copied(mask, strides));
}

void parallel(int64_t count, evenorm::Range range, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, range, context));
}

// What the operations share: x's geometry, the groups, the setting.
struct Call {
  Task task;
  Canonical canonical;
  View mask;
  std::vector<int64_t> starts;

  Call(View x, View given_mask, const std::optional<std::vector<int64_t>>& splits)
      : canonical(::canonical(std::move(x))), mask(conformed_mask(std::move(given_mask), canonical)) {
    starts.push_back(0);
    if (splits.has_value()) {
      for (const int64_t samples : *splits) {
        CHECK(samples >= 0, "splits must not be negative");
        starts.push_back(starts.back() + samples);
      }
    } else {
      starts.push_back(canonical.samples);
    }
    CHECK(starts.back() == canonical.samples, "splits must add up to ", canonical.samples, ", got ", starts.back());
    task.samples = canonical.samples;
    task.channels = canonical.channels;
    task.positions = canonical.positions;
    task.rows = canonical.rows;
    task.groups = int64_t(starts.size()) - 1;
    task.starts = starts.data();
    task.type = canonical.x.type("x");
    task.x = canonical.x.data;
    task.mask = static_cast<const uint8_t*>(mask.data);
    task.parallel = parallel;
    uint32_t threads;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
    task.threads = int(threads);
  }

  int64_t elements() const { return task.samples * task.channels * task.positions; }

  Handle like_x(void** data) const {
    Handle made = allocate_output(canonical.x, canonical.strides.data(), elements() * type_bytes[int(task.type)]);
    *data = data_of(made);
    return made;
  }

  void setting(double eps, int64_t activation, double parameter) {
    CHECK(activation >= 0 && activation <= 9, "unknown activation ", activation);
    task.eps = eps;
    task.activation = int(activation);
    task.parameter = parameter;
  }

  Values channel_values(const View& given, const char* name) const {
    return values(given, task.groups, task.channels, name);
  }
};

void run(bool (*operation)(const Task&), const Task& task) { CHECK(operation(task), "out of memory for partial sums"); }

void put(StableIValue* stack, int index, Handle& handle) { stack[index] = stable::from(handle.release()); }

// (x, mask, splits) -> (count, mean, m2)
void moments(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  View x = given.tensor(), mask = given.optional_tensor();
  Call call(std::move(x), std::move(mask), given.optional_ints());
  Handle count = vector(call.task.groups, types().codes[int(Type::float64)]);
  Handle mean = doubles(call.task.groups, call.task.channels), m2 = doubles(call.task.groups, call.task.channels);
  call.task.count = data_of(count);
  call.task.sums[0] = data_of(mean);
  call.task.sums[1] = data_of(m2);
  run(evenorm::kernels().moments, call.task);
  put(stack, 0, count);
  put(stack, 1, mean);
  put(stack, 2, m2);
}

// (x, mask) -> (1, 2 C + 1): count, mean and m2 of the whole batch, as they travel to other workers
void forward_message(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  View x = given.tensor(), mask = given.optional_tensor();
  Call call(std::move(x), std::move(mask), std::nullopt);
  Handle row = doubles(1, 2 * call.task.channels + 1);
  call.task.count = data_of(row);
  call.task.sums[0] = call.task.count + 1;
  call.task.sums[1] = call.task.sums[0] + call.task.channels;
  run(evenorm::kernels().moments, call.task);
  put(stack, 0, row);
}

// What workers sent, a row of as many numbers from each.
const double* rows_of(const View& messages, int64_t numbers) {
  CHECK(messages.code == types().codes[int(Type::float64)], "messages must be float64");
  CHECK(messages.dim == 2 && messages.sizes[0] > 0 && messages.sizes[1] == numbers && dense(messages, false),
        "messages must be rows of ", numbers, " numbers, one behind the other");
  return static_cast<const double*>(messages.data);
}

// (x, mean, var, weight, bias, residual, mask, splits, eps, activation, parameter) -> y
void normalize(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  View x = given.tensor(), mean = given.tensor(), var = given.tensor();
  View weight = given.optional_tensor(), bias = given.optional_tensor(), residual = given.optional_tensor();
  View mask = given.optional_tensor();
  Call call(std::move(x), std::move(mask), given.optional_ints());
  const double eps = given.number();
  const int64_t activation = given.integer();
  call.setting(eps, activation, given.number());
  residual = conformed(std::move(residual), call.canonical, "residual");
  call.task.mean = call.channel_values(mean, "mean");
  call.task.var = call.channel_values(var, "var");
  call.task.weight = call.channel_values(weight, "weight");
  call.task.bias = call.channel_values(bias, "bias");
  call.task.extra = residual.data;
  Handle y = call.like_x(&call.task.out);
  run(evenorm::kernels().normalize, call.task);
  put(stack, 0, y);
}

// x, weight, bias, residual, mask, splits, eps, activation, parameter: what a training forward takes; y, count, mean, m2: what
// it gives.
struct Forward {
  View weight, bias, residual;
  std::optional<Call> call;
  Handle y, count, mean, m2;

  explicit Forward(Arguments& given) {
    View x = given.tensor();
    weight = given.optional_tensor();
    bias = given.optional_tensor();
    residual = given.optional_tensor();
    View mask = given.optional_tensor();
    call.emplace(std::move(x), std::move(mask), given.optional_ints());
    const double eps = given.number();
    const int64_t activation = given.integer();
    call->setting(eps, activation, given.number());
    Task& task = call->task;
    residual = conformed(std::move(residual), call->canonical, "residual");
    task.weight = call->channel_values(weight, "weight");
    task.bias = call->channel_values(bias, "bias");
    task.extra = residual.data;
    y = call->like_x(&task.out);
    count = vector(task.groups, types().codes[int(Type::float64)]);
    mean = doubles(task.groups, task.channels);
    m2 = doubles(task.groups, task.channels);
    task.count = data_of(count);
    task.sums[0] = data_of(mean);
    task.sums[1] = data_of(m2);
  }

  void results(StableIValue* stack) {
    put(stack, 0, y);
    put(stack, 1, count);
    put(stack, 2, mean);
    put(stack, 3, m2);
  }
};

void train_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Forward forward(given);
  run(evenorm::kernels().train_forward, forward.call->task);
  forward.results(stack);
}

// The operands that every backward begins with: dy, x, ..., weight, bias, saved, mask, splits, eps, activation, parameter.
struct Backward {
  View dy, count, mean, var, weight, bias, saved;
  std::optional<Call> call;
  enum Statistics { given_var, given_m2 };

  Backward(Arguments& given, Statistics statistics, bool with_splits) {
    dy = given.tensor();
    View x = given.tensor();
    if (statistics == given_m2) count = given.tensor();
    mean = given.tensor();
    var = given.tensor();
    weight = given.optional_tensor();
    bias = given.optional_tensor();
    saved = given.optional_tensor();
    View mask = given.optional_tensor();
    const auto splits = with_splits ? given.optional_ints() : std::nullopt;
    const double eps = given.number();
    const int64_t activation = given.integer();
    const double parameter = given.number();
    call.emplace(std::move(x), std::move(mask), splits);
    call->setting(eps, activation, parameter);
    Task& task = call->task;
    dy = conformed(std::move(dy), call->canonical, "dy");
    saved = conformed(std::move(saved), call->canonical, "saved");
    task.dy = dy.data;
    const bool sign_is_enough = activation == 1 || activation == 2;
    task.extra = activation == 0 ? nullptr : saved.data;
    task.extra_is_output = saved && sign_is_enough;
    task.mean = call->channel_values(mean, "mean");
    task.var = call->channel_values(var, "var");
    task.weight = call->channel_values(weight, "weight");
    task.bias = call->channel_values(bias, "bias");
    if (!count) return;
    CHECK(count.code == types().codes[int(Type::float64)] && count.dim == 1 && count.sizes[0] == task.groups &&
              (task.groups == 1 || count.strides[0] == 1),
          "count must be float64, one for each group");
    task.var_count = static_cast<const double*>(count.data);
  }
};

// Gradients of weight or bias: the groups' sums added up in place, in the parameter's dtype.
Handle for_parameter(double* sums, const View& parameter, int64_t groups, int64_t channels) {
  const Type type = parameter ? parameter.type("parameter") : Type::float32;
  Handle made = vector(channels, types().codes[int(type)]);
  for (int64_t g = 1; g < groups; ++g)
    for (int64_t c = 0; c < channels; ++c) sums[c] += sums[g * channels + c];
  evenorm::write({data_of(made), type, 1, 0}, 0, channels, sums);
  return made;
}

Handle residual_gradient(Call& call, bool needed) {
  return needed ? call.like_x(&call.task.dresidual) : vector(0, call.canonical.x.code);
}

// (dy, x, mean, var, weight, bias, saved, mask, splits, eps, activation, parameter) -> (sum_g, sum_g_xhat)
void backward_sums(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_var, true);
  Task& task = backward.call->task;
  Handle sum_g = doubles(task.groups, task.channels), sum_g_xhat = doubles(task.groups, task.channels);
  task.sums[0] = data_of(sum_g);
  task.sums[1] = data_of(sum_g_xhat);
  run(evenorm::kernels().backward_sums, task);
  put(stack, 0, sum_g);
  put(stack, 1, sum_g_xhat);
}

// (dy, x, count, mean, m2, weight, bias, saved, mask, splits, eps, activation, parameter) -> (1, 2 C): sum_g and sum_g_xhat of the
// one group, as they travel to other workers
void backward_message(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_m2, true);
  Task& task = backward.call->task;
  CHECK(task.groups == 1, "workers pool one group");
  Handle row = doubles(1, 2 * task.channels);
  task.sums[0] = data_of(row);
  task.sums[1] = task.sums[0] + task.channels;
  run(evenorm::kernels().backward_sums, task);
  put(stack, 0, row);
}

// (... as backward_sums, offset, slope, needs_residual) -> (dx, dresidual or (0,))
void input_gradient(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_var, true);
  Call& call = *backward.call;
  const View offset = given.optional_tensor(), slope = given.optional_tensor();
  CHECK(bool(offset) == bool(slope), "offset and slope must be given together");
  call.task.offset = call.channel_values(offset, "offset");
  call.task.slope = call.channel_values(slope, "slope");
  Handle dx = call.like_x(&call.task.out), dresidual = residual_gradient(call, given.flag());
  run(evenorm::kernels().input_gradient, call.task);
  put(stack, 0, dx);
  put(stack, 1, dresidual);
}

// `known`: the sums, where the operation does not compute them.
void with_parameter_sums(StableIValue* stack, Backward& backward, bool needs_residual, bool needs_sums,
                         bool (*operation)(const Task&), const double* known = nullptr) {
  Call& call = *backward.call;
  const int64_t groups = call.task.groups, channels = call.task.channels;
  Handle dx = call.like_x(&call.task.out), dresidual = residual_gradient(call, needs_residual);
  std::vector<double> sums(needs_sums ? size_t(2 * groups * channels) + 1 : 0);
  if (needs_sums) {
    call.task.sums[0] = sums.data();
    call.task.sums[1] = sums.data() + groups * channels;
    if (known != nullptr) std::copy(known, known + 2 * groups * channels, sums.data());
  }
  run(operation, call.task);
  const int64_t length = needs_sums ? channels : 0;
  Handle dweight = for_parameter(call.task.sums[1], backward.weight, groups, length);
  Handle dbias = for_parameter(call.task.sums[0], backward.bias, groups, length);
  put(stack, 0, dx);
  put(stack, 1, dweight);
  put(stack, 2, dbias);
  put(stack, 3, dresidual);
}

// (dy, x, count, mean, m2, weight, bias, saved, mask, splits, eps, activation, parameter, needs_residual, messages, own)
//   -> (dx, dweight, dbias, dresidual or (0,))
// Given the `backward_message` of each worker, of which this one's is row `own`, dx has the sums of all, the parameters their own.
void train_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_m2, true);
  const bool needs_residual = given.flag();
  const View messages = given.optional_tensor();
  const int64_t own = given.integer();
  if (!messages) return with_parameter_sums(stack, backward, needs_residual, true, evenorm::kernels().train_backward);
  Task& task = backward.call->task;
  const int64_t numbers = 2 * task.channels;
  const double* rows = rows_of(messages, numbers);
  CHECK(task.groups == 1 && own >= 0 && own < messages.sizes[0], "workers pool one group, and each has its own row");
  std::vector<double> means(size_t(numbers) + 1);
  evenorm::mean_of_sums(rows, messages.sizes[0], numbers, *task.var_count, means.data());
  task.offset = {means.data(), Type::float64, 1, 0};
  task.slope = {means.data() + task.channels, Type::float64, 1, 0};
  with_parameter_sums(stack, backward, needs_residual, true, evenorm::kernels().input_gradient, rows + own * numbers);
}

// (dy, x, mean, var, weight, bias, saved, mask, eps, activation, parameter, needs_sums, needs_residual)
//   -> (dx, dweight or (0,), dbias or (0,), dresidual or (0,))
void eval_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_var, false);
  const bool needs_sums = given.flag();
  with_parameter_sums(stack, backward, given.flag(), needs_sums, evenorm::kernels().eval_backward);
}

// (running statistics, count, mean, m2, rule) -> ()
void track(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Tracked tracked;
  tracked.statistics(given);
  const View count = given.tensor(), mean = given.tensor(), m2 = given.tensor();
  CHECK(tracked.running_mean, "running_mean and running_var must be given");
  evenorm::Update& update = tracked.update;
  update.groups = mean.dim == 2 ? mean.sizes[0] : 1;
  CHECK(count.count() == update.groups && count.dim <= 1, "count must have one value for each group");
  update.count = {count.data, count.type("count"), 0, count.dim == 1 ? count.strides[0] : 0};
  update.mean = values(mean, update.groups, update.channels, "mean");
  update.m2 = values(m2, update.groups, update.channels, "m2");
  tracked.rule(given);
  evenorm::track(update);
}

// train_forward, and at once track_: two calls in place of one would cost a small layer a tenth of its time. Given the
// `forward_message` of each worker, the statistics are those of all of them.
void train_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Forward forward(given);
  Tracked tracked;
  tracked.statistics(given);
  tracked.rule(given);
  const View messages = given.optional_tensor();
  Task& task = forward.call->task;
  const Values count{task.count, Type::float64, 0, 1};
  const Values mean{task.sums[0], Type::float64, 1, task.channels}, m2{task.sums[1], Type::float64, 1, task.channels};
  evenorm::Update& update = tracked.update;
  CHECK(!tracked.running_mean || update.channels == task.channels, "running_mean must have one value for each channel");
  if (messages) {
    CHECK(task.groups == 1, "workers pool one group");
    const double* rows = rows_of(messages, 2 * task.channels + 1);
    evenorm::merge(rows, messages.sizes[0], task.channels, task.count, task.sums[0], task.sums[1]);
    task.mean = mean;
    task.var = m2;
    task.var_count = task.count;
  }
  run(messages ? evenorm::kernels().normalize : evenorm::kernels().train_forward, task);
  if (tracked.running_mean) {
    update.groups = task.groups;
    update.count = count;
    update.mean = mean;
    update.m2 = m2;
    evenorm::track(update);
  }
  forward.results(stack);
}

#define SETTING "Tensor? mask, int[]? splits, float eps, int activation, float parameter"
#define STATISTICS "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
#define RULE "float momentum, bool debias, int nonfinite, Tensor(d!)? skipped"
#define GIVEN_BACKWARD "Tensor? weight, Tensor? bias, Tensor? saved, "

}  // namespace

STABLE_TORCH_LIBRARY(evenorm, library) {
  library.def("moments(Tensor x, Tensor? mask, int[]? splits) -> (Tensor, Tensor, Tensor)");
  library.def("forward_message(Tensor x, Tensor? mask) -> Tensor");
  library.def("normalize(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING
              ") -> Tensor");
  library.def("train_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING
              ") -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD SETTING
              ") -> (Tensor, Tensor)");
  library.def("backward_message(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, " GIVEN_BACKWARD SETTING
              ") -> Tensor");
  library.def("input_gradient(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD SETTING
              ", Tensor? offset, Tensor? slope, bool needs_residual) -> (Tensor, Tensor)");
  library.def("train_backward(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, " GIVEN_BACKWARD SETTING
              ", bool needs_residual, Tensor? messages, int own) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("eval_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD
              "Tensor? mask, float eps, int activation, float parameter, bool needs_sums, bool needs_residual) -> "
              "(Tensor, Tensor, Tensor, Tensor)");
  library.def("track_(" STATISTICS ", Tensor count, Tensor mean, Tensor m2, " RULE ") -> ()");
  library.def("train_step(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING ", " STATISTICS ", " RULE
              ", Tensor? messages) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(evenorm, CPU, library) {
  library.impl("moments", &moments);
  library.impl("forward_message", &forward_message);
  library.impl("normalize", &normalize);
  library.impl("train_forward", &train_forward);
  library.impl("backward_sums", &backward_sums);
  library.impl("backward_message", &backward_message);
  library.impl("input_gradient", &input_gradient);
  library.impl("train_backward", &train_backward);
  library.impl("eval_backward", &eval_backward);
  library.impl("track_", &track);
  library.impl("train_step", &train_step);
}
