#pragma once
#include <cstdint>

namespace thrust {

template <typename Function, typename Iterator>
struct transform_iterator {
  Iterator iterator;
  Function function;
  transform_iterator(Iterator iterator, Function function) : iterator(iterator), function(function) {}
  auto operator[](int64_t i) const { return function(iterator[i]); }
};

}  // namespace thrust
