// The element types that the kernels read and write.
#pragma once

namespace fuserl {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

}  // namespace fuserl
