// The part of torch's stable C interface that the binding uses, declared here rather than included: so the engine is built without
// torch, and an installation into an empty environment, which builds before it fetches torch, has its engine too.
//
// Names, types and the layout of the stack are those of torch 2.10, and stay for as long as torch keeps its promise; a test lets a
// compiler compare them with the headers of the torch at hand. For the binding alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

extern "C" {

struct AtenTensorOpaque;
struct TorchLibraryOpaque;
struct StableListOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
using TorchLibraryHandle = TorchLibraryOpaque*;
using StableListHandle = StableListOpaque*;
using AOTITorchError = int32_t;  // 0: none
using StableIValue = uint64_t;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_layout_strided();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_int64();

AOTITorchError aoti_torch_get_dim(AtenTensorHandle, int64_t*);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle, int64_t**);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError aoti_torch_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking);
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                                        int32_t index, AtenTensorHandle*);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle);

// Of torch 2.11 and newer; with 2.10 the symbol stays null.
[[gnu::weak]] AOTITorchError torch_from_blob(void* data, int64_t dim, const int64_t* sizes, const int64_t* strides, int64_t offset,
                                             int32_t dtype, int32_t device, int32_t index, AtenTensorHandle*, int32_t layout,
                                             const uint8_t* metadata, int64_t metadata_size, void (*give_back)(void*, void*), void*);

AOTITorchError torch_list_size(StableListHandle, size_t*);
AOTITorchError torch_list_get_item(StableListHandle, size_t, StableIValue*);
AOTITorchError torch_delete_list(StableListHandle);

AOTITorchError torch_get_num_threads(uint32_t*);
AOTITorchError torch_parallel_for(int64_t from, int64_t to, int64_t grain, void (*)(int64_t, int64_t, void*), void*);

AOTITorchError aoti_torch_library_init_def(const char* name, const char* file, uint32_t line, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_init_impl(const char* name, const char* key, const char* file, uint32_t line, TorchLibraryHandle*);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char* schema);
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, void (*)(StableIValue*, uint64_t, uint64_t), uint64_t version);

}  // extern "C"

namespace {

template <class... Part>
[[noreturn, gnu::noinline]] void refuse(const Part&... part) {
  std::ostringstream text;
  (text << ... << part);
  throw std::runtime_error(text.str());  // in Python a RuntimeError with this text
}

#define CHECK(condition, ...) \
  if (!(condition)) refuse("evenorm: ", __VA_ARGS__)

// Of a call into torch. What went wrong there torch tells by a line of its own on stderr.
#define DONE(call) CHECK((call) == 0, "torch refused ", #call)

// Operators become known to torch when the library is loaded; the handles live as long as the process.
class Operators {
 public:
  Operators(const char* name, const char* key) {
    DONE(aoti_torch_library_init_def(name, __FILE__, __LINE__, &definitions_));
    DONE(aoti_torch_library_init_impl(name, key, __FILE__, __LINE__, &implementations_));
  }

  void add(const char* schema, void (*operation)(StableIValue*, uint64_t, uint64_t)) const {
    constexpr uint64_t torch_2_10 = uint64_t(2) << 56 | uint64_t(10) << 48;
    const std::string name(schema, std::strchr(schema, '('));
    DONE(aoti_torch_library_def(definitions_, schema));
    DONE(torch_library_impl(implementations_, name.c_str(), operation, torch_2_10));
  }

 private:
  TorchLibraryHandle definitions_, implementations_;
};

}  // namespace
