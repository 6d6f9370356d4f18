// What the two halves of the pretend device share.
#pragma once
#include <c10/core/Allocator.h>

namespace pretend {
// Host memory that counts as memory of cuda:0.
c10::Allocator& device_memory();
}  // namespace pretend
