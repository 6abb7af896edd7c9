// What module.cpp takes from columns.cpp.
#pragma once
#include <pybind11/pybind11.h>

namespace widedeep {

void define_columns(pybind11::module_& m);

}  // namespace widedeep
