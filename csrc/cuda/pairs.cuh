// Element-wise ops over a list of pairs (written, read), grouped by their dtypes: one launch per pair of dtypes and packet.
#pragma once

#include <map>

#include "core/dtypes.h"
#include "cuda/multi_tensor.cuh"

namespace fastcl::cuda {

template <class W, class R, class Op, class P>
__global__ void __launch_bounds__(kThreads) pair_kernel(const __grid_constant__ P packet, const Op op) {
  pair_thread<W, R>(packet, blockIdx.x, int(threadIdx.x), op);
}

// What a pair of dtypes needs. An op is a table of these.
struct PairType {
  int run;
  int64_t chunk;
  void (*launch)(const char* name, const Stream& stream, const List& list, double parameter);
};
using PairTable = PairType (*)(DType written, DType read);

template <class W, class R, class Op>
PairType pair_type() {
  return {pair_run<W, R>, pair_chunk<W, R>, [](const char* name, const Stream& stream, const List& list, double parameter) {
            PacketKernel<Op>{pair_kernel<W, R, Op, SmallPacket>, pair_kernel<W, R, Op, LargePacket>}.run(name, stream, list,
                                                                                                         Op::make(parameter));
          }};
}

inline void run_pairs(const char* name, const char* argument, const Views& written, const Views& read, PairTable table, double parameter,
                      const Stream& stream) {
  struct Group {
    PairType type;
    List list;
  };
  std::map<std::pair<DType, DType>, Group> groups;
  for (size_t i = 0; i < written.size(); ++i) {
    if (written[i].numel() == 0) continue;
    const std::pair<DType, DType> key{written[i].dtype, read[i].dtype};
    auto group = groups.find(key);
    if (group == groups.end()) {
      const PairType type = table(key.first, key.second);
      group = groups.emplace(key, Group{type, List(2, type.chunk, true, false)}).first;
    }
    const View* both[] = {&written[i], &read[i]};
    if (const char* reason = group->second.list.add(both, group->second.type.run)) throw Refusal(argument, i, reason);
  }
  if (groups.empty()) return;
  const DeviceGuard guard(stream, name);
  for (const auto& [key, group] : groups) group.type.launch(name, stream, group.list, parameter);
}

}  // namespace fastcl::cuda
