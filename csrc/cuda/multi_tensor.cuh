// Runs a kernel over a list of tensors: one launch per packet.
#pragma once

#include "cuda/check.cuh"
#include "cuda/device.h"
#include "cuda/sweep.h"

#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1201
#error "fastcl needs CUDA 12.1 or newer: its kernels take up to 32 KB of parameters"
#endif

namespace fastcl::cuda {

template <class T>
struct Same {
  using type = T;
};

template <class... Parameters>
void launch_shared(const char* op, const Stream& stream, int64_t blocks, int threads, int64_t shared_bytes, void (*kernel)(Parameters...),
                   const typename Same<Parameters>::type&... parameters) {
  // More than 48 KB have to be asked for.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), op);
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)), addresses,
                         size_t(shared_bytes), static_cast<cudaStream_t>(stream.handle)),
        op);
}

template <class... Parameters>
void launch(const char* op, const Stream& stream, int64_t blocks, int threads, void (*kernel)(Parameters...),
            const typename Same<Parameters>::type&... parameters) {
  launch_shared(op, stream, blocks, threads, 0, kernel, parameters...);
}

// The two instances of a kernel whose first parameter is a packet.
template <class Small, class Large, class... Parameters>
struct KernelOf {
  void (*small)(Small, Parameters...);
  void (*large)(Large, Parameters...);
  int threads = kThreads;

  void run(const char* op, const Stream& stream, const List& list, const Parameters&... parameters) const {
    run_blocks(op, stream, list, 0, [](const List::Launch& part) { return part.chunks; }, parameters...);
  }

  // With another number of blocks than one per chunk, and dynamic shared memory.
  template <class Blocks>
  void run_blocks(const char* op, const Stream& stream, const List& list, int64_t shared_bytes, const Blocks& blocks,
                  const Parameters&... parameters) const {
    for (const List::Launch& part : list.launches(Large::max_tensors, Large::max_words)) {
      if (part.last - part.first <= size_t(Small::max_tensors) && part.words <= size_t(Small::max_words)) {
        run_part(op, stream, small, list, part, shared_bytes, blocks(part), parameters...);
      } else {
        run_part(op, stream, large, list, part, shared_bytes, blocks(part), parameters...);
      }
    }
  }

 private:
  template <class P>
  void run_part(const char* op, const Stream& stream, void (*kernel)(P, Parameters...), const List& list, const List::Launch& part,
                int64_t shared_bytes, int64_t blocks, const Parameters&... parameters) const {
    P packet;
    list.fill(part, packet);
    launch_shared(op, stream, blocks, threads, shared_bytes, kernel, packet, parameters...);
  }
};

template <class... Parameters>
using PacketKernel = KernelOf<SmallPacket, LargePacket, Parameters...>;

}  // namespace fastcl::cuda
