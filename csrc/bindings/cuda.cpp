// sslkern._cuda: like cpu.cpp, for the kernels in csrc/cuda. Each call ends with the number of the device and a stream,
// the address that torch.cuda.Stream.cuda_stream gives.
#include "bindings/tensor.h"
#include "cuda/kernels.h"

namespace py = pybind11;
using namespace sslkern;
using cuda::OnDevice;

namespace {

cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of sslkern; called by sslkern.backends.cuda.";
  module.attr("FEW_UPDATES") = cuda::FEW_UPDATES;
  module.attr("ARCHITECTURES") = SSLKERN_CUDA_ARCHITECTURES;
  module.def("versions", [] {
    const cuda::Versions of = cuda::versions();
    return py::make_tuple(of.built, of.driver);
  });
  module.def("queue_push_",
             [](int queue_dtype, int keys_dtype, int64_t size, int64_t dim, int64_t batch, const py::object& queue,
                const py::object& ptr, const py::object& keys, bool normalize, int device, uintptr_t stream) {
               void* const to = data<void>(queue);
               int64_t* const at = data<int64_t>(ptr);
               const void* const from = data<void>(keys);
               py::gil_scoped_release release;
               const OnDevice on(device);
               cuda::queue_push(DType(queue_dtype), DType(keys_dtype), size, dim, batch, to, at, from, normalize,
                                stream_of(stream));
             });
  module.def("bank_update_", [](int bank_dtype, int x_dtype, int64_t size, int64_t dim, int64_t batch,
                                const py::object& bank, const py::object& index, const py::object& x, float momentum,
                                const py::object& last, int device, uintptr_t stream) {
    void* const to = data<void>(bank);
    const int64_t* const at = data<int64_t>(index);
    const void* const from = data<void>(x);
    int64_t* const spare = data<int64_t>(last);
    py::gil_scoped_release release;
    const OnDevice on(device);
    cuda::bank_update(DType(bank_dtype), DType(x_dtype), size, dim, batch, to, at, from, momentum, spare,
                      stream_of(stream));
  });
  module.def("sampled_similarity_fwd", [](int dtype, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count,
                                          const py::object& q, const py::object& bank, const py::object& index,
                                          const py::object& out, int device, uintptr_t stream) {
    const void *const of_q = data<void>(q), *const of_bank = data<void>(bank);
    const int64_t* const at = data<int64_t>(index);
    float* const to = data(out);
    py::gil_scoped_release release;
    const OnDevice on(device);
    cuda::sampled_similarity_fwd(DType(dtype), groups, n, m, d, count, of_q, of_bank, at, to, stream_of(stream));
  });
  module.def("sampled_similarity_parts", &cuda::sampled_similarity_parts);
  module.def("sampled_similarity_bwd", [](int dtype, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count,
                                          const py::object& bank, const py::object& index, const py::object& g,
                                          const py::object& dq, const py::object& sums, int device, uintptr_t stream) {
    const void* const of_bank = data<void>(bank);
    const int64_t* const at = data<int64_t>(index);
    const float* const from = data(g);
    float *const to_q = data(dq), *const spare = data(sums);
    py::gil_scoped_release release;
    const OnDevice on(device);
    cuda::sampled_similarity_bwd(DType(dtype), groups, n, m, d, count, of_bank, at, from, to_q, spare,
                                 stream_of(stream));
  });
  module.def("unit_pairs_fwd",
             [](int dtype, int64_t n, int64_t d, const py::object& x, const py::object& y, const py::object& z,
                const py::object& norm, const py::object& cosine, int device, uintptr_t stream) {
               const void *const from_x = data<void>(x), *const from_y = data<void>(y);
               void* const to_z = data<void>(z);
               float *const to_norm = data(norm), *const to_cosine = data(cosine);
               py::gil_scoped_release release;
               const OnDevice on(device);
               cuda::unit_pairs_fwd(DType(dtype), n, d, from_x, from_y, to_z, to_norm, to_cosine, stream_of(stream));
             });
  module.def("unit_pairs_bwd", [](int dtype, int64_t n, int64_t d, const py::object& z, const py::object& norm,
                                  const py::object& pull, const py::object& da, const py::object& db,
                                  const py::object& dx, const py::object& dy, int device, uintptr_t stream) {
    const void* const of_z = data<void>(z);
    const float *const of_norm = data(norm), *const of_pull = data(pull), *const of_a = data(da),
                       *const of_b = data(db);
    void *const to_x = data<void>(dx), *const to_y = data<void>(dy);
    py::gil_scoped_release release;
    const OnDevice on(device);
    cuda::unit_pairs_bwd(DType(dtype), n, d, of_z, of_norm, of_pull, of_a, of_b, to_x, to_y, stream_of(stream));
  });
}
