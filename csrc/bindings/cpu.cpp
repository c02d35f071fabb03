// sslkern._cpu: the only file that knows Python. Tensors arrive as objects, which keeps their memory alive during the
// call. Shapes and types were checked by sslkern/backends/cpu; what is passed is contiguous.
#include "bindings/tensor.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace sslkern;

namespace {

// dtype, groups, n, m, d, q, k, scale, scale_tensor or None, q_ids, k_ids, same, k_bias, q_limit, kept, kept_rows
Similarity problem(const py::tuple& of, int threads) {
  const auto size = [&](int i) { return of[i].cast<int64_t>(); };
  const float* factor = data(of[8]);
  return {DType(of[0].cast<int>()),
          size(1),
          size(2),
          size(3),
          size(4),
          data<void>(of[5]),
          data<void>(of[6]),
          of[7].cast<float>() * (factor == nullptr ? 1.f : *factor),
          data<int64_t>(of[9]),
          data<int64_t>(of[10]),
          of[11].cast<bool>(),
          data(of[12]),
          data(of[13]),
          data(of[14]),
          size(15),
          threads};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU kernels of sslkern; called by sslkern.backends.cpu.";
  module.def("similarity_lse_fwd", [](const py::tuple& of, const py::object& row, const py::object& col,
                                      const py::object& best, int threads) {
    const Similarity p = problem(of, threads);
    float *const to_row = data(row), *const to_col = data(col), *const to_best = data(best);
    py::gil_scoped_release release;
    kernels().similarity_lse_fwd(p, to_row, to_col, to_best);
  });
  module.def("similarity_lse_frozen_fwd", [](const py::tuple& of, const py::object& row, const py::object& mean,
                                             const py::object& best, int threads) {
    const Similarity p = problem(of, threads);
    float *const to_row = data(row), *const to_mean = data(mean), *const to_best = data(best);
    py::gil_scoped_release release;
    kernels().similarity_lse_frozen_fwd(p, to_row, to_mean, to_best);
  });
  module.def("similarity_lse_bwd", [](const py::tuple& of, const py::object& row, const py::object& col,
                                      const py::object& g, const py::object& h, const py::object& dq,
                                      const py::object& dk, const py::object& dscale, const py::object& dbias,
                                      int threads) {
    const Similarity p = problem(of, threads);
    const float *const of_row = data(row), *const of_col = data(col), *const g_row = data(g), *const g_col = data(h);
    float *const to_q = data(dq), *const to_k = data(dk), *const to_scale = data(dscale), *const to_bias = data(dbias);
    py::gil_scoped_release release;
    kernels().similarity_lse_bwd(p, of_row, of_col, g_row, g_col, to_q, to_k, to_scale, to_bias);
  });
  module.def("similarity_topk",
             [](const py::tuple& of, int64_t count, const py::object& values, const py::object& indices, int threads) {
               const Similarity p = problem(of, threads);
               float* const to_values = data(values);
               int64_t* const to_indices = data<int64_t>(indices);
               py::gil_scoped_release release;
               kernels().similarity_topk(p, count, to_values, to_indices);
             });
  module.def("similarity_softplus",
             [](const py::tuple& of, const py::object& bias, const py::object& weights, float sign,
                const py::object& total, const py::object& row, const py::object& dq, const py::object& dk,
                const py::object& dscale, const py::object& dbias, const py::object& dk_bias, int threads) {
               const Similarity p = problem(of, threads);
               const float *const of_bias = data(bias), *const of_weights = data(weights);
               float *const to_total = data(total), *const to_row = data(row);
               const SoftplusGradients gradients{data(dq), data(dk), data(dscale), data(dbias), data(dk_bias)};
               py::gil_scoped_release release;
               kernels().similarity_softplus(p, of_bias, of_weights, sign, to_total, to_row, gradients);
             });
  module.def("queue_push_", [](int queue_dtype, int keys_dtype, int64_t size, int64_t dim, int64_t batch,
                               const py::object& queue, const py::object& ptr, const py::object& keys, bool normalize,
                               int threads) {
    void* const to = data<void>(queue);
    int64_t* const at = data<int64_t>(ptr);
    const void* const from = data<void>(keys);
    py::gil_scoped_release release;
    kernels().queue_push(DType(queue_dtype), DType(keys_dtype), size, dim, batch, to, at, from, normalize, threads);
  });
  module.def("sampled_similarity_fwd", [](const py::tuple& of, int64_t count, const py::object& index, bool streams,
                                          const py::object& out, int threads) {
    const Similarity p = problem(of, threads);
    const int64_t* const at = data<int64_t>(index);
    float* const to = data(out);
    py::gil_scoped_release release;
    return kernels().sampled_similarity_fwd(p, count, at, streams, to);
  });
  module.def("sampled_similarity_bwd",
             [](const py::tuple& of, int64_t count, const py::object& index, bool streams, const py::object& g,
                const py::object& dq, const py::object& dk, int threads) {
               const Similarity p = problem(of, threads);
               const int64_t* const at = data<int64_t>(index);
               const float* const from = data(g);
               float *const to_q = data(dq), *const to_k = data(dk);
               py::gil_scoped_release release;
               return kernels().sampled_similarity_bwd(p, count, at, streams, from, to_q, to_k);
             });
  module.def("bank_update_", [](int bank_dtype, int x_dtype, int64_t size, int64_t dim, int64_t batch,
                                const py::object& bank, const py::object& index, const py::object& x, float momentum,
                                int threads) {
    void* const to = data<void>(bank);
    const int64_t* const at = data<int64_t>(index);
    const void* const from = data<void>(x);
    py::gil_scoped_release release;
    return kernels().bank_update(DType(bank_dtype), DType(x_dtype), size, dim, batch, to, at, from, momentum, threads);
  });
  module.def("unit_pairs_fwd", [](int dtype, int64_t n, int64_t d, const py::object& x, const py::object& y,
                                  const py::object& z, const py::object& norm, const py::object& cosine, int threads) {
    const void *const from_x = data<void>(x), *const from_y = data<void>(y);
    void* const to_z = data<void>(z);
    float *const to_norm = data(norm), *const to_cosine = data(cosine);
    py::gil_scoped_release release;
    kernels().unit_pairs_fwd(DType(dtype), n, d, from_x, from_y, to_z, to_norm, to_cosine, threads);
  });
  module.def("unit_pairs_bwd",
             [](int dtype, int64_t n, int64_t d, const py::object& z, const py::object& norm, const py::object& pull,
                const py::object& da, const py::object& db, const py::object& dx, const py::object& dy, int threads) {
               const void* const of_z = data<void>(z);
               const float *const of_norm = data(norm), *const of_pull = data(pull), *const of_a = data(da),
                                  *const of_b = data(db);
               void *const to_x = data<void>(dx), *const to_y = data<void>(dy);
               py::gil_scoped_release release;
               kernels().unit_pairs_bwd(DType(dtype), n, d, of_z, of_norm, of_pull, of_a, of_b, to_x, to_y, threads);
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
}
