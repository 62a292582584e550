// The operators, on torch's stable interface: they check, allocate, conform layouts and call the kernels. This file alone knows torch,
// with operands.h, running.h, views.h and torch_abi.h below it.

#include <algorithm>

#include "operands.h"
#include "running.h"

namespace {

void run(bool (*operation)(const Task&), const Task& task) { CHECK(operation(task), "out of memory for partial sums"); }

void put(StableIValue* stack, int index, Handle& handle) { stack[index] = reinterpret_cast<uintptr_t>(handle.release()); }

// count (G,), mean and m2 (G, C).
struct Grouped {
  Handle count, mean, m2;

  explicit Grouped(Task& task)
      : count(vector(task.groups, types().codes[int(Type::float64)])),
        mean(doubles(task.groups, task.channels)),
        m2(doubles(task.groups, task.channels)) {
    task.count = data_of(count);
    task.sums[0] = data_of(mean);
    task.sums[1] = data_of(m2);
  }

  void put_from(StableIValue* stack, int index) {
    put(stack, index, count);
    put(stack, index + 1, mean);
    put(stack, index + 2, m2);
  }
};

// (x, mask, splits) -> (count, mean, m2)
void moments(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  View x = given.tensor(), mask = given.optional_tensor();
  Call call(std::move(x), std::move(mask), given.optional_ints());
  Grouped found(call.task);
  run(evenorm::kernels().moments, call.task);
  found.put_from(stack, 0);
}

// (1, 2 C + 1): the count, means and m2 of a whole batch in one tensor, which a step keeps and workers send.
Handle packed_moments(Task& task) {
  CHECK(task.groups == 1, "a step's batch is one group");
  Handle row = doubles(1, 2 * task.channels + 1);
  task.count = data_of(row);
  task.sums[0] = task.count + 1;
  task.sums[1] = task.sums[0] + task.channels;
  return row;
}

// (x, mask) -> (1, 2 C + 1): as they travel to other workers
void forward_message(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  View x = given.tensor(), mask = given.optional_tensor();
  Call call(std::move(x), std::move(mask), std::nullopt);
  Handle row = packed_moments(call.task);
  run(evenorm::kernels().moments, call.task);
  put(stack, 0, row);
}

// What workers sent, a row of as many numbers from each, or what a step kept, one row.
const double* rows_of(const View& given, int64_t numbers, const char* name) {
  CHECK(given.code == types().codes[int(Type::float64)], name, " must be float64");
  CHECK(given.dim == 2 && given.sizes[0] > 0 && given.sizes[1] == numbers && dense(given, false), name, " must be rows of ",
        numbers, " numbers, one behind the other");
  return static_cast<const double*>(given.data);
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

// x, weight, bias, residual, mask, splits, eps, activation, parameter: what a training forward takes; y: what it gives.
struct Forward {
  View weight, bias, residual;
  std::optional<Call> call;
  Handle y;

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
  }
};

// -> (y, count, mean, m2)
void train_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Forward forward(given);
  Grouped found(forward.call->task);
  run(evenorm::kernels().train_forward, forward.call->task);
  put(stack, 0, forward.y);
  found.put_from(stack, 1);
}

// The operands that every backward begins with: dy, x, statistics, weight, bias, saved, mask, splits, eps, activation, parameter.
struct Backward {
  View dy, batch, mean, var, weight, bias, saved;  // batch: count, or all that a step kept
  std::optional<Call> call;
  enum Statistics { given_var, given_m2, given_packed };  // mean, var; count, mean, m2; those of a step in one tensor

  Backward(Arguments& given, Statistics statistics, bool with_splits) {
    dy = given.tensor();
    View x = given.tensor();
    if (statistics != given_var) batch = given.tensor();
    if (statistics != given_packed) mean = given.tensor(), var = given.tensor();
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
    task.weight = call->channel_values(weight, "weight");
    task.bias = call->channel_values(bias, "bias");
    statistics == given_packed ? take_packed() : take_statistics();
  }

  void take_statistics() {
    Task& task = call->task;
    task.mean = call->channel_values(mean, "mean");
    task.var = call->channel_values(var, "var");
    if (!batch) return;
    CHECK(batch.code == types().codes[int(Type::float64)] && batch.dim == 1 && batch.sizes[0] == task.groups &&
              (task.groups == 1 || batch.strides[0] == 1),
          "count must be float64, one for each group");
    task.var_count = static_cast<const double*>(batch.data);
  }

  void take_packed() {
    Task& task = call->task;
    CHECK(task.groups == 1, "a step's batch is one group");
    task.var_count = rows_of(batch, 2 * task.channels + 1, "batch");
    task.mean = {task.var_count + 1, Type::float64, 1, 0};
    task.var = {task.var_count + 1 + task.channels, Type::float64, 1, 0};
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

// (dy, x, batch, weight, bias, saved, mask, splits, eps, activation, parameter) -> (1, 2 C): sum_g and sum_g_xhat, as they travel to
// other workers
void backward_message(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_packed, true);
  Task& task = backward.call->task;
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

// (dy, x, count, mean, m2, weight, bias, saved, mask, splits, eps, activation, parameter, needs_residual)
//   -> (dx, dweight, dbias, dresidual or (0,))
void train_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_m2, true);
  with_parameter_sums(stack, backward, given.flag(), true, evenorm::kernels().train_backward);
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

// What `train_forward` does and `track_`, in one call: two would cost a small layer a tenth of its time. Given the `forward_message`
// of each worker, the statistics are those of all of them. -> (y, batch)
void step_forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Forward forward(given);
  Tracked tracked;
  tracked.statistics(given);
  tracked.rule(given);
  const View messages = given.optional_tensor();
  Task& task = forward.call->task;
  Handle batch = packed_moments(task);
  const Values mean{task.sums[0], Type::float64, 1, 0}, m2{task.sums[1], Type::float64, 1, 0};
  evenorm::Update& update = tracked.update;
  CHECK(!tracked.running_mean || update.channels == task.channels, "running_mean must have one value for each channel");
  if (messages) {
    const double* rows = rows_of(messages, 2 * task.channels + 1, "messages");
    evenorm::merge(rows, messages.sizes[0], task.channels, task.count, task.sums[0], task.sums[1]);
    task.mean = mean;
    task.var = m2;
    task.var_count = task.count;
  }
  run(messages ? evenorm::kernels().normalize : evenorm::kernels().train_forward, task);
  if (tracked.running_mean) {
    update.groups = 1;
    update.count = {task.count, Type::float64, 0, 0};
    update.mean = mean;
    update.m2 = m2;
    evenorm::track(update);
  }
  put(stack, 0, forward.y);
  put(stack, 1, batch);
}

// (dy, x, batch, weight, bias, saved, mask, splits, eps, activation, parameter, needs_residual, messages, own)
//   -> (dx, dweight, dbias, dresidual or (0,))
// Given the `backward_message` of each worker, of which this one's is row `own`, dx has the sums of all, the parameters their own.
void step_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments given(stack);
  Backward backward(given, Backward::given_packed, true);
  const bool needs_residual = given.flag();
  const View messages = given.optional_tensor();
  const int64_t own = given.integer();
  if (!messages) return with_parameter_sums(stack, backward, needs_residual, true, evenorm::kernels().train_backward);
  Task& task = backward.call->task;
  const int64_t numbers = 2 * task.channels;
  const double* rows = rows_of(messages, numbers, "messages");
  CHECK(own >= 0 && own < messages.sizes[0], "each worker has its own row of messages");
  std::vector<double> means(size_t(numbers) + 1);
  evenorm::mean_of_sums(rows, messages.sizes[0], numbers, *task.var_count, means.data());
  task.offset = {means.data(), Type::float64, 1, 0};
  task.slope = {means.data() + task.channels, Type::float64, 1, 0};
  with_parameter_sums(stack, backward, needs_residual, true, evenorm::kernels().input_gradient, rows + own * numbers);
}

#define SETTING "Tensor? mask, int[]? splits, float eps, int activation, float parameter"
#define STATISTICS "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
#define RULE "float momentum, bool debias, bool skip_nonfinite, Tensor(d!)? skipped"
#define GIVEN_BACKWARD "Tensor? weight, Tensor? bias, Tensor? saved, "

[[maybe_unused]] const bool known_to_torch = [] {
  const Operators operators("evenorm", "CPU");
  operators.add("moments(Tensor x, Tensor? mask, int[]? splits) -> (Tensor, Tensor, Tensor)", &moments);
  operators.add("forward_message(Tensor x, Tensor? mask) -> Tensor", &forward_message);
  operators.add("normalize(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING
                ") -> Tensor",
                &normalize);
  operators.add("train_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING
                ") -> (Tensor, Tensor, Tensor, Tensor)",
                &train_forward);
  operators.add("backward_sums(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD SETTING
                ") -> (Tensor, Tensor)",
                &backward_sums);
  operators.add("backward_message(Tensor dy, Tensor x, Tensor batch, " GIVEN_BACKWARD SETTING ") -> Tensor",
                &backward_message);
  operators.add("input_gradient(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD SETTING
                ", Tensor? offset, Tensor? slope, bool needs_residual) -> (Tensor, Tensor)",
                &input_gradient);
  operators.add("train_backward(Tensor dy, Tensor x, Tensor count, Tensor mean, Tensor m2, " GIVEN_BACKWARD SETTING
                ", bool needs_residual) -> (Tensor, Tensor, Tensor, Tensor)",
                &train_backward);
  operators.add("eval_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, " GIVEN_BACKWARD
                "Tensor? mask, float eps, int activation, float parameter, bool needs_sums, bool needs_residual) -> "
                "(Tensor, Tensor, Tensor, Tensor)",
                &eval_backward);
  operators.add("track_(" STATISTICS ", Tensor count, Tensor mean, Tensor m2, " RULE ") -> ()", &track);
  operators.add("step_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, " SETTING ", " STATISTICS ", " RULE
                ", Tensor? messages) -> (Tensor, Tensor)",
                &step_forward);
  operators.add("step_backward(Tensor dy, Tensor x, Tensor batch, " GIVEN_BACKWARD SETTING
                ", bool needs_residual, Tensor? messages, int own) -> (Tensor, Tensor, Tensor, Tensor)",
                &step_backward);
  return true;
}();

}  // namespace
