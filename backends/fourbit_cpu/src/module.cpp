// fourbit_cpu._native: the kernels for Python, in the stable ABI. Every argument is an integer
// (an address, a size, a number of Dtype): nothing is checked here, `fourbit_cpu` is the only caller.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <cstring>

#include "huge_pages.h"
#include "kernels.h"
#include "parallel.h"

namespace {

using namespace fourbit;

const Kernels* active = nullptr;

// The call's arguments as integers, one after another.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}
  int64_t integer() {
    if (used_ == count_) {
      PyErr_SetString(PyExc_TypeError, "too few arguments");
      failed_ = true;
      return 0;
    }
    const long long value = PyLong_AsLongLong(values_[used_++]);
    if (value == -1 && PyErr_Occurred()) failed_ = true;
    return failed_ ? 0 : value;
  }
  template <typename T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  Dtype dtype() { return static_cast<Dtype>(integer()); }
  Weight weight() {
    Weight weight{};
    weight.packed = pointer<const uint8_t>();
    weight.absmax = pointer<const void>();
    weight.code = pointer<const float>();
    weight.blocksize = integer();
    weight.nested_absmax = pointer<const float>();
    weight.nested_code = pointer<const float>();
    weight.nested_offset = pointer<const float>();
    return weight;
  }
  // False with a Python error set: too few, too many, or no integer.
  bool complete() {
    if (!failed_ && used_ != count_) {
      PyErr_SetString(PyExc_TypeError, "too many arguments");
      failed_ = true;
    }
    if (!failed_ && active == nullptr) {
      PyErr_SetString(PyExc_RuntimeError, "no instruction set selected");
      failed_ = true;
    }
    return !failed_;
  }

 private:
  PyObject* const* values_;
  Py_ssize_t count_, used_ = 0;
  bool failed_ = false;
};

// Runs without the GIL what takes longer than giving it up and taking it back.
template <typename Work>
void run(int64_t elements, Work work) {
  if (elements < 16384) {
    work();
    return;
  }
  PyThreadState* state = PyEval_SaveThread();
  work();
  PyEval_RestoreThread(state);
}

// The result of an op that returns how much scratch memory it could not have: None, or a Python error.
PyObject* done(const char* op, int64_t missing) {
  if (missing == 0) Py_RETURN_NONE;
  return PyErr_Format(PyExc_RuntimeError,
                      "%s: no memory for %lld bytes of scratch; fewer rows at a time and fewer threads"
                      " (torch.set_num_threads) need less",
                      op, static_cast<long long>(missing));
}

PyObject* quantize_4bit(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* w = args.pointer<const void>();
  const Dtype dtype = args.dtype();
  const int64_t elements = args.integer();
  const float* code = args.pointer<const float>();
  const int64_t blocksize = args.integer();
  const bool signed_scale = args.integer() != 0;
  uint8_t* packed = args.pointer<uint8_t>();
  float* absmax = args.pointer<float>();
  if (!args.complete()) return nullptr;
  run(elements, [&] { active->quantize_4bit(w, dtype, elements, code, blocksize, signed_scale, packed, absmax); });
  Py_RETURN_NONE;
}

PyObject* dequantize_4bit(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const Weight weight = args.weight();
  const int64_t elements = args.integer();
  const Dtype dtype = args.dtype();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  run(elements, [&] { active->dequantize_4bit(weight, elements, dtype, out); });
  Py_RETURN_NONE;
}

PyObject* quantize_blockwise(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* x = args.pointer<const void>();
  const Dtype dtype = args.dtype();
  const int64_t elements = args.integer();
  const float* code = args.pointer<const float>();
  const int64_t blocksize = args.integer();
  uint8_t* codes = args.pointer<uint8_t>();
  float* absmax = args.pointer<float>();
  if (!args.complete()) return nullptr;
  run(elements, [&] { active->quantize_blockwise(x, dtype, elements, code, blocksize, codes, absmax); });
  Py_RETURN_NONE;
}

PyObject* dequantize_blockwise(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const uint8_t* codes = args.pointer<const uint8_t>();
  const float* absmax = args.pointer<const float>();
  const int64_t elements = args.integer();
  const float* code = args.pointer<const float>();
  const int64_t blocksize = args.integer();
  const Dtype dtype = args.dtype();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  run(elements, [&] { active->dequantize_blockwise(codes, absmax, elements, code, blocksize, dtype, out); });
  Py_RETURN_NONE;
}

// Returns the position of the first id that is out of range, or -1.
PyObject* embedding_4bit(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* ids = args.pointer<const void>();
  const int id_bytes = static_cast<int>(args.integer());
  const int64_t ids_count = args.integer();
  const int64_t rows = args.integer();
  const int64_t dim = args.integer();
  const Weight weight = args.weight();
  const Dtype dtype = args.dtype();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  int64_t bad = -1;
  run(ids_count * dim,
      [&] { bad = active->embedding_4bit(ids, id_bytes, ids_count, rows, dim, weight, dtype, out); });
  return PyLong_FromLongLong(bad);
}

PyObject* linear_4bit(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* x = args.pointer<const void>();
  const Dtype dtype = args.dtype();
  const int64_t m = args.integer(), n = args.integer(), k = args.integer();
  const Weight weight = args.weight();
  const void* bias = args.pointer<const void>();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  int64_t missing = 0;
  run(m * n * k, [&] { missing = active->linear_4bit(x, dtype, m, n, k, weight, bias, out); });
  return done("linear_4bit", missing);
}

PyObject* linear_4bit_grad(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* grad = args.pointer<const void>();
  const Dtype dtype = args.dtype();
  const int64_t m = args.integer(), n = args.integer(), k = args.integer();
  const Weight weight = args.weight();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  int64_t missing = 0;
  run(m * n * k, [&] { missing = active->linear_4bit_grad(grad, dtype, m, n, k, weight, out); });
  return done("linear_4bit_grad", missing);
}

template <bool Gradient>
PyObject* grouped(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  const void* x = args.pointer<const void>();
  const Dtype dtype = args.dtype();
  const int64_t rows = args.integer();
  const int64_t* ends = args.pointer<const int64_t>();
  const int64_t experts = args.integer(), n = args.integer(), k = args.integer();
  const Weight weight = args.weight();
  void* out = args.pointer<void>();
  if (!args.complete()) return nullptr;
  auto kernel = Gradient ? active->grouped_linear_4bit_grad : active->grouped_linear_4bit;
  int64_t missing = 0;
  run(rows * n * k, [&] { missing = kernel(x, dtype, rows, ends, experts, n, k, weight, out); });
  return done(Gradient ? "grouped_linear_4bit_grad" : "grouped_linear_4bit", missing);
}

PyObject* advise(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments args(values, count);
  void* data = args.pointer<void>();
  const int64_t bytes = args.integer();
  if (!args.complete()) return nullptr;
  advise_huge_pages(data, bytes);
  Py_RETURN_NONE;
}

PyObject* parallel_for(PyObject*, PyObject* address) {
  void* pointer = PyLong_AsVoidPtr(address);
  if (pointer == nullptr && PyErr_Occurred()) return nullptr;
  ParallelFor function;
  static_assert(sizeof function == sizeof pointer);
  std::memcpy(&function, &pointer, sizeof pointer);
  set_parallel_for(function);
  Py_RETURN_NONE;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const Kernels* const* item = available_kernels(); names != nullptr && *item != nullptr; ++item) {
    PyObject* name = PyUnicode_FromString((*item)->name);
    if (name == nullptr || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* select_instruction_set(PyObject*, PyObject* name) {
  for (const Kernels* const* item = available_kernels(); *item != nullptr; ++item) {
    if (PyUnicode_CompareWithASCIIString(name, (*item)->name) == 0) {
      active = *item;
      Py_RETURN_NONE;
    }
  }
  PyErr_Format(PyExc_ValueError, "this processor or this build has no instruction set %R", name);
  return nullptr;
}

template <PyObject* (*Function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef fast(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    fast<quantize_4bit>("quantize_4bit"),
    fast<dequantize_4bit>("dequantize_4bit"),
    fast<quantize_blockwise>("quantize_blockwise"),
    fast<dequantize_blockwise>("dequantize_blockwise"),
    fast<embedding_4bit>("embedding_4bit"),
    fast<linear_4bit>("linear_4bit"),
    fast<linear_4bit_grad>("linear_4bit_grad"),
    fast<grouped<false>>("grouped_linear_4bit"),
    fast<grouped<true>>("grouped_linear_4bit_grad"),
    fast<advise>("advise_huge_pages"),
    {"set_parallel_for", parallel_for, METH_O, nullptr},
    {"instruction_sets", instruction_sets, METH_NOARGS, nullptr},
    {"select_instruction_set", select_instruction_set, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&definition); }
