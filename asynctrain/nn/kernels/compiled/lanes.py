"""Numbers side by side: a type for kernels that numba compiles, each a vector register or a few.

The compiler makes vectors of plain loops too, but keeps in memory what one loop leaves for the next; with lanes a
kernel says what is to stay in registers. There are ``LANES`` of them on every machine, whatever its registers hold.

Places in arrays are indices into their memory, whatever their shape; arrays are C-contiguous.
"""

# mypy: disable-error-code="attr-defined, no-untyped-call, untyped-decorator"
# numba has types in part

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import cgutils, errors, types
from numba.core.datamodel import models, register_default
from numba.core.typing import templates

LANES = 16
WORD = ir.IntType(64)
ROUNDED_ONCE = ("contract",)  # what products and sums may be: a b + c

intrinsic: Any = numba.extending.intrinsic  # its own type has the arguments wrong
Emit = Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]


class Lanes(types.Type):
    """The type of ``LANES`` numbers of one scalar type; they add, subtract and multiply lane by lane."""

    def __init__(self, scalar: Any) -> None:
        super().__init__(name=f"Lanes({scalar})")
        self.scalar = scalar


@register_default(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, _vector(manager.lookup(lanes.scalar).get_value_type()))


def _vector(scalar: ir.Type) -> ir.VectorType:
    return ir.VectorType(scalar, LANES)


def _start(context: Any, builder: ir.IRBuilder, array: Any, value: ir.Value) -> ir.Value:
    """Return the address of an array's first element."""
    if array.layout != "C":
        raise errors.TypingError(f"lanes are of C-contiguous arrays, got {array}")
    return context.make_array(array)(context, builder, value).data


def _spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    vector = _vector(scalar.type)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))


def _load(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    scalar = address.type.pointee
    return builder.load(builder.bitcast(address, _vector(scalar).as_pointer()), align=_size(scalar))


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    place = builder.bitcast(address, value.type.as_pointer())
    builder.store(value, place, align=_size(value.type.element))


def _size(scalar: ir.Type) -> int:
    return 4 if isinstance(scalar, ir.FloatType) else 8


@intrinsic
def load(_: Any, array: Any, at: Any) -> Any:
    """Return the elements from ``at`` on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        value, index = arguments
        return _load(builder, builder.gep(_start(context, builder, array, value), [index]))

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic
def load_inside(_: Any, array: Any, at: Any, inside: Any) -> Any:
    """Return the elements from ``at`` on where ``inside`` is true, else zeros; without a jump."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        value, index, condition = arguments
        address = builder.gep(_start(context, builder, array, value), [index])
        zeros = cgutils.global_constant(builder, "zeros", ir.Constant(_vector(address.type.pointee), None))
        return _load(builder, builder.select(condition, address, builder.bitcast(zeros, address.type)))

    return Lanes(array.dtype)(array, types.intp, types.boolean), generate


@intrinsic
def store(_: Any, array: Any, at: Any, lanes: Any) -> Any:
    """Overwrite the elements from ``at`` on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        value, index, written = arguments
        _store(builder, written, builder.gep(_start(context, builder, array, value), [index]))
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def spread(_: Any, number: Any) -> Any:
    """Return lanes that are all ``number``."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return _spread(builder, arguments[0])

    return Lanes(number)(number), generate


@intrinsic
def larger(_: Any, a: Any, b: Any) -> Any:
    """Return the larger of each two; a NaN is larger than all."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        x, y = arguments
        return builder.select(builder.or_(builder.fcmp_ordered(">", x, y), builder.fcmp_unordered("uno", x, x)), x, y)

    return a(a, b), generate


@intrinsic
def where_equal(_: Any, a: Any, b: Any, value: Any) -> Any:
    """Return ``value`` where a = b, else 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        x, y, chosen = arguments
        return builder.select(builder.fcmp_ordered("==", x, y), chosen, ir.Constant(chosen.type, None))

    return value(a, b, value), generate


@intrinsic
def where_positive(_: Any, a: Any, value: Any) -> Any:
    """Return ``value`` where a > 0, else 0."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        x, chosen = arguments
        zeros = ir.Constant(chosen.type, None)
        return builder.select(builder.fcmp_ordered(">", x, zeros), chosen, zeros)

    return value(a, value), generate


def _define(symbol: Callable[[Any, Any], Any], emit: Emit) -> None:
    """Give an operator its meaning for lanes."""

    @templates.infer_global(symbol)
    class OfLanes(templates.AbstractTemplate):
        def generic(self, arguments: Any, keywords: Any) -> Any:
            if len(arguments) == 2 and isinstance(arguments[0], Lanes) and arguments[0] == arguments[1]:
                return templates.signature(arguments[0], *arguments)
            return None

    @numba.extending.lower_builtin(symbol, Lanes, Lanes)
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return emit(builder, *arguments)


_define(operator.add, lambda builder, a, b: builder.fadd(a, b, flags=ROUNDED_ONCE))
_define(operator.sub, lambda builder, a, b: builder.fsub(a, b, flags=ROUNDED_ONCE))
_define(operator.mul, lambda builder, a, b: builder.fmul(a, b, flags=ROUNDED_ONCE))


def _block(rows: int, vectors: int) -> Any:
    """Return a function that makes ``rows`` x (``vectors`` ``LANES``) numbers of a product, all sums in registers.

    It takes what ``multiply`` takes, and which row and column of the product its first number has.
    """

    @intrinsic
    def block(_: Any, a: Any, b: Any, c: Any, row: Any, column: Any, depth: Any, more: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
            *matrices, row, column, depth, more = arguments
            (a0, a_row, a_step), (b0, b_row, b_step), (c0, c_row, c_step) = (
                _origin(context, builder, matrix, value) for matrix, value in zip((a, b, c), matrices, strict=True)
            )
            a0, b0 = _at(builder, a0, row, a_row), _at(builder, b0, column, b_step)
            c0 = _at(builder, _at(builder, c0, row, c_row), column, c_step)
            from_a = [_at(builder, a0, WORD(r), a_row) for r in range(rows)]
            places = list(product(range(rows), range(vectors)))
            targets = [builder.gep(_at(builder, c0, WORD(r), c_row), [WORD(v * LANES)]) for r, v in places]
            zeros = ir.Constant(_vector(a0.type.pointee), None)
            sums = [cgutils.alloca_once(builder, zeros.type) for _ in places]
            for place in sums:
                builder.store(zeros, place)
            with builder.if_then(more):
                for place, target in zip(sums, targets, strict=True):
                    builder.store(_load(builder, target), place)
            with cgutils.for_range(builder, depth) as loop:
                from_b = _at(builder, b0, loop.index, b_row)
                columns = [_load(builder, builder.gep(from_b, [WORD(v * LANES)])) for v in range(vectors)]
                factors = [_spread(builder, builder.load(_at(builder, start, loop.index, a_step))) for start in from_a]
                for place, (r, v) in zip(sums, places, strict=True):
                    share = builder.fmul(factors[r], columns[v], flags=ROUNDED_ONCE)
                    builder.store(builder.fadd(builder.load(place), share, flags=ROUNDED_ONCE), place)
            for place, target in zip(sums, targets, strict=True):
                _store(builder, builder.load(place), target)
            return context.get_dummy_value()

        return types.void(a, b, c, types.intp, types.intp, types.intp, types.boolean), generate

    return block


def _origin(context: Any, builder: ir.IRBuilder, matrix: Any, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return where a matrix begins, and how far apart its rows and columns lie."""
    array, at, row, column = cgutils.unpack_tuple(builder, value)
    return builder.gep(_start(context, builder, matrix[0], array), [at]), row, column


def _at(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, apart: ir.Value) -> ir.Value:
    return builder.gep(address, [builder.mul(index, apart)])


ROWS = 8
_wide_block, _wide_row = _block(ROWS, 2), _block(1, 2)
_narrow_block, _narrow_row = _block(ROWS, 1), _block(1, 1)

Matrix = tuple[Any, int, int, int]  # an array, where in it the matrix begins, and how far apart rows and columns lie


@numba.njit(inline="always")
def multiply(a: Matrix, b: Matrix, c: Matrix, rows: int, columns: int, depth: int, more: bool) -> None:
    """Write a b into ``c``, or add it to what is there if there is ``more``.

    a is rows x depth, b is depth x columns, a multiple of ``LANES``. The columns of b, and those of c, are neighbours.
    Each number is added up in the order of ``depth``.
    """
    whole = rows // ROWS * ROWS
    for column in range(0, columns - LANES, 2 * LANES):
        for row in range(0, whole, ROWS):
            _wide_block(a, b, c, row, column, depth, more)
        for row in range(whole, rows):
            _wide_row(a, b, c, row, column, depth, more)
    if columns % (2 * LANES):
        for row in range(0, whole, ROWS):
            _narrow_block(a, b, c, row, columns - LANES, depth, more)
        for row in range(whole, rows):
            _narrow_row(a, b, c, row, columns - LANES, depth, more)
