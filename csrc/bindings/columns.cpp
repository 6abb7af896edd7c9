// `_C.assemble_rows` and `_C.epoch_rows`: what a reader needs of files, on numpy arrays. Contracts: widedeep/_load.py.
#include "bindings/columns.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "core/permute.h"
#include "cpu/columns.h"
#include "cpu/order.h"

namespace widedeep {
namespace {

namespace py = pybind11;
using Parts = std::vector<py::array>;

[[noreturn]] void refuse(const std::string& what) { throw py::value_error("a reader's arrays: " + what); }

template <typename T>
bool holds(const py::array& a) {
  return a.dtype().equal(py::dtype::of<T>());
}

cpu::Stored stored_type(const py::array& a, const std::string& name) {
  if (holds<uint8_t>(a)) return cpu::Stored::u8;
  if (holds<uint16_t>(a)) return cpu::Stored::u16;
  if (holds<uint32_t>(a)) return cpu::Stored::u32;
  if (holds<float>(a)) return cpu::Stored::f32;
  if (holds<int64_t>(a)) return cpu::Stored::i64;
  if (a.dtype().equal(py::dtype("float16"))) return cpu::Stored::f16;
  refuse(name + " is stored as " + std::string(py::str(a.dtype())) + ", which no column is");
}

cpu::StoredColumn stored_column(const Parts& parts, const std::string& name, const std::vector<int64_t>& ends,
                                std::initializer_list<cpu::Stored> types, bool wide) {
  if (parts.size() != ends.size() || parts.empty()) refuse(name + " must have one piece for each part");
  cpu::StoredColumn column;
  column.type = stored_type(parts[0], name);
  column.width = parts[0].ndim() == 2 ? parts[0].shape(1) : 1;
  bool fits = false;
  for (const cpu::Stored type : types) fits |= type == column.type;
  if (!fits)
    refuse(name + " is stored as " + std::string(py::str(parts[0].dtype())) + ", as another kind of column is");
  for (size_t p = 0; p < parts.size(); ++p) {
    const py::array& a = parts[p];
    const int64_t rows = ends[p] - (p == 0 ? 0 : ends[p - 1]);
    const bool shape = a.ndim() == 1 || (wide && a.ndim() == 2 && a.shape(1) == column.width);
    if (!shape || a.shape(0) != rows || !(a.flags() & py::array::c_style) || stored_type(a, name) != column.type)
      refuse(name + " must be contiguous, of one type, [rows of the part] or, for ids, [rows of the part, hotness]");
    column.parts.push_back(a.data());
  }
  return column;
}

template <typename T>
void check(const py::array& a, const std::string& name, std::initializer_list<int64_t> shape) {
  bool fits = holds<T>(a) && (a.flags() & py::array::c_style) && a.ndim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; fits && i < a.ndim(); ++i) fits = a.shape(i) == shape.begin()[i];
  if (!fits) refuse(name + " must be a contiguous array of the type and shape that it is documented to have");
}

template <typename T>
T* matrix(py::array& a, const std::string& name, std::initializer_list<int64_t> shape) {
  check<T>(a, name, shape);
  return static_cast<T*>(a.mutable_data());
}

const int64_t* numbers(const py::array& a, const std::string& name, int64_t n) {
  check<int64_t>(a, name, {n});
  return static_cast<const int64_t*>(a.data());
}

void assemble(const std::vector<Parts>& tables, const std::vector<Parts>& numerics, const Parts& label,
              const std::optional<Parts>& group, const std::vector<int64_t>& ends, const py::array& rows,
              const std::optional<py::array>& slots, py::array out_ids, py::array out_numeric, py::array out_label,
              std::optional<py::array> out_group) {
  using cpu::Stored;
  if (ends.empty() && rows.size() == 0) return;
  cpu::StoredColumns from;
  from.ends = ends;
  int64_t K = 0;
  for (const Parts& parts : tables) {
    from.ids.push_back(stored_column(parts, "a table's ids", ends, {Stored::u8, Stored::u16, Stored::u32}, true));
    K += from.ids.back().width;
  }
  for (const Parts& parts : numerics)
    from.numeric.push_back(stored_column(parts, "a numeric column", ends, {Stored::f16, Stored::f32}, false));
  from.label = stored_column(label, "the label", ends, {Stored::u8}, false);
  if (group.has_value()) from.group = stored_column(*group, "the group", ends, {Stored::i64}, false);
  if (rows.ndim() != 1 || group.has_value() != out_group.has_value())
    refuse("expected rows [n], and out_group where there is a group");
  const int64_t n = rows.shape(0), N = static_cast<int64_t>(numerics.size());
  const int64_t* const picked = numbers(rows, "rows", n);
  const int64_t* const places = slots.has_value() ? numbers(*slots, "slots", n) : nullptr;
  const core::BatchRows to{matrix<int32_t>(out_ids, "ids", {n, K}), matrix<float>(out_numeric, "numeric", {n, N}),
                           matrix<float>(out_label, "label", {n}),
                           out_group.has_value() ? matrix<int64_t>(*out_group, "group", {n}) : nullptr};
  const py::gil_scoped_release released;
  for (int64_t i = 0; i < n; ++i)
    if (picked[i] < 0 || picked[i] >= ends.back() || (places && (places[i] < 0 || places[i] >= n)))
      throw py::index_error("assemble_rows: row " + std::to_string(picked[i]) + " is not within 0.." +
                            std::to_string(ends.back() - 1) + ", or its slot not within the batch");
  cpu::assemble_rows(from, picked, places, n, to);
}

void epoch_rows(int64_t rows, int64_t block_rows, int64_t window_rows, int64_t seed, int64_t epoch, int64_t start,
                py::array out) {
  const int64_t n = out.ndim() == 1 ? out.shape(0) : -1;
  if (n < 0 || start < 0 || rows < start || n > rows - start || rows > core::kMostOrdered || block_rows < 1 ||
      block_rows > core::kMostOrdered || window_rows < 1 || window_rows > core::kMostOrdered)
    throw py::index_error("epoch_rows: positions " + std::to_string(start) + " + " + std::to_string(n) +
                          " are not all within " + std::to_string(rows) + " rows, or a size is out of range");
  auto* const to = matrix<int64_t>(out, "out", {n});
  if (n == 0) return;
  const py::gil_scoped_release released;
  const core::EpochOrder order(rows, block_rows, window_rows, seed, epoch);
  cpu::OrderedRows ordered(order, start);
  for (int64_t i = 0; i < n; ++i) to[i] = ordered(start + i);
}

}  // namespace

void define_columns(py::module_& m) {
  m.def("assemble_rows", assemble);
  m.def("epoch_rows", epoch_rows);
}

}  // namespace widedeep
