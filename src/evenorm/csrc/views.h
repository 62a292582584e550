// What the binding sees of torch: handles, tensors with their metadata read once, arguments on the stack. For binding.cpp alone.
#pragma once

#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "engine.h"
#include "torch_abi.h"

namespace {

using evenorm::Task;
using evenorm::Type;
using evenorm::Values;

class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle given) : given_(given) {}
  Handle(Handle&& other) noexcept : given_(std::exchange(other.given_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(given_, other.given_);
    return *this;
  }
  ~Handle() {
    if (given_ != nullptr) aoti_torch_delete_tensor_object(given_);
  }
  AtenTensorHandle get() const { return given_; }
  AtenTensorHandle release() { return std::exchange(given_, nullptr); }
  explicit operator bool() const { return given_ != nullptr; }

 private:
  AtenTensorHandle given_ = nullptr;
};

struct Types {
  int32_t codes[4] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                      aoti_torch_dtype_float16()};
  int32_t boolean = aoti_torch_dtype_bool(), int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
};
const Types& types() {
  static const Types found;
  return found;
}
constexpr int64_t type_bytes[4] = {4, 8, 2, 2};

// A tensor with its metadata read once. Sizes and strides are borrowed from the tensor.
struct View {
  Handle handle;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t code = 0;
  void* data = nullptr;

  View() = default;
  explicit View(Handle given) : handle(std::move(given)) {
    int64_t *size, *stride;
    DONE(aoti_torch_get_dim(handle.get(), &dim));
    DONE(aoti_torch_get_sizes(handle.get(), &size));
    DONE(aoti_torch_get_strides(handle.get(), &stride));
    DONE(aoti_torch_get_dtype(handle.get(), &code));
    DONE(aoti_torch_get_data_ptr(handle.get(), &data));
    sizes = size;
    strides = stride;
  }
  explicit operator bool() const { return bool(handle); }
  int64_t count() const {
    int64_t product = 1;
    for (int64_t d = 0; d < dim; ++d) product *= sizes[d];
    return product;
  }
  Type type(const char* name) const {
    for (int i = 0; i < 4; ++i)
      if (code == types().codes[i]) return Type(i);
    CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
};

// The arguments of an operator, in order, off torch's stack, whose slots are 64 bits: a number, a handle that now is ours, a pointer to
// a slot where the argument may be missing. Whatever is not taken is freed nowhere, so take all of them.
class Arguments {
 public:
  explicit Arguments(StableIValue* slots) : next_(slots) {}

  View tensor() { return View(Handle(pointer<AtenTensorHandle>(*next_++))); }
  View optional_tensor() {
    const auto given = optional();
    return given ? View(Handle(pointer<AtenTensorHandle>(*given))) : View();
  }
  double number() { return std::bit_cast<double>(*next_++); }
  int64_t integer() { return std::bit_cast<int64_t>(*next_++); }
  bool flag() { return *next_++ != 0; }

  std::optional<std::vector<int64_t>> optional_ints() {
    const auto given = optional();
    if (!given) return std::nullopt;
    const auto list = pointer<StableListHandle>(*given);
    size_t size;
    DONE(torch_list_size(list, &size));
    std::vector<int64_t> numbers(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue slot;
      DONE(torch_list_get_item(list, i, &slot));
      numbers[i] = std::bit_cast<int64_t>(slot);
    }
    DONE(torch_delete_list(list));
    return numbers;
  }

 private:
  template <class To>
  static To pointer(StableIValue slot) {
    return reinterpret_cast<To>(static_cast<uintptr_t>(slot));
  }
  std::optional<StableIValue> optional() {
    auto* const slot = pointer<StableIValue*>(*next_++);
    if (slot == nullptr) return std::nullopt;
    const StableIValue held = *slot;
    delete slot;
    return held;
  }

  StableIValue* next_;
};

// (C,) or (G, C), any float type, any strides.
Values values(const View& given, int64_t groups, int64_t channels, const char* name) {
  if (!given) return {};
  const bool grouped = given.dim == 2;
  CHECK((given.dim == 1 || grouped) && given.sizes[given.dim - 1] == channels, name, " must have shape (C,) or (G, C)");
  CHECK(!grouped || given.sizes[0] == groups, name, " must have one row for each group");
  return {given.data, given.type(name), given.strides[given.dim - 1], grouped ? given.strides[0] : 0};
}

}  // namespace
