// A sequence of operator calls, recorded once and made again: without Python, and below autograd.
//
// Whoever records passes every call on after it was made. A tensor that a call reads must be an input
// of the tape, the result of an earlier call, or share the memory of a fixed tensor; any other was
// made behind the recorder's back, and would be stale in the next replay.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace pfs {

class Tape {
 public:
  // inputs: what replay() will be given anew. fixed: tensors that stay where they are.
  Tape(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& fixed);
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  // A call that was made with these arguments and gave these results; both as its schema has them.
  // Throws a ValueError for one that cannot be made again.
  void add(const c10::OperatorHandle& op, torch::jit::Stack arguments,
           const torch::jit::Stack& results);

  // Ends the recording; replay() returns these. Each must be an input or a result.
  void finish(const std::vector<at::Tensor>& outputs);

  // Makes all calls again. inputs: as many as there were, with the same shapes, dtypes and strides.
  std::vector<at::Tensor> replay(const std::vector<at::Tensor>& inputs) const;

  int64_t num_calls() const { return static_cast<int64_t>(calls_.size()); }

 private:
  static constexpr int32_t kConstant = -1;  // no slot: stays as it was recorded

  // The slots of an argument or result that is a tensor or a list of tensors, by number.
  struct Place {
    size_t index;
    bool list;
    std::vector<int32_t> slots;
  };
  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;       // undefined tensors where slots are read
    std::vector<Place> reads, writes;  // of arguments, of results
    std::vector<int32_t> done;         // slots that no later call reads
  };

  int32_t slot_of(const Call& call, const at::Tensor& tensor) const;
  void read(Call& call, size_t argument) const;
  void write(Call& call, size_t index, const c10::IValue& result);
  int32_t slot_of_result(const at::Tensor& tensor);
  int32_t new_slot(const at::Tensor& tensor);

  std::vector<Call> calls_;
  std::vector<int32_t> outputs_;
  size_t num_inputs_;
  int32_t num_slots_ = 0;

  // While recording. The weak references keep addresses from being used again, not memory from being
  // freed.
  using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  struct Known {
    WeakTensor tensor;
    int32_t slot;
  };
  bool recording_ = true;
  std::unordered_map<const c10::TensorImpl*, Known> known_;
  std::unordered_map<const c10::StorageImpl*, c10::Storage> fixed_;
};

}  // namespace pfs
