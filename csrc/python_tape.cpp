#include "python_tape.h"

#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <vector>

#include "tape.h"

namespace py = pybind11;

namespace pfs {
namespace {

using Tensors = std::vector<at::Tensor>;

torch::jit::Stack results_of(const c10::FunctionSchema& schema, const py::object& results) {
  const auto& returns = schema.returns();
  if (returns.empty()) return {};
  if (returns.size() == 1) return {torch::jit::toIValue(results, returns[0].type())};
  const auto several = results.cast<py::tuple>();
  TORCH_CHECK_VALUE(several.size() == returns.size(), "Tape.add: results must be ", returns.size(),
                    " values, got ", several.size());
  torch::jit::Stack stack;
  for (size_t i = 0; i < returns.size(); ++i)
    stack.push_back(torch::jit::toIValue(several[i], returns[i].type()));
  return stack;
}

void add(Tape& tape, const std::string& name, const std::string& overload, const py::args& args,
         const py::kwargs& kwargs, const py::object& results) {
  const c10::OperatorHandle op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  const torch::jit::ToIValueAllowNumbersAsTensors numbers(true);
  torch::jit::Stack arguments =
      torch::jit::createStackForSchema(op.schema(), args, kwargs, std::nullopt);
  tape.add(op, std::move(arguments), results_of(op.schema(), results));
}

}  // namespace

void bind_tape(py::module_& m) {
  // wrap_pybind_function: errors become PyTorch's.
  py::class_<Tape, std::shared_ptr<Tape>>(m, "Tape", "See pfs_fast/searching/tape.py.")
      .def(py::init<const Tensors&, const Tensors&>(), py::arg("inputs"), py::arg("fixed"))
      .def("add", torch::wrap_pybind_function(
                      [](Tape& tape, const std::string& name, const std::string& overload,
                         const py::tuple& args, const py::dict& kwargs, const py::object& results) {
                        add(tape, name, overload, py::args(args), py::kwargs(kwargs), results);
                      }))
      .def("finish", torch::wrap_pybind_function(
                         [](Tape& tape, const Tensors& outputs) { tape.finish(outputs); }))
      .def("replay", torch::wrap_pybind_function_no_gil(
                         [](const Tape& tape, const Tensors& inputs) { return tape.replay(inputs); }))
      .def_property_readonly("num_calls", &Tape::num_calls);
}

}  // namespace pfs
