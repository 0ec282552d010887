#include "stable.hpp"

#include "stock.hpp"

#include <dlfcn.h>
#include <link.h>

#include <cstring>

namespace fastbn::torch {

Functions torch;
Stock stock;

namespace {

// Stop at the library that holds torch's CPU kernels, wherever it was loaded from.
int is_torch(dl_phdr_info* info, std::size_t, void* found) {
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash == nullptr ? info->dlpi_name : slash + 1;
    if (std::strncmp(name, "libtorch_cpu.so", 15) != 0) return 0;
    *static_cast<std::string*>(found) = info->dlpi_name;
    return 1;
}

template <class F>
bool find(void* library, const char* name, F*& function) {
    function = reinterpret_cast<F*>(dlsym(library, name));
    return function != nullptr;
}

}  // namespace

std::string find_torch() {
    std::string path;
    dl_iterate_phdr(is_torch, &path);
    if (path.empty()) return "libtorch_cpu.so, which this process has not loaded";
    // It is loaded already, and Python keeps it: the handle need not be kept.
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return path + ", which cannot be opened";
    Functions found{};
    std::string missing;
#define FASTBN_FIND(name, result, arguments) \
    if (!find(library, #name, found.name)) missing += missing.empty() ? #name : ", " #name;
    FASTBN_TORCH_FUNCTIONS(FASTBN_FIND)
#undef FASTBN_FIND
#define FASTBN_FIND(name, result, arguments) find(library, #name, found.name);
    FASTBN_TORCH_NEWER_FUNCTIONS(FASTBN_FIND)
#undef FASTBN_FIND
    Stock kernels{};
    bool all = true;
#define FASTBN_FIND(name, full, arguments) all = find(library, full, kernels.name) && all;
    FASTBN_TORCH_STOCK(FASTBN_FIND)
#undef FASTBN_FIND
    if (all) stock = kernels;
    dlclose(library);
    if (missing.empty()) torch = found;
    return missing;
}

}  // namespace fastbn::torch
