#include "tape.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <utility>

namespace pfs {
namespace {

using c10::IValue;
using torch::jit::Stack;
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

bool is_tensors(const IValue& value) {
  return value.isTensorList() || value.isOptionalTensorList();
}

std::vector<at::Tensor> tensors_of(const IValue& list) {
  std::vector<at::Tensor> tensors;
  if (list.isTensorList()) {
    for (const at::Tensor tensor : list.toTensorList()) tensors.push_back(tensor);
  } else {
    for (const std::optional<at::Tensor> tensor : list.toOptionalTensorList())
      tensors.push_back(tensor.value_or(at::Tensor()));
  }
  return tensors;
}

// A new list in which the tensors of slots stand in for those of `list`.
template <class Slots>
IValue with_slots(const IValue& list, const std::vector<int32_t>& slots, const Slots& tensor_in) {
  if (list.isTensorList()) {
    c10::List<at::Tensor> copy = list.toTensorList().copy();
    for (size_t i = 0; i < slots.size(); ++i) {
      if (slots[i] >= 0) copy.set(i, tensor_in(slots[i]));
    }
    return copy;
  }
  OptionalTensors copy = list.toOptionalTensorList().copy();
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= 0) copy.set(i, tensor_in(slots[i]));
  }
  return copy;
}

const c10::StorageImpl* storage_of(const at::Tensor& tensor) {
  return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
}

}  // namespace

Tape::Tape(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& fixed)
    : num_inputs_(inputs.size()) {
  for (const at::Tensor& tensor : inputs) new_slot(tensor);
  for (const at::Tensor& tensor : fixed) {
    if (storage_of(tensor) != nullptr) fixed_.try_emplace(storage_of(tensor), tensor.storage());
  }
}

int32_t Tape::new_slot(const at::Tensor& tensor) {
  known_.insert_or_assign(tensor.unsafeGetTensorImpl(),
                          Known{WeakTensor(tensor.getIntrusivePtr()), num_slots_});
  return num_slots_++;
}

int32_t Tape::slot_of(const Call& call, const at::Tensor& tensor) const {
  if (!tensor.defined()) return kConstant;
  const auto found = known_.find(tensor.unsafeGetTensorImpl());
  if (found != known_.end()) return found->second.slot;
  // A number that the schema takes as a tensor.
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) return kConstant;
  TORCH_CHECK_VALUE(fixed_.count(storage_of(tensor)) > 0, call.op.operator_name(),
                    " reads a tensor of shape ", tensor.sizes(),
                    " that no operator of the step has made");
  return kConstant;
}

void Tape::read(Call& call, size_t argument) const {
  IValue& value = call.arguments[argument];
  Place place{argument, is_tensors(value), {}};
  if (place.list) {
    for (const at::Tensor& tensor : tensors_of(value)) place.slots.push_back(slot_of(call, tensor));
  } else if (value.isTensor()) {
    place.slots.push_back(slot_of(call, value.toTensor()));
  }
  bool constant = true;
  for (const int32_t slot : place.slots) constant = constant && slot == kConstant;
  if (constant) return;
  // A recorded tensor must not live on here.
  value = place.list ? with_slots(value, place.slots, [](int32_t) { return at::Tensor(); })
                     : IValue(at::Tensor());
  call.reads.push_back(std::move(place));
}

int32_t Tape::slot_of_result(const at::Tensor& tensor) {
  if (!tensor.defined()) return kConstant;
  const auto found = known_.find(tensor.unsafeGetTensorImpl());
  return found != known_.end() ? found->second.slot : new_slot(tensor);
}

void Tape::write(Call& call, size_t index, const IValue& result) {
  Place place{index, is_tensors(result), {}};
  if (place.list) {
    for (const at::Tensor& tensor : tensors_of(result))
      place.slots.push_back(slot_of_result(tensor));
  } else {
    TORCH_CHECK_VALUE(result.isTensor(), call.op.operator_name(),
                      " gives a value that is no tensor, on which the rest of the step may depend");
    place.slots.push_back(slot_of_result(result.toTensor()));
  }
  call.writes.push_back(std::move(place));
}

void Tape::add(const c10::OperatorHandle& op, Stack arguments, const Stack& results) {
  TORCH_CHECK(recording_, "Tape.add: the tape must not be finished");
  Call call{op, std::move(arguments), {}, {}, {}};
  for (size_t i = 0; i < call.arguments.size(); ++i) read(call, i);
  for (size_t i = 0; i < results.size(); ++i) write(call, i, results[i]);
  calls_.push_back(std::move(call));
}

void Tape::finish(const std::vector<at::Tensor>& outputs) {
  TORCH_CHECK(recording_, "Tape.finish: the tape must not be finished");
  std::vector<bool> used(num_slots_, false);
  for (const at::Tensor& tensor : outputs) {
    const auto found = known_.find(tensor.unsafeGetTensorImpl());
    TORCH_CHECK_VALUE(found != known_.end(), "an output of shape ", tensor.sizes(),
                      " is a tensor that no operator of the step has made");
    outputs_.push_back(found->second.slot);
    used[found->second.slot] = true;
  }
  for (auto call = calls_.rbegin(); call != calls_.rend(); ++call) {
    for (const auto* places : {&call->reads, &call->writes}) {
      for (const Place& place : *places) {
        for (const int32_t slot : place.slots) {
          if (slot == kConstant || used[slot]) continue;
          used[slot] = true;
          call->done.push_back(slot);
        }
      }
    }
  }
  known_.clear();
  recording_ = false;
}

std::vector<at::Tensor> Tape::replay(const std::vector<at::Tensor>& inputs) const {
  TORCH_CHECK(!recording_, "Tape.replay: the tape must be finished");
  TORCH_CHECK_VALUE(inputs.size() == num_inputs_, "Tape.replay: inputs must be ", num_inputs_,
                    " tensors, got ", inputs.size());
  // What was recorded is what autograd, the tracking of views and autocast had asked for.
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard no_casts(c10::autocast_dispatch_keyset);
  std::vector<at::Tensor> slots(inputs);
  slots.resize(num_slots_);
  const auto tensor_in = [&](int32_t slot) { return slots[slot]; };
  Stack stack;
  for (const Call& call : calls_) {
    stack.assign(call.arguments.begin(), call.arguments.end());
    for (const Place& place : call.reads) {
      IValue& value = stack[place.index];
      value = place.list ? with_slots(value, place.slots, tensor_in)
                         : IValue(slots[place.slots.front()]);
    }
    call.op.callBoxed(stack);
    for (const Place& place : call.writes) {
      const IValue& result = stack[place.index];
      if (place.list) {
        const std::vector<at::Tensor> made = tensors_of(result);
        for (size_t i = 0; i < place.slots.size(); ++i) {
          if (place.slots[i] != kConstant) slots[place.slots[i]] = made[i];
        }
      } else if (place.slots.front() != kConstant) {
        slots[place.slots.front()] = result.toTensor();
      }
    }
    stack.clear();
    for (const int32_t slot : call.done) slots[slot] = at::Tensor();
  }
  std::vector<at::Tensor> outputs;
  for (const int32_t slot : outputs_) outputs.push_back(slots[slot]);
  return outputs;
}

}  // namespace pfs
