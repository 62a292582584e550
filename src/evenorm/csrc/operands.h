// What the operators share: tensors made, operands brought to x's layout, a call's geometry. For binding.cpp alone.
#pragma once

#include "recycle.h"
#include "views.h"

namespace {

Handle allocate(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t code) {
  AtenTensorHandle made;
  DONE(aoti_torch_empty_strided(dim, sizes, strides, code, types().cpu, 0, &made));
  return Handle(made);
}

double* data_of(const Handle& handle) {
  void* data;
  DONE(aoti_torch_get_data_ptr(handle.get(), &data));
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
  DONE(torch_from_blob(block.data, x.dim, x.sizes, strides, 0, x.code, types().cpu, -1, &made,
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
  DONE(aoti_torch_copy_(made.get(), from.handle.get(), 0));
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
  DONE(torch_parallel_for(0, count, 1, range, context));
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
    DONE(torch_get_num_threads(&threads));
    task.threads = int(threads);
  }

  int64_t elements() const { return task.samples * task.channels * task.positions; }

  Handle like_x(void** data) const {
    Handle made = allocate_output(canonical.x, canonical.strides.data(), elements() * type_bytes[int(task.type)]);
    *data = data_of(made);
    return made;
  }

  void setting(double eps, int64_t activation, double parameter) {
    CHECK(activation >= 0 && activation < evenorm::activation_count, "unknown activation ", activation);
    task.eps = eps;
    task.activation = int(activation);
    task.parameter = parameter;
  }

  Values channel_values(const View& given, const char* name) const {
    return values(given, task.groups, task.channels, name);
  }
};

}  // namespace
