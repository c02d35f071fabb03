// The current device, versions, and errors as exceptions.
#include <stdexcept>
#include <string>

#include "device.h"

namespace sslkern::cuda {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string("sslkern: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; build sslkern on this machine, or set SSLKERN_CUDA=0 to go on without its CUDA module";
  throw std::runtime_error(message);
}

OnDevice::OnDevice(int device) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
}

OnDevice::~OnDevice() {
  if (before_ != device_) cudaSetDevice(before_);
}

Versions versions() {
  Versions of{CUDART_VERSION, 0};
  if (cudaDriverGetVersion(&of.driver) != cudaSuccess) of.driver = 0;
  return of;
}

}  // namespace sslkern::cuda
