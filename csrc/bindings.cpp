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
using fastdpo::DArgs;
using fastdpo::DivergenceArgs;
using fastdpo::DType;
using fastdpo::HeadArgs;
using fastdpo::PerPair;
using fastdpo::RowArgs;
using fastdpo::SequenceArgs;
using fastdpo::SigmoidArgs;

namespace {

template <class Class, class Args, class T>
void address(Class& args, const char* name, T* Args::*member) {
  args.def_property(
      name, [member](const Args& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](Args& self, uintptr_t value) { self.*member = reinterpret_cast<T*>(value); });
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

void bind_divergence_args(py::module_& module) {
  py::class_<HeadArgs> head(module, "HeadArgs");
  head.def(py::init<>())
      .def_readwrite("stride", &HeadArgs::stride)
      .def_readwrite("scale", &HeadArgs::scale)
      .def_readwrite("softcap", &HeadArgs::softcap)
      .def_readwrite("temperature", &HeadArgs::temperature);
  address(head, "logits", &HeadArgs::logits);
  address(head, "bias", &HeadArgs::bias);

  py::class_<DArgs> d_out(module, "DArgs");
  d_out.def(py::init<>()).def_readwrite("dtype", &DArgs::dtype).def_readwrite("stride", &DArgs::stride);
  address(d_out, "d", &DArgs::d);

  py::class_<DivergenceArgs> args(module, "DivergenceArgs");
  args.def(py::init<>())
      .def_readwrite("rows", &DivergenceArgs::rows)
      .def_readwrite("vocab", &DivergenceArgs::vocab)
      .def_readwrite("policy", &DivergenceArgs::policy)
      .def_readwrite("first", &DivergenceArgs::first)
      .def_readwrite("second", &DivergenceArgs::second)
      .def_readwrite("first_slope", &DivergenceArgs::first_slope)
      .def_readwrite("second_slope", &DivergenceArgs::second_slope)
      .def_readwrite("jsd_beta", &DivergenceArgs::jsd_beta)
      .def_readwrite("d_out", &DivergenceArgs::d_out)
      .def_readwrite("logps_d_out", &DivergenceArgs::logps_d_out);
  address(args, "labels", &DivergenceArgs::labels);
  address(args, "coefficients", &DivergenceArgs::coefficients);
  address(args, "forward_kl", &DivergenceArgs::forward_kl);
  address(args, "reverse_kl", &DivergenceArgs::reverse_kl);
  address(args, "jsd", &DivergenceArgs::jsd);
  address(args, "logps", &DivergenceArgs::logps);
  address(args, "l1_distance", &DivergenceArgs::l1_distance);
  address(args, "ref_logps", &DivergenceArgs::ref_logps);
  address(args, "grad_coeffs", &DivergenceArgs::grad_coeffs);
}

void bind_sequence_args(py::module_& module) {
  py::class_<SequenceArgs> args(module, "SequenceArgs");
  args.def(py::init<>())
      .def_readwrite("tokens", &SequenceArgs::tokens)
      .def_readwrite("sequences", &SequenceArgs::sequences);
  address(args, "values", &SequenceArgs::values);
  address(args, "weights", &SequenceArgs::weights);
  address(args, "mask", &SequenceArgs::mask);
  address(args, "offsets", &SequenceArgs::offsets);
  address(args, "sums", &SequenceArgs::sums);

  py::class_<PerPair> per_pair(module, "PerPair");
  per_pair.def(py::init<>()).def_readwrite("number", &PerPair::number);
  address(per_pair, "values", &PerPair::values);

  py::class_<SigmoidArgs, SequenceArgs> pairs(module, "SigmoidArgs");
  pairs.def(py::init<>())
      .def_readwrite("beta", &SigmoidArgs::beta)
      .def_readwrite("margin", &SigmoidArgs::margin)
      .def_readwrite("preferred", &SigmoidArgs::preferred)
      .def_readwrite("pair_weights", &SigmoidArgs::pair_weights)
      .def_readwrite("divisor", &SigmoidArgs::divisor);
  address(pairs, "ref_sums", &SigmoidArgs::ref_sums);
  address(pairs, "pair_losses", &SigmoidArgs::pair_losses);
  address(pairs, "loss", &SigmoidArgs::loss);
  address(pairs, "g", &SigmoidArgs::g);
  address(pairs, "counter", &SigmoidArgs::counter);
}

#ifdef FASTDPO_WITH_CUDA
// A launch that raises what it returns.
template <class Args, int (*launch)(const Args&, void*)>
void cuda_launch(const Args& args, uintptr_t stream) {
  const int code = launch(args, reinterpret_cast<void*>(stream));
  if (code != 0) throw std::runtime_error(std::string("CUDA kernel: ") + fastdpo_cuda_error_string(code));
}

// The error (0: none), what it means, and the architecture of the code that the device runs.
py::tuple cuda_probe() {
  int code_version = 0, error = 0;
  {
    py::gil_scoped_release release;
    error = fastdpo_cuda_probe(&code_version);
  }
  return py::make_tuple(error, error == 0 ? "" : fastdpo_cuda_error_string(error), code_version);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ and CUDA kernels of fastdpo; fastdpo.kernels is the way in.";
  module.attr("compiler") = FASTDPO_COMPILER;
  module.attr("cuda_archs") = FASTDPO_CUDA_ARCHS;
  bind_row_args(module);
  bind_divergence_args(module);
  bind_sequence_args(module);
  const auto def_cpu = [&](const char* name, auto kernel) {
    module.def(name, kernel, py::arg("args"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  };
  def_cpu("cpu_row_kernel", &fastdpo_cpu_row_kernel);
  def_cpu("cpu_divergence_kernel", &fastdpo_cpu_divergence_kernel);
  def_cpu("cpu_sequence_sums", &fastdpo_cpu_sequence_sums);
  def_cpu("cpu_sigmoid_pairs", &fastdpo_cpu_sigmoid_pairs);
#ifdef FASTDPO_WITH_CUDA
  const auto def_cuda = [&](const char* name, auto kernel) {
    module.def(name, kernel, py::arg("args"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  };
  module.attr("built_with_cuda") = true;
  module.attr("cuda_runtime_version") = fastdpo_cuda_runtime_version();
  module.def("cuda_driver_version", &fastdpo_cuda_driver_version);
  module.def("cuda_probe", &cuda_probe);
  def_cuda("cuda_row_kernel", &cuda_launch<RowArgs, fastdpo_cuda_row_kernel>);
  def_cuda("cuda_sequence_sums", &cuda_launch<SequenceArgs, fastdpo_cuda_sequence_sums>);
  def_cuda("cuda_sigmoid_pairs", &cuda_launch<SigmoidArgs, fastdpo_cuda_sigmoid_pairs>);
#else
  module.attr("built_with_cuda") = false;
#endif
}
