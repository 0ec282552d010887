// Layer norm and group norm: statistics of parts, rows or each image's groups of channels.
//
// - What is said in attempt.cpp holds here, too. The gradient of a group norm has its statistics as torch saved them, of
//   shape (images, groups); that of a layer norm as many as there are rows.
// - The kernels know three numbers of a part, torch saves two: mean_lo lies behind the mean, as saved.hpp says. Where it
//   is lost it is taken to be 0.
#include "attempt.hpp"

namespace fastbn::torch {

namespace {

// x, divided.
struct Parts {
    Input x;
    std::ptrdiff_t batch, outer, group;
    Sizes statistics, parameters;

    Answer of_rows(Tensor tensor, Slot normalized_shape) noexcept {
        const List shape(normalized_shape);
        const auto axes = static_cast<std::int64_t>(shape.size);
        if (const Answer no = x.of_rows(tensor, axes)) return no;
        const std::int64_t first = x.view.dim - axes;
        for (std::int64_t d = 0; d < x.view.dim; ++d) {
            const std::int64_t size = x.view.sizes[d];
            if (d >= first && size != shape.data[d - first]) return SHAPE;
            statistics.add(d < first ? size : 1);
            if (d >= first) parameters.add(size);
        }
        batch = x.outer, outer = 1, group = x.channels;
        return are_parts(outer, x.inner, group) ? TAKEN : PARTS;
    }

    // N, C, HxW, group
    Answer of_groups(Tensor tensor, const Slot* numbers) noexcept {
        if (const Answer no = x.of(tensor)) return no;
        // Axes of one element may have other strides than in the output. They mean nothing, but what order of memory an output
        // then has depends on torch's version, as it does where there are gaps in channels_last.
        const auto bytes = static_cast<std::size_t>(x.view.dim) * sizeof *x.strides;
        if (x.direct ? std::memcmp(x.view.strides, x.strides, bytes) != 0 : x.last) return ODD;
        const std::int64_t images = long_in(numbers[0]), channels = long_in(numbers[1]), rest = long_in(numbers[2]), groups = long_in(numbers[3]);
        batch = x.view.sizes[0], outer = x.last ? x.outer / batch : 1;
        if (images != batch || channels != x.channels || rest != outer * x.inner) return SHAPE;
        if (groups < 1 || channels % groups != 0) return SHAPE;
        group = channels / groups;
        statistics.add(images), statistics.add(groups), parameters.add(channels);
        return are_parts(outer, x.inner, group) ? TAKEN : PARTS;
    }

    Call begin(Operation operation) const noexcept {
        Call call = fastbn::torch::begin(x, operation);
        call.batch = batch, call.outer = outer, call.group = group;
        return call;
    }
};

Answer run_parts(Status (*function)(Call*), Call& call) noexcept {
    const Answer answer = run(function, call);
    return answer == RANGE ? PARTS : answer;
}

Answer forward(const Parts& parts, Tensor weight_in, Tensor bias_in, double eps, Attempt& attempt) noexcept {
    const Input& x = parts.x;
    Room room;
    Parameters p(x, room);
    Vector weight, bias;
    if (const Answer no = p.of(weight_in, weight, parts.parameters)) return no;
    if (const Answer no = p.of(bias_in, bias, parts.parameters)) return no;
    if (!(eps > 0)) return EPS;
    Call call = parts.begin(attempt.operation);
    call.eps = eps;
    Owned y;
    Output mean, invstd;
    if (!x.make_like(y) || !mean.make(p, parts.statistics, true) || !invstd.make(p, parts.statistics, p.dtype != p.arithmetic)) return MEMORY;
    call.out = writable_memory_of(y.tensor);
    call.x = x.ordered(x.tensor, x.direct, y);  // in place where it must be copied
    if (call.x == nullptr || !p.read(weight, call.weight) || !p.read(bias, call.bias)) return MEMORY;
    call.mean = mean.data, call.invstd = invstd.data;
    call.mean_lo = p.dtype == p.arithmetic ? mean.low : p.take(parts.statistics.count);  // 16 bits have fewer digits than the arithmetic
    if (call.mean_lo == nullptr) return MEMORY;
    if (const Answer no = run_parts(kernels.load()->parts_forward, call)) return no;
    mean.finish(p);
    invstd.finish(p);
    attempt.results[0] = y.release(), attempt.results[1] = mean.made.release(), attempt.results[2] = invstd.made.release();
    return TAKEN;
}

Answer backward(const Parts& parts, const Slot* given, Tensor weight_in, Slot mask, Attempt& attempt) noexcept {
    const Input& x = parts.x;
    View dy;
    Mask wanted;
    if (!dy.of(tensor_in(given[0]))) return DEVICE;
    if (!x.is_like(dy)) return SHAPE;
    if (!read_mask(mask, wanted)) return MEMORY;
    Room room;
    Parameters p(x, room);
    Vector weight, mean, invstd;
    if (const Answer no = p.of(weight_in, weight, parts.parameters)) return no;
    if (const Answer no = p.of(tensor_in(given[1]), mean, parts.statistics)) return no;
    if (const Answer no = p.of(tensor_in(given[2]), invstd, parts.statistics)) return no;
    // Torch makes the gradient of the bias like the bias, which a group norm's backward is not told.
    if ((wanted[1] || wanted[2]) && weight.tensor == nullptr) return ABSENT;

    Call call = parts.begin(attempt.operation);
    const std::int64_t count = parts.statistics.count;
    Gradient of_x;
    Output dweight, dbias;
    if (!of_x.enter(x, tensor_in(given[0]), dy, wanted[0], call) || !p.read(weight, call.weight)) return MEMORY;
    if (!read_saved(mean, p, call.mean, &call.mean_lo) || !read_saved(invstd, p, call.invstd, nullptr)) return MEMORY;
    if (call.mean_lo == nullptr) {
        call.mean_lo = p.take(count);
        if (call.mean_lo == nullptr) return MEMORY;
        std::memset(call.mean_lo, 0, static_cast<std::size_t>(count * SIZES[p.arithmetic]));
    }
    if (wanted[1] && !dweight.make(p, parts.parameters, false)) return MEMORY;
    if (wanted[2] && !dbias.make(p, parts.parameters, false)) return MEMORY;
    call.dweight = wanted[1] ? dweight.data : p.take();
    call.dbias = wanted[2] ? dbias.data : p.take();
    const auto sums = static_cast<std::size_t>(parts.batch * x.channels) * (parts.outer == 1 && x.inner == 1 ? 0 : sizeof(double));
    call.sum_dy = static_cast<double*>(room.take(sums)), call.sum_dy_xmu = static_cast<double*>(room.take(sums));
    if (call.dweight == nullptr || call.dbias == nullptr || call.sum_dy == nullptr || call.sum_dy_xmu == nullptr) return MEMORY;
    Owned* results[] = {&of_x.dx, &dweight.made, &dbias.made};
    for (Owned* result : results)
        if (result->tensor == nullptr && !make_none(*result)) return MEMORY;
    if (wanted[0] || wanted[1] || wanted[2])
        if (const Answer no = run_parts(kernels.load()->parts_backward, call)) return no;
    if (wanted[1]) dweight.finish(p);
    if (wanted[2]) dbias.finish(p);
    for (int i = 0; i < 3; ++i) attempt.results[i] = results[i]->release();
    return TAKEN;
}

}  // namespace

Answer try_layer_norm(const Slot* stack, Attempt& attempt) noexcept {
    const FloatMode mode;
    Parts parts;
    const Answer no = parts.of_rows(tensor_in(stack[0]), stack[1]);
    attempt.found(parts.x);
    return no ? no : forward(parts, optional_in(stack[2]), optional_in(stack[3]), double_in(stack[4]), attempt);
}

Answer try_layer_norm_backward(const Slot* stack, Attempt& attempt) noexcept {
    const FloatMode mode;
    Parts parts;
    const Answer no = parts.of_rows(tensor_in(stack[1]), stack[2]);
    attempt.found(parts.x);
    const Slot given[] = {stack[0], stack[3], stack[4]};
    return no ? no : backward(parts, given, optional_in(stack[5]), stack[7], attempt);
}

Answer try_group_norm(const Slot* stack, Attempt& attempt) noexcept {
    const FloatMode mode;
    Parts parts;
    const Answer no = parts.of_groups(tensor_in(stack[0]), stack + 3);
    attempt.found(parts.x);
    return no ? no : forward(parts, optional_in(stack[1]), optional_in(stack[2]), double_in(stack[7]), attempt);
}

Answer try_group_norm_backward(const Slot* stack, Attempt& attempt) noexcept {
    const FloatMode mode;
    Parts parts;
    const Answer no = parts.of_groups(tensor_in(stack[1]), stack + 5);
    attempt.found(parts.x);
    const Slot given[] = {stack[0], stack[2], stack[3]};
    return no ? no : backward(parts, given, optional_in(stack[4]), stack[9], attempt);
}

}  // namespace fastbn::torch
