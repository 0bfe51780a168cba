// The Python module: what was built and which instruction set runs. Operators are in bindings_<stem>.cpp.
#include <Python.h>

#include "isa.h"
#include "table_cache.h"

namespace {

PyObject* isa_name(PyObject*, PyObject*) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return PyUnicode_FromString(names[static_cast<int>(clex::active_isa())]);
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  const long level = PyLong_AsLong(argument);
  if (level == -1 && PyErr_Occurred()) return nullptr;
  if (level < 0 || level > static_cast<long>(clex::detect_isa())) {
    PyErr_SetString(PyExc_ValueError, "this processor does not have that instruction set");
    return nullptr;
  }
  clex::active_isa() = static_cast<clex::Isa>(level);
  Py_RETURN_NONE;
}

PyObject* has_cuda(PyObject*, PyObject*) {
#ifdef CLEX_WITH_CUDA
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

PyObject* build_reason(PyObject*, PyObject*) { return PyUnicode_FromString(CLEX_BUILD_REASON); }

// no operator, since dispatch modes would intercept it: a cache may be collected while something is traced.
PyObject* destroy_table_cache(PyObject*, PyObject* argument) {
  const long long handle = PyLong_AsLongLong(argument);
  if (handle == -1 && PyErr_Occurred()) return nullptr;
  clex::destroy_table_cache(handle);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"isa", isa_name, METH_NOARGS, "instruction set in use: baseline, avx2, avx512 or avx512_bf16"},
    {"set_isa", set_isa, METH_O, "use a narrower instruction set: 0 to 3 (for tests)"},
    {"has_cuda", has_cuda, METH_NOARGS, "whether the CUDA C++ kernels were built"},
    {"build_reason", build_reason, METH_NOARGS, "why CUDA C++ was or was not built"},
    {"destroy_table_cache", destroy_table_cache, METH_O, "drop the table cache of a handle"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}