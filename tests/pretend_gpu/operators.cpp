// The operators of the pretend device: what makes, copies and views tensors is its own, all else runs on the CPU, after
// a check that a CUDA build would let these tensors meet.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "device.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.is_cuda()) return tensor;
  void* data = tensor.numel() ? const_cast<void*>(tensor.const_data_ptr()) : nullptr;
  auto host = at::from_blob(
      data, tensor.sizes(), tensor.strides(), [tensor](void*) {}, at::TensorOptions().dtype(tensor.dtype()));
  return tensor.is_conj() ? host.conj() : host;
}

at::ScalarType type_or_default(optional<at::ScalarType> type) {
  return type.value_or(at::get_default_dtype_as_scalartype());
}

Tensor empty(
    IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>, optional<at::Device>, optional<bool>,
    optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &pretend::device_memory(), kKeys, type_or_default(type), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef strides, optional<at::ScalarType> type, optional<at::Layout>, optional<at::Device>,
    optional<bool>) {
  return at::detail::empty_strided_generic(size, strides, &pretend::device_memory(), kKeys, type_or_default(type));
}

const Tensor& resize(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  auto& storage = self.storage();
  size_t bytes = (c10::multiply_integers(size) + impl->storage_offset()) * self.itemsize();
  if (bytes > storage.nbytes()) {
    auto larger = pretend::device_memory().allocate(bytes);
    if (storage.nbytes()) std::memcpy(larger.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(size, strides);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  auto elements = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& copy(Tensor& self, const Tensor& source, bool) {
  on_host(self).copy_(on_host(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (self.sizes() != to.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar read_value(const Tensor& tensor) { return at::native::_local_scalar_dense_cpu(on_host(tensor)); }

// CUDA forgives 0-dim CPU tensors beside CUDA ones, except in these lists ...
bool lists_are_strict(std::string_view name) {
  constexpr std::array<std::string_view, 5> strict = {
      "aten::cat", "aten::stack", "aten::_foreach_norm", "aten::_fused_adam_", "aten::_fused_adamw_"};
  return std::find(strict.begin(), strict.end(), name) != strict.end();
}

// ... and CPU tensors as indices of CUDA ones.
bool is_indexing(std::string_view name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

void check_devices(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> arguments) {
  const auto& name = op.schema().operator_name().name;
  bool any_cuda = false;
  std::string misplaced;
  auto see = [&](const Tensor& tensor, size_t position, bool in_strict_list) {
    if (!tensor.defined()) return;
    any_cuda |= tensor.is_cuda();
    bool forgiven = (tensor.dim() == 0 && !in_strict_list) || (is_indexing(name) && position > 0);
    if (tensor.is_cpu() && !forgiven) misplaced += " " + op.schema().arguments()[position].name();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& argument = arguments[i];
    if (argument.isTensor()) {
      see(argument.toTensor(), i, false);
    } else if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) see(tensor, i, lists_are_strict(name));
    } else if (argument.isOptionalTensorList()) {
      for (const optional<Tensor>& tensor : argument.toOptionalTensorVector())
        if (tensor) see(*tensor, i, false);
    }
  }
  TORCH_CHECK(
      !any_cuda || misplaced.empty(), "Expected all tensors to be on the same device, but ", name,
      " got CUDA tensors and CPU ones:", misplaced);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, torch::jit::last(*stack, op.schema().arguments().size()));
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_.source_Storage", &set_whole_storage);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("copy_", &copy);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &read_value);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("record_stream", [](Tensor&, at::Stream) {});
  // Their composite forms would take precedence over the fallback, and choose cuDNN or another formula than the CPU's.
  for (auto name : {"convolution", "convolution_backward", "native_batch_norm", "native_layer_norm",
                    "native_layer_norm_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
