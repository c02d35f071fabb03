// sslkern._cpu. Tensors arrive as objects, which keeps their memory alive during the call, and `Tensors` gives it to
// the kernels only as they read or write it. That sizes are those of one problem is up to sslkern/backends/cpu.
#include "bindings/cuda.h"
#include "bindings/tensor.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace sslkern;

namespace {

// What native() of sslkern/backends/cpu/_native.py makes of a Problem:
// dtype, groups, n, m, d, q, k, scale_tensor or None, scale, q_ids, k_ids, same, k_bias, q_limit, kept, kept_rows
Similarity problem(const py::tuple& of, int threads) {
  const auto size = [&](int i) { return of[i].cast<int64_t>(); };
  const DType dtype = DType(of[0].cast<int>());
  const int64_t groups = size(1), n = size(2), m = size(3), d = size(4), kept_rows = size(15);
  const Tensors tensors;
  const float* const factor = tensors.read_or_null("scale", of[7], 1);
  Similarity p{};
  p.dtype = dtype;
  p.groups = groups;
  p.n = n;
  p.m = m;
  p.d = d;
  p.q = tensors.read(dtype, "q", of[5], groups * n * d);
  p.k = tensors.read_or_null(dtype, "k", of[6], groups * m * d);
  p.scale = of[8].cast<float>() * (factor == nullptr ? 1.f : *factor);
  p.q_ids = tensors.read_or_null<int64_t>("q_ids", of[9], groups * n);
  p.k_ids = tensors.read_or_null<int64_t>("k_ids", of[10], groups * m);
  p.same = of[11].cast<bool>();
  p.k_bias = tensors.read_or_null("k_bias", of[12], groups * m);
  p.q_limit = tensors.read_or_null("q_limit", of[13], groups * n);
  p.kept = tensors.write_or_null("kept", of[14], groups * kept_rows * m);
  p.kept_rows = kept_rows;
  p.threads = threads;
  return p;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU kernels of sslkern; called by sslkern.backends.cpu.";
  module.def("similarity_lse_fwd", [](const py::tuple& of, const py::object& row, const py::object& col,
                                      const py::object& best, int threads) {
    const Similarity p = problem(of, threads);
    const Tensors tensors;
    const int64_t rows = p.groups * p.n, columns = p.groups * p.m;
    float* const to_row = tensors.write("row", row, rows);
    float* const to_col = tensors.write_or_null("col", col, columns);
    float* const to_best = tensors.write_or_null("best", best, rows + (col.is_none() ? 0 : columns));
    py::gil_scoped_release release;
    kernels().similarity_lse_fwd(p, to_row, to_col, to_best);
  });
  module.def("similarity_lse_frozen_fwd", [](const py::tuple& of, const py::object& row, const py::object& mean,
                                             const py::object& best, int threads) {
    const Similarity p = problem(of, threads);
    const Tensors tensors;
    const int64_t rows = p.groups * p.n;
    float* const to_row = tensors.write("row", row, rows);
    float* const to_mean = tensors.write("mean", mean, rows * p.d);
    float* const to_best = tensors.write_or_null("best", best, rows);
    py::gil_scoped_release release;
    kernels().similarity_lse_frozen_fwd(p, to_row, to_mean, to_best);
  });
  module.def(
      "similarity_lse_bwd",
      [](const py::tuple& of, const py::object& row, const py::object& col, const py::object& g, const py::object& h,
         const py::object& dq, const py::object& dk, const py::object& dscale, const py::object& dbias, int threads) {
        const Similarity p = problem(of, threads);
        const Tensors tensors;
        const int64_t rows = p.groups * p.n, columns = p.groups * p.m;
        const float* const of_row = tensors.read_or_null("row", row, rows);
        const float* const of_col = tensors.read_or_null("col", col, columns);
        const float* const g_row = tensors.read_or_null("g", g, rows);
        const float* const g_col = tensors.read_or_null("h", h, columns);
        float* const to_q = tensors.write_or_null("dq", dq, rows * p.d);
        float* const to_k = tensors.write_or_null("dk", dk, columns * p.d);
        float* const to_scale = tensors.write_or_null("dscale", dscale, 1);
        float* const to_bias = tensors.write_or_null("dbias", dbias, columns);
        py::gil_scoped_release release;
        kernels().similarity_lse_bwd(p, of_row, of_col, g_row, g_col, to_q, to_k, to_scale, to_bias);
      });
  module.def("similarity_topk",
             [](const py::tuple& of, int64_t count, const py::object& values, const py::object& indices, int threads) {
               const Similarity p = problem(of, threads);
               const Tensors tensors;
               float* const to_values = tensors.write("values", values, p.groups * p.n * count);
               int64_t* const to_indices = tensors.write<int64_t>("indices", indices, p.groups * p.n * count);
               py::gil_scoped_release release;
               kernels().similarity_topk(p, count, to_values, to_indices);
             });
  module.def("similarity_softplus",
             [](const py::tuple& of, const py::object& bias, const py::object& weights, float sign,
                const py::object& total, const py::object& row, const py::object& dq, const py::object& dk,
                const py::object& dscale, const py::object& dbias, const py::object& dk_bias, int threads) {
               const Similarity p = problem(of, threads);
               const Tensors tensors;
               const int64_t rows = p.groups * p.n, columns = p.groups * p.m;
               const float* const of_bias = tensors.read_or_null("bias", bias, rows);
               const float* const of_weights = tensors.read_or_null("weights", weights, rows);
               float* const to_total = tensors.write("total", total, p.groups);
               float* const to_row = tensors.write("row", row, rows);
               SoftplusGradients gradients{};
               gradients.q = tensors.write_or_null("dq", dq, rows * p.d);
               gradients.k = tensors.write_or_null("dk", dk, columns * p.d);
               gradients.scale = tensors.write_or_null("dscale", dscale, p.groups);
               gradients.bias = tensors.write_or_null("dbias", dbias, rows);
               gradients.k_bias = tensors.write_or_null("dk_bias", dk_bias, columns);
               py::gil_scoped_release release;
               kernels().similarity_softplus(p, of_bias, of_weights, sign, to_total, to_row, gradients);
             });
  module.def("queue_push_",
             [](int queue_dtype, int keys_dtype, int64_t size, int64_t dim, int64_t batch, const py::object& queue,
                const py::object& ptr, const py::object& keys, bool normalize, int threads) {
               const DType queue_type = DType(queue_dtype), keys_type = DType(keys_dtype);
               const Tensors tensors;
               void* const to = tensors.write(queue_type, "queue", queue, size * dim);
               int64_t* const at = tensors.write<int64_t>("ptr", ptr, 1);
               const void* const from = tensors.read(keys_type, "keys", keys, batch * dim);
               py::gil_scoped_release release;
               kernels().queue_push(queue_type, keys_type, size, dim, batch, to, at, from, normalize, threads);
             });
  module.def("sampled_similarity_fwd", [](const py::tuple& of, int64_t count, const py::object& index, bool streams,
                                          const py::object& out, int threads) {
    const Similarity p = problem(of, threads);
    const Tensors tensors;
    const int64_t* const at = tensors.read<int64_t>("index", index, p.groups * p.n * count);
    float* const to = tensors.write("out", out, p.groups * p.n * count);
    py::gil_scoped_release release;
    return kernels().sampled_similarity_fwd(p, count, at, streams, to);
  });
  module.def("sampled_similarity_bwd",
             [](const py::tuple& of, int64_t count, const py::object& index, bool streams, const py::object& g,
                const py::object& dq, const py::object& dk, int threads) {
               const Similarity p = problem(of, threads);
               const Tensors tensors;
               const int64_t* const at = tensors.read<int64_t>("index", index, p.groups * p.n * count);
               const float* const from = tensors.read("g", g, p.groups * p.n * count);
               float* const to_q = tensors.write_or_null("dq", dq, p.groups * p.n * p.d);
               float* const to_k = tensors.write_or_null("dk", dk, p.groups * p.m * p.d);
               py::gil_scoped_release release;
               return kernels().sampled_similarity_bwd(p, count, at, streams, from, to_q, to_k);
             });
  module.def("bank_update_",
             [](int bank_dtype, int x_dtype, int64_t size, int64_t dim, int64_t batch, const py::object& bank,
                const py::object& index, const py::object& x, float momentum, int threads) {
               const DType bank_type = DType(bank_dtype), x_type = DType(x_dtype);
               const Tensors tensors;
               void* const to = tensors.write(bank_type, "bank", bank, size * dim);
               const int64_t* const at = tensors.read<int64_t>("index", index, batch);
               const void* const from = tensors.read(x_type, "x", x, batch * dim);
               py::gil_scoped_release release;
               return kernels().bank_update(bank_type, x_type, size, dim, batch, to, at, from, momentum, threads);
             });
  module.def("unit_pairs_fwd", [](int dtype, int64_t n, int64_t d, const py::object& x, const py::object& y,
                                  const py::object& z, const py::object& norm, const py::object& cosine, int threads) {
    const DType type = DType(dtype);
    const Tensors tensors;
    const void* const from_x = tensors.read(type, "x", x, n * d);
    const void* const from_y = tensors.read(type, "y", y, n * d);
    void* const to_z = tensors.write(type, "z", z, 2 * n * d);
    float* const to_norm = tensors.write_or_null("norm", norm, 2 * n);
    float* const to_cosine = tensors.write("cosine", cosine, n);
    py::gil_scoped_release release;
    kernels().unit_pairs_fwd(type, n, d, from_x, from_y, to_z, to_norm, to_cosine, threads);
  });
  module.def("unit_pairs_bwd",
             [](int dtype, int64_t n, int64_t d, const py::object& z, const py::object& norm, const py::object& pull,
                const py::object& da, const py::object& db, const py::object& dx, const py::object& dy, int threads) {
               const DType type = DType(dtype);
               const Tensors tensors;
               const void* const of_z = tensors.read(type, "z", z, 2 * n * d);
               const float* const of_norm = tensors.read_or_null("norm", norm, 2 * n);
               const float* const of_pull = tensors.read("pull", pull, n);
               const float* const of_a = tensors.read_or_null("da", da, n * d);
               const float* const of_b = tensors.read_or_null("db", db, n * d);
               void* const to_x = tensors.write_or_null(type, "dx", dx, n * d);
               void* const to_y = tensors.write_or_null(type, "dy", dy, n * d);
               py::gil_scoped_release release;
               kernels().unit_pairs_bwd(type, n, d, of_z, of_norm, of_pull, of_a, of_b, to_x, to_y, threads);
             });
  module.def("isa", [] { return kernels().name; });
  module.def("isas", [] {
    py::list names;
    for (const Kernels* const* one = all_kernels(); *one != nullptr; ++one) names.append((*one)->name);
    return names;
  });
  module.def("set_isa", [](const char* name) {
    if (!use_kernels(name)) throw py::value_error(std::string("this machine has no kernels named ") + name);
  });
  bind_cuda(module);
}
