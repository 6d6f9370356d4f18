// The pretend device itself: its memory, pinned host memory, and the answers to "how many devices, which stream".
// Streams and events are numbers here: all work is done when a call returns.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "device.h"

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

void* aligned(size_t alignment, size_t bytes) {
  void* memory = nullptr;
  if (bytes && posix_memalign(&memory, alignment, bytes)) throw std::bad_alloc();
  return memory;
}

// Fresh memory is all ones: NaN in every floating-point type, so that a read before the first write shows.
struct DeviceMemory final : c10::Allocator {
  static void release(void* memory) { std::free(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = aligned(512, bytes);
    if (memory) std::memset(memory, 0xff, bytes);
    return {memory, memory, &release, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// Host memory that answers `is_pinned` with yes.
struct PinnedMemory final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::map<const char*, size_t> blocks;  // by first byte

  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      blocks.erase(static_cast<const char*>(memory));
    }
    std::free(memory);
  }
  static bool holds(const void* pointer) {
    std::lock_guard<std::mutex> guard(mutex);
    auto* byte = static_cast<const char*>(pointer);
    auto after = blocks.upper_bound(byte);
    return after != blocks.begin() && byte < std::prev(after)->first + std::prev(after)->second;
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = aligned(4096, bytes);
    if (memory) {
      std::lock_guard<std::mutex> guard(mutex);
      blocks[static_cast<const char*>(memory)] = bytes;
    }
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceMemory device_allocator;
PinnedMemory pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static inline thread_local c10::StreamId current = 0;
  static inline std::atomic<c10::StreamId> made{0};

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, kDevice, current); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::UNSAFE, kDevice, ++made); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(kDevice);
    current = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int recorded;
    *event = &recorded;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool isPinnedPtr(const void* pointer) const override { return PinnedMemory::holds(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};

[[maybe_unused]] const bool registered = [] {
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, 1);
  return true;
}();

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks)
}  // namespace at

c10::Allocator& pretend::device_memory() { return device_allocator; }
