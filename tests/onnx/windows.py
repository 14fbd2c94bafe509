"""Convolutions and pools: what looks at images through a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from asynctrain import nn
from asynctrain.arena import Array
from asynctrain.nn.scope import Scope, Workspace
from tests.onnx.nodes import Node, Outputs, Pair, Run, UnsupportedError, channels_first, channels_last, plane, run_layer

# Padding


def padding(node: Node, size: Pair) -> Any:
    """Return ``padding`` for the attributes ``auto_pad``, ``pads`` and ``ceil_mode``.

    The last of them wants windows too that begin on the image and end beyond it: so much more padding at the end.
    """
    axes = list(zip(node.image, spans(node, size), node.pair("strides", 1), strict=True))
    auto = node.get("auto_pad", "NOTSET")
    if auto == "SAME_UPPER":
        return "same"
    if auto == "VALID":
        return "valid"
    if auto == "SAME_LOWER":
        totals = [max(0, (-(-length // stride) - 1) * stride + span - length) for length, span, stride in axes]
        return shared(totals, more_at_end=False)
    pads = node.get("pads", ())
    begins, ends = plane(pads[: len(pads) // 2], 0), plane(pads[len(pads) // 2 :], 0)
    if node.get("ceil_mode", 0):
        ends = plane([end + lacking(*axis, begin, end) for axis, begin, end in zip(axes, begins, ends, strict=True)])
    return tuple(zip(begins, ends, strict=True))


def spans(node: Node, size: Pair) -> Pair:
    """Return how many pixels a window reaches over, with the gaps of ``dilations``."""
    return plane([gap * (length - 1) + 1 for gap, length in zip(node.pair("dilations", 1), size, strict=True)])


def lacking(length: int, span: int, stride: int, begin: int, end: int) -> int:
    """Return how many pixels one more window lacks, if it begins before the padding at the end does; else 0."""
    rest = (begin + length + end - span) % stride
    start = begin + length + end - span - rest + stride
    return stride - rest if rest and start < begin + length else 0


def shared(totals: Sequence[int], *, more_at_end: bool) -> tuple[Pair, ...]:
    """Return totals of padding as what is at the beginning and what at the end."""
    return tuple((t // 2, t - t // 2) if more_at_end else (t - t // 2, t // 2) for t in totals)


# Convolutions


def conv(node: Node) -> Run:
    """``Conv``."""
    size = plane(node.shape(1)[2:])
    layer = convolution(node, node.shape(1)[0], size, padding(node, size), use_bias=node.has(2))

    def run(x: Array, kernel: Array, bias: Array | None = None) -> Outputs:
        given = {"weight": weight_of(kernel)} | ({} if bias is None else {"bias": bias})
        return (channels_first(run_layer(layer, channels_last(x), given), x),)

    return run


def conv_transpose(node: Node) -> Run:
    """``ConvTranspose``: the input gradient of the convolution that would have made x of an image of y's size."""
    if node.has(2):
        raise UnsupportedError("a bias on top of a convolution's input gradient")
    filters, channels, *window = node.shape(1)
    lengths, margins = transposed(node, plane(window))
    layer = convolution(node, filters, plane(window), margins, use_bias=False)

    def run(x: Array, kernel: Array) -> Outputs:
        params, scope = {"weight": weight_of(kernel)}, Scope(Workspace(), train=True)
        image = np.zeros((len(x), *lengths, channels * node.get("group", 1)), x.dtype)
        y, saved = layer.forward(params, image, scope)
        dy = channels_last(x)
        assert y.shape == dy.shape, f"the convolution gives the shape {y.shape}, not {dy.shape}"
        return (channels_first(layer.backward_input(params, saved, dy, scope), x),)

    return run


def transposed(node: Node, size: Pair) -> tuple[Pair, tuple[Pair, ...]]:
    """Return the height and width of a transposed convolution's output, and the padding of the forward one."""
    axes = zip(
        node.image, spans(node, size), node.pair("strides", 1), plane(node.get("output_padding", ()), 0), strict=True
    )
    full = [stride * (length - 1) + span + more for length, span, stride, more in axes]
    auto, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if auto.startswith("SAME"):
        wanted = wanted or [length * stride for length, stride in zip(node.image, node.pair("strides", 1), strict=True)]
    if wanted is None:
        margins = padding(node, size)
        return plane([length - sum(cut) for length, cut in zip(full, margins, strict=True)]), margins
    totals = [max(0, length - less) for length, less in zip(full, plane(wanted), strict=True)]  # what is beyond is zero
    return plane(wanted), shared(totals, more_at_end=auto == "SAME_UPPER")


def convolution(node: Node, filters: int, size: Pair, padding: Any, *, use_bias: bool) -> nn.Conv2D:
    """Return the layer for a node's strides, dilations and groups."""
    return nn.Conv2D(
        filters,
        size,
        stride=node.pair("strides", 1),
        padding=padding,
        dilation=node.pair("dilations", 1),
        groups=node.get("group", 1),
        use_bias=use_bias,
    )


def weight_of(kernel: Array) -> Array:
    """(F, C / groups, kh, kw) -> (kh, kw, C / groups, F); windows of one dimension get the height 1."""
    kernel = kernel if kernel.ndim == 4 else kernel[:, :, np.newaxis]
    return np.ascontiguousarray(np.transpose(kernel, (2, 3, 1, 0)))


# Pools


def max_pool(node: Node) -> Run:
    """``MaxPool``."""
    size = node.pair("kernel_shape", 1)
    layer = nn.MaxPool2D(
        size,
        stride=node.pair("strides", 1),
        padding=padding(node, size),
        dilation=node.pair("dilations", 1),
    )
    return on_images(layer) if node.outputs == 1 else with_indices(node, layer)


def average_pool(node: Node) -> Run:
    """``AveragePool``."""
    size = node.pair("kernel_shape", 1)
    layer = nn.AvgPool2D(
        size,
        stride=node.pair("strides", 1),
        padding=padding(node, size),
        dilation=node.pair("dilations", 1),
        count_include_pad=bool(node.get("count_include_pad", 0)),
    )
    return on_images(layer)


def global_pool(layer: nn.Layer) -> Callable[[Node], Run]:
    """Return the translation to a layer that leaves one number of each channel."""
    return lambda node: lambda x: (run_layer(layer, channels_last(x)).reshape(*x.shape[:2], *(1 for _ in x.shape[2:])),)


def on_images(layer: nn.Layer) -> Run:
    """Return the run of a layer without parameters."""
    return lambda x: (channels_first(run_layer(layer, channels_last(x)), x),)


def with_indices(node: Node, layer: nn.MaxPool2D) -> Run:
    """The second output tells where in x each maximum was: where the gradient of that output alone goes."""
    batch, channels, height, width = node.shape(0)
    counted = np.arange(prod(node.shape(0)))
    if node.get("storage_order", 0):  # the pixels column by column
        positions = channels_last(np.swapaxes(counted.reshape(batch, channels, width, height), 2, 3))
    else:
        positions = channels_last(counted.reshape(node.shape(0)))

    def run(x: Array) -> Outputs:
        scope = Scope(Workspace(), train=True)
        y, saved = layer.forward({}, channels_last(x), scope)
        indices = np.empty(y.shape, np.int64)
        for place in np.ndindex(y.shape):
            dy = np.zeros_like(y)
            dy[place] = 1
            indices[place] = positions[layer.backward_input({}, saved, dy, scope) == 1].item()
        return channels_first(y, x), channels_first(indices, x)

    return run
