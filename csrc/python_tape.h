// The class Tape of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace pfs {

void bind_tape(pybind11::module_& m);

}  // namespace pfs
