// The Python module pfs_fast._C. Importing it runs the registrations of the other files; it adds
// what the library can say about itself, and the classes that Python holds. Python.h is included
// here and in python_tape.cpp alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/direct_conv.h"
#include "cpu/kept_memory.h"
#include "pfs_ops.h"
#include "python_tape.h"

#define PFS_STRINGIFY_(x) #x
#define PFS_STRINGIFY(x) PFS_STRINGIFY_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled operators of pfs_fast (torch.ops.pfs_fast).";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = PFS_STRINGIFY(PFS_FAST_TORCH_VERSION);
#ifdef __VERSION__
        info["compiler"] = __VERSION__;
#endif
#ifdef PFS_FAST_WITH_CUDA
        info["cuda"] = true;
        info["cuda_archs"] = PFS_STRINGIFY(PFS_FAST_CUDA_ARCHS);
#else
        info["cuda"] = false;
        info["cuda_archs"] = "";
#endif
        return info;
      },
      "What this library was built with.");
  m.def(
      "cpu_isa", [] { return std::string(pfs::cpu_isa()); },
      "Instruction set of the CPU kernels in this process.");
  m.def(
      "direct_conv_pays",
      [](const std::vector<int64_t>& weight_size, const std::vector<int64_t>& stride,
         const std::vector<int64_t>& dilation, int64_t groups) {
        return pfs::cpu::direct_conv_pays(weight_size, stride, dilation, groups);
      },
      "Whether frozen_conv has a kernel of its own for a weight of size [C_out, C_in / groups, "
      "*kernel] and float32 images in channels_last on the CPU.");
  pybind11::class_<pfs::cpu::KeptMemory>(
      m, "KeptMemory", "See pfs_fast/searching/kept_memory.py.")
      .def(pybind11::init<>())
      .def("enter", &pfs::cpu::KeptMemory::enter)
      .def("exit", &pfs::cpu::KeptMemory::exit);
  m.def(
      "kept_bytes",
      [] {
        const pfs::cpu::KeptBytes bytes = pfs::cpu::kept_bytes();
        return std::pair<int64_t, int64_t>(bytes.in_use, bytes.free);
      },
      "(bytes in use, bytes kept free) of the blocks of KeptMemory.");
  pfs::bind_tape(m);
}
