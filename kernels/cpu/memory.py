"""Tensors as addresses: loops take the address of a tensor and its strides, and walk it by vectors."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array


def _number(kind: Any) -> Any:
    return kind.instance_type if isinstance(kind, types.TypeRef) else kind.dtype


@intrinsic
def vector(typingctx: Any, address: Any, n: Any, kind: Any) -> Any:
    """Return the ``n`` numbers of a kind that lie side by side at an address."""
    number = _number(kind)
    array = types.Array(number, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = make_array(array)(context, builder)
        of = context.get_data_type(number)
        size = context.get_constant(types.intp, context.get_abi_sizeof(of))
        data = builder.inttoptr(args[0], of.as_pointer())
        populate_array(out, data, shape=(args[1],), strides=(size,), itemsize=size, meminfo=None)
        return out._getvalue()

    return array(types.intp, types.intp, kind), codegen


@intrinsic
def record(typingctx: Any, address: Any, kind: Any) -> Any:
    """Return the record of a kind that lies at an address."""
    of = _number(kind)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(of))

    return of(types.intp, kind), codegen


@intrinsic(prefer_literal=True)
def numbers(typingctx: Any, address: Any, n: Any, kind: Any) -> Any:
    """Return the ``n`` numbers of a kind at an address as a tuple; ``n`` is known to the compiler."""
    number, count = _number(kind), n.literal_value
    several = types.UniTuple(number, count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = builder.inttoptr(args[0], context.get_data_type(number).as_pointer())
        at = [builder.gep(data, [ir.Constant(ir.IntType(64), i)]) for i in range(count)]
        return context.make_tuple(builder, several, [builder.load(x) for x in at])

    return several(types.intp, n, kind), codegen


@intrinsic(prefer_literal=True)
def with_twos(typingctx: Any, several: Any, places: Any) -> Any:
    """Return a tuple of numbers, of which those in the set of bits ``places`` are known to be 2."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = args[0]
        for i in range(len(several)):
            if places.literal_value >> i & 1:
                out = builder.insert_value(out, context.get_constant(several.dtype, 2.0), i)
        return out

    return several(several, places), codegen


@intrinsic
def transpose(typingctx: Any, source: Any, stride: Any, out: Any, out_stride: Any, kind: Any) -> Any:
    """Write the columns of 8 rows of 8 numbers of a kind as rows, by vectors; strides of rows are in bytes."""
    number = _number(kind)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        of = context.get_data_type(number)
        eight, size = ir.VectorType(of, 8), context.get_abi_sizeof(of)

        def row_at(address: Any, stride: Any, i: int) -> Any:
            at = builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), i)))
            return builder.inttoptr(at, eight.as_pointer())

        def mixed(a: Any, b: Any, places: tuple[int, ...]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), 8), places))

        rows = [builder.load(row_at(args[0], args[1], i), align=size) for i in range(8)]
        for step, low, high in _MIXES:
            pairs = [(i, i + step) for i in range(8) if not i & step]
            for i, j in pairs:
                rows[i], rows[j] = mixed(rows[i], rows[j], low), mixed(rows[i], rows[j], high)
        for i, place in enumerate(_PLACES):
            builder.store(rows[i], row_at(args[2], args[3], place), align=size)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 4, kind), codegen


# numbers of two rows, by halves of four as vectors mix them best: ones, pairs, then the halves themselves
_MIXES = (
    (1, (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)),
    (2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)),
    (4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)),
)
_PLACES = (0, 2, 1, 3, 4, 6, 5, 7)


@intrinsic
def unrelated(typingctx: Any, address: Any) -> Any:
    """Return an address whose relation to others the compiler does not know, so that it checks for overlap at run time.

    A distance that it knows but for a number it takes for a dependence, and makes no vector code.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        return builder.asm(ir.FunctionType(word, [word]), "", "=r,0", args, False)

    return types.intp(types.intp), codegen


def _call(count: int) -> Any:
    word = ir.IntType(64)

    def called(typingctx: Any, args: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [word] * count)
            given = [builder.extract_value(values[0], i) for i in range(count + 1)]
            builder.call(builder.inttoptr(given[0], kind.as_pointer()), given[1:])
            return context.get_dummy_value()

        return types.void(types.UniTuple(types.intp, count + 1)), codegen

    return intrinsic(called)


call5, call8, call9 = _call(5), _call(8), _call(9)  # of a tuple: the address of a C function, then its integers
