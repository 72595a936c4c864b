// Memory of CPU tensors that fits where another tensor of its size was.
//
// torch asks posix_memalign for it. glibc's looks for a free block that is larger by the alignment and a bit, cuts off
// both ends and gives them back: what is left is too small for the next block of its size, and ever more such holes lie
// between what stays. malloc takes the hole that fits best; so the room to align lies inside of the block, for good.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdlib>

namespace {

constexpr uintptr_t ALIGNMENT = 64;  // torch's own, a cache line

// What malloc gave stands right before the aligned bytes.
void release(void* bytes) {
  if (bytes != nullptr) std::free(static_cast<void**>(bytes)[-1]);
}

struct Fitting final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (size == 0) return {nullptr, nullptr, &release, cpu};
    constexpr size_t room = ALIGNMENT + sizeof(void*);
    void* whole = size <= SIZE_MAX - room ? std::malloc(size + room) : nullptr;
    // In the words of torch's allocator, by which it is told from other errors (puna/errors.py).
    TORCH_CHECK(whole != nullptr, "can't allocate memory: you tried to allocate ", size, " bytes");
    const uintptr_t first = reinterpret_cast<uintptr_t>(whole) + sizeof(void*);
    void* bytes = reinterpret_cast<void*>((first + ALIGNMENT - 1) & ~(ALIGNMENT - 1));
    static_cast<void**>(bytes)[-1] = whole;
    return {bytes, bytes, &release, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};

}  // namespace

extern "C" void puna_allocate() {
  static auto* const fitting = new Fitting;  // never deleted: tensors outlive whatever the end of a process deletes
  c10::SetCPUAllocator(fitting, 1);
}
