// The module fastdpo._C. Addresses arrive as integers and a stream as its handle, so that no torch header is needed and
// one build serves every torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common.h"

#ifndef FASTDPO_CUDA_ARCHS
#define FASTDPO_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using fastdpo::DType;
using fastdpo::RowArgs;

namespace {

template <class T>
void address(py::class_<RowArgs>& args, const char* name, T* RowArgs::*member) {
  args.def_property(
      name, [member](const RowArgs& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](RowArgs& self, uintptr_t value) { self.*member = reinterpret_cast<T*>(value); });
}

void bind_row_args(py::module_& module) {
  py::enum_<DType>(module, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);

  py::class_<RowArgs> args(module, "RowArgs");
  args.def(py::init<>())
      .def_readwrite("rows", &RowArgs::rows)
      .def_readwrite("vocab", &RowArgs::vocab)
      .def_readwrite("logits_dtype", &RowArgs::logits_dtype)
      .def_readwrite("logits_stride", &RowArgs::logits_stride)
      .def_readwrite("scale", &RowArgs::scale)
      .def_readwrite("softcap", &RowArgs::softcap)
      .def_readwrite("temperature", &RowArgs::temperature)
      .def_readwrite("d_dtype", &RowArgs::d_dtype)
      .def_readwrite("d_stride", &RowArgs::d_stride);
  address(args, "logits", &RowArgs::logits);
  address(args, "labels", &RowArgs::labels);
  address(args, "bias", &RowArgs::bias);
  address(args, "logps", &RowArgs::logps);
  address(args, "lse", &RowArgs::lse);
  address(args, "entropy", &RowArgs::entropy);
  address(args, "log_sum_sq_probs", &RowArgs::log_sum_sq_probs);
  address(args, "mean_logit", &RowArgs::mean_logit);
  address(args, "is_top1", &RowArgs::is_top1);
  address(args, "target_logits", &RowArgs::target_logits);
  address(args, "d_out", &RowArgs::d_out);
  address(args, "grad_coeffs", &RowArgs::grad_coeffs);
}

#ifdef FASTDPO_WITH_CUDA
void cuda_row_kernel(const RowArgs& args, uintptr_t stream) {
  const int code = fastdpo_cuda_row_kernel(args, reinterpret_cast<void*>(stream));
  if (code != 0) {
    throw std::runtime_error(std::string("CUDA row kernel: ") + fastdpo_cuda_error_string(code));
  }
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ and CUDA kernels of fastdpo; fastdpo.kernels is the way in.";
  module.attr("compiler") = FASTDPO_COMPILER;
  module.attr("cuda_archs") = FASTDPO_CUDA_ARCHS;
  bind_row_args(module);
  module.def("cpu_row_kernel", &fastdpo_cpu_row_kernel, py::arg("args"), py::arg("threads"),
             py::call_guard<py::gil_scoped_release>());
#ifdef FASTDPO_WITH_CUDA
  module.attr("built_with_cuda") = true;
  module.def("cuda_row_kernel", &cuda_row_kernel, py::arg("args"), py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
#else
  module.attr("built_with_cuda") = false;
#endif
}
