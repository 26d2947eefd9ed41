// The Python module cmdp_fast._C. Pointers, shapes and strides come in; nothing here knows about torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "calls.h"
#include "cpu/machine.h"
#include "deadline.h"
#include "token_state.h"

namespace py = pybind11;
using namespace cmdp;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of cmdp_fast: pointers, shapes and strides in, no framework.";

  py::class_<Matrix>(module, "Matrix", "Rows of logits at an address: leading sizes and strides in elements.")
      .def(py::init(&make_matrix), py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("width"))
      .def_readonly("rows", &Matrix::rows)
      .def_readonly("width", &Matrix::width);

  // The state's algebra itself, for tests and for readers.
  py::class_<TokenState>(module, "TokenState", "The mergeable state of one token (csrc/token_state.h).")
      .def(py::init(&TokenState::empty))
      .def("push", &TokenState::push)
      .def("push_block",
           [](TokenState& state, const std::vector<double>& x, const std::vector<double>& y) {
             if (x.size() != y.size()) fail("push_block needs as many columns of the student as of the teacher");
             state.push_block(x.data(), y.data(), static_cast<int64_t>(x.size()));
           })
      .def("label", &TokenState::label)
      .def("raise_to", &TokenState::raise)
      .def("merge", &TokenState::merge)
      .def("finish", [](const TokenState& state) { return state.finish().in_order(); })
      .def("fields", [](const TokenState& s) {
        return std::array<double, TokenState::kFields>{s.m, s.n, s.z,  s.u,  s.a,     s.b,
                                                       s.h, s.k, s.xa, s.ya, s.r_inf, s.f_inf};
      });

#if defined(__unix__) || defined(__APPLE__)
  py::class_<Deadline>(module, "Deadline", "Ends the process at a moment, if it is not called off (csrc/deadline.h).")
      .def(py::init<double, std::string, int>(), py::arg("seconds"), py::arg("line"), py::arg("code"))
      .def("call_off", &Deadline::call_off);
  module.def("end_in", [](double seconds, int code) { new Deadline(seconds, "", code); });
#endif

  module.attr("SAVED") = kSaved;
  module.attr("STATE") = StoredState::kNumbers;
  // Other threads of Python run meanwhile: a call has its arguments as plain numbers, and touches nothing of Python's.
  const auto call = [&module](const char* name, auto function, auto&&... extra) {
    module.def(name, function, py::call_guard<py::gil_scoped_release>(), extra...);
  };
  call("token_stats", &calls::token_stats);
  call("token_stats_backward", &calls::token_stats_backward, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
       py::arg("mask"), py::arg("vocab"), py::arg("temperature"), py::arg("upstream"), py::arg("saved"), py::arg("out"),
       py::arg("threads"), py::arg("first_column") = 0);
  call("mixture", &calls::mixture);
  call("mixture_backward", &calls::mixture_backward);
  call("update_states", &calls::update_states, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
       py::arg("first_column"), py::arg("temperature"), py::arg("states"), py::arg("threads"), py::arg("mask") = 0);
  call("update_tails", &calls::update_tails);
  call("tail_backward", &calls::tail_backward);
  call("budget_trace", &calls::budget_trace);
  call("modified_reward", &calls::modified_reward);

  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  module.def("variants", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (const Variant& variant : variants()) all.emplace_back(variant.table->name, variant.supported);
    return all;
  });
  module.def("variant", [] { return std::string(kernels().name); });
  module.def("set_variant", [](const std::string& name) { active_variant = variant_named(name); });
  module.def("cpu_features", &cpu_features);
  module.attr("SOURCES") = CMDP_SOURCES;      // a hash of the files that it was built from
  module.attr("CUDA_NOTE") = CMDP_CUDA_NOTE;  // why cmdp_fast._cuda was not built with it; empty if it was
#ifdef _OPENMP
  module.attr("OPENMP") = true;
  module.def("forked_late", [] { return threading.forked_late.load(); });
#else
  module.attr("OPENMP") = false;
  module.def("forked_late", [] { return false; });
#endif
}
