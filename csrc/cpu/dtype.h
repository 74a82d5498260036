// The element types that the kernels read and write.
#pragma once

namespace fuserl {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

constexpr int size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }  // bytes

}  // namespace fuserl
