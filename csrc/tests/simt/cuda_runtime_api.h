// The part of CUDA's runtime header that the launchers name, for builds on the SIMT executor.
#pragma once

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
