// What the optimizers' launches share.
#pragma once

#include "cuda/multi_tensor.cuh"
#include "cuda/ops.h"
#include "cuda/optimizers_plan.h"

namespace fastcl::cuda {

// Counts the steps, if they are to advance, and works out what they multiply by. Null: there are no steps.
const StepRow* prepare(const char* name, const List& steps, const Preparation& how, StepRow* rows, const Stream& stream);

}  // namespace fastcl::cuda
