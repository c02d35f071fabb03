// sslkern._cuda: like cpu.cpp, for the kernels in csrc/cuda. Each call ends with the number of the device and a stream,
// the address that torch.cuda.Stream.cuda_stream gives.
#include "bindings/tensor.h"
#include "cuda/kernels.h"

namespace py = pybind11;
using namespace sslkern;
using cuda::OnDevice;

namespace {

cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

Tensors on(int device) {
#ifdef SSLKERN_EMULATED
  return Tensors(tensor::ON_CPU);
#else
  return Tensors({tensor::Device::CUDA, device});
#endif
}

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
               const DType queue_type = DType(queue_dtype), keys_type = DType(keys_dtype);
               const Tensors tensors = on(device);
               void* const to = tensors.write(queue_type, "queue", queue, size * dim);
               int64_t* const at = tensors.write<int64_t>("ptr", ptr, 1);
               const void* const from = tensors.read(keys_type, "keys", keys, batch * dim);
               py::gil_scoped_release release;
               const OnDevice there(device);
               cuda::queue_push(queue_type, keys_type, size, dim, batch, to, at, from, normalize, stream_of(stream));
             });
  module.def("bank_update_", [](int bank_dtype, int x_dtype, int64_t size, int64_t dim, int64_t batch,
                                const py::object& bank, const py::object& index, const py::object& x, float momentum,
                                const py::object& last, int device, uintptr_t stream) {
    const DType bank_type = DType(bank_dtype), x_type = DType(x_dtype);
    const Tensors tensors = on(device);
    void* const to = tensors.write(bank_type, "bank", bank, size * dim);
    const int64_t* const at = tensors.read<int64_t>("index", index, batch);
    const void* const from = tensors.read(x_type, "x", x, batch * dim);
    int64_t* const spare = tensors.write_or_null<int64_t>("last", last, size);
    py::gil_scoped_release release;
    const OnDevice there(device);
    cuda::bank_update(bank_type, x_type, size, dim, batch, to, at, from, momentum, spare, stream_of(stream));
  });
  module.def("sampled_similarity_fwd", [](int dtype, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count,
                                          const py::object& q, const py::object& bank, const py::object& index,
                                          const py::object& out, int device, uintptr_t stream) {
    const DType type = DType(dtype);
    const Tensors tensors = on(device);
    const void *const of_q = tensors.read(type, "q", q, groups * n * d), *const of_bank = tensors.read(
                                                                             type, "bank", bank, groups * m * d);
    const int64_t* const at = tensors.read<int64_t>("index", index, groups * n * count);
    float* const to = tensors.write("out", out, groups * n * count);
    py::gil_scoped_release release;
    const OnDevice there(device);
    cuda::sampled_similarity_fwd(type, groups, n, m, d, count, of_q, of_bank, at, to, stream_of(stream));
  });
  module.def("sampled_similarity_parts", &cuda::sampled_similarity_parts);
  module.def("sampled_similarity_bwd", [](int dtype, int64_t groups, int64_t n, int64_t m, int64_t d, int64_t count,
                                          const py::object& bank, const py::object& index, const py::object& g,
                                          const py::object& dq, const py::object& sums, int device, uintptr_t stream) {
    const DType type = DType(dtype);
    const Tensors tensors = on(device);
    const int64_t rows = groups * n, parts = cuda::sampled_similarity_parts(rows, d, count);
    const void* const of_bank = tensors.read(type, "bank", bank, groups * m * d);
    const int64_t* const at = tensors.read<int64_t>("index", index, rows * count);
    const float* const from = tensors.read("g", g, rows * count);
    float *const to_q = tensors.write("dq", dq, rows * d), *const spare =
                                                               parts > 1 ? tensors.write("sums", sums, rows * parts * d)
                                                                         : nullptr;
    py::gil_scoped_release release;
    const OnDevice there(device);
    cuda::sampled_similarity_bwd(type, groups, n, m, d, count, of_bank, at, from, to_q, spare, stream_of(stream));
  });
  module.def("unit_pairs_fwd", [](int dtype, int64_t n, int64_t d, const py::object& x, const py::object& y,
                                  const py::object& z, const py::object& norm, const py::object& cosine, int device,
                                  uintptr_t stream) {
    const DType type = DType(dtype);
    const Tensors tensors = on(device);
    const void *const from_x = tensors.read(type, "x", x, n * d), *const from_y = tensors.read(type, "y", y, n * d);
    void* const to_z = tensors.write(type, "z", z, 2 * n * d);
    float *const to_norm = tensors.write_or_null("norm", norm, 2 * n), *const to_cosine =
                                                                           tensors.write("cosine", cosine, n);
    py::gil_scoped_release release;
    const OnDevice there(device);
    cuda::unit_pairs_fwd(type, n, d, from_x, from_y, to_z, to_norm, to_cosine, stream_of(stream));
  });
  module.def("unit_pairs_bwd", [](int dtype, int64_t n, int64_t d, const py::object& z, const py::object& norm,
                                  const py::object& pull, const py::object& da, const py::object& db,
                                  const py::object& dx, const py::object& dy, int device, uintptr_t stream) {
    const DType type = DType(dtype);
    const Tensors tensors = on(device);
    const void* const of_z = tensors.read(type, "z", z, 2 * n * d);
    const float *const of_norm = tensors.read_or_null("norm", norm, 2 * n),
                       *const of_pull = tensors.read("pull", pull, n),
                       *const of_a = tensors.read_or_null("da", da, n * d),
                       *const of_b = tensors.read_or_null("db", db, n * d);
    void *const to_x = tensors.write_or_null(type, "dx", dx, n * d), *const to_y =
                                                                         tensors.write_or_null(type, "dy", dy, n * d);
    py::gil_scoped_release release;
    const OnDevice there(device);
    cuda::unit_pairs_bwd(type, n, d, of_z, of_norm, of_pull, of_a, of_b, to_x, to_y, stream_of(stream));
  });
}
