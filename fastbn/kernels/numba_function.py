"""A compiled function of one number, applied to all lanes of a block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import config, typeof
from numba.core import types
from numba.extending import intrinsic

from fastbn.kernels.numba_lanes import BLOCKS, FLOATS, REGISTER, WORD, local


def on_lanes(function: Any, number: Any) -> Any:
    """An intrinsic that applies a compiled function of a number and a parameter to every lane of a block.

    It is a loop over two registers' lanes, and LLVM is told to make one step of it: what it then has is a function of vectors, in
    registers. It must not unroll the loop before it tries; what cannot be vectorized stays a loop. Of a function that may raise,
    or calls the C library, it is not told so: it would say on the terminal that it cannot.
    """
    block, element, kind = BLOCKS[number], FLOATS[number], typeof(function)
    step = min(block.count, 16 * REGISTER // number.bitwidth)

    def typed(typingctx: Any, v: Any, parameter: Any) -> Any:
        called = kind.get_call_type(typingctx, (number, types.float64), {})

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            apply = context.get_function(kind, called)
            whole = _is_vectorizable(function.overloads[called.args])
            rooms = [local(builder, block.vector) for _ in range(2)]
            source, to = (builder.bitcast(room, element.as_pointer()) for room in rooms)
            builder.store(arguments[0], rooms[0])
            for start in range(0, block.count, step):
                with _steps(builder, start, step, whole) as i:
                    z = builder.load(builder.gep(source, [i], source_etype=element))
                    builder.store(apply(builder, (z, arguments[1])), builder.gep(to, [i], source_etype=element))
            return builder.load(rooms[1])

        return block(block, types.float64), generate

    return intrinsic(typed)


def _is_vectorizable(compiled: Any) -> bool:
    """Whether a function always returns 0 as its status, and calls nothing but LLVM's own or, with a library of vectors, C's."""
    name = compiled.fndesc.llvm_func_name
    (code,) = (str(function) for function in compiled.library.get_defined_functions() if function.name == name)
    obstacles = r"^ *ret i32 (?!0$)" if config.USING_SVML else r"^ *ret i32 (?!0$)|\bcall\b(?!.* @llvm\.)"
    return re.search(obstacles, code, re.MULTILINE) is None


@contextmanager
def _steps(builder: Any, start: int, count: int, whole: bool) -> Iterator[Any]:
    """A loop over so many lanes, which is to be one step or not."""
    module, before = builder.module, builder.block
    body, after = builder.append_basic_block("lanes"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    i = builder.phi(WORD)
    i.add_incoming(WORD(start), before)
    yield i
    following = builder.add(i, WORD(1))
    i.add_incoming(following, builder.block)
    again = builder.cbranch(builder.icmp_signed("<", following, WORD(start + count)), body, after)
    width = module.add_metadata([ir.MetaDataString(module, "llvm.loop.vectorize.width"), ir.IntType(32)(count if whole else 1)])
    late = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    name = module.add_metadata([ir.MetaDataString(module, f"loop {len(module.metadata)}")])
    name.operands = (name, width, late)  # a loop is known by what names itself
    again.set_metadata("llvm.loop", name)
    builder.position_at_end(after)
