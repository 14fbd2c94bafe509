"""The PyTorch twin of an asynctrain model, made from the model's own JSON, so that both sides have one architecture.

Runs in the peers' environment. The twin takes (N, C, H, W) float32, and ``load`` gives it asynctrain's weights; with
them it must give asynctrain's outputs, which the benchmarks check before they measure anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

JSON = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Pair = tuple[int, int]


class Residual(nn.Module):  # type: ignore[misc]  # torch is not there to check
    """main(x) + projection(x)."""

    def __init__(self, main: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.main, self.projection = main, projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.projection(x)


def twin(architecture: JSON) -> nn.Module:
    """Return the network that ``Model.to_json`` describes; raises ValueError for a kind of layer that has no twin."""
    height, width, channels = architecture["input_shape"]
    with torch.no_grad():
        model, _ = _chain(architecture["layers"], torch.zeros(1, channels, height, width))
    return model.train()


def load(model: nn.Module, params: Arrays, state: Arrays) -> nn.Module:
    """Give a twin asynctrain's parameters and running statistics, which lie in the order of its layers; return it.

    Raises:
        ValueError: they are not exactly what the twin has, by number and by shape.
    """
    _assign(((tensor, array) for tensor, array in zip(_tensors(model), _arrays(model, params, state), strict=True)))
    return model


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers a twin trains."""
    return sum(parameter.numel() for parameter in model.parameters())


# Layers


def _chain(layers: Sequence[JSON], x: torch.Tensor) -> tuple[nn.Sequential, torch.Tensor]:
    """Return the layers one after the other, and what they make of ``x``, an example from which they take shapes."""
    modules = []
    for layer in layers:
        module = _module(layer, x).eval()
        x = module(x)
        modules.append(module)
    return nn.Sequential(*modules), x


def _module(layer: JSON, x: torch.Tensor) -> nn.Module:
    kind = layer["layer"]
    if kind not in _KINDS:
        raise ValueError(f"{kind} has no twin in PyTorch yet; add it to benchmarks/networks.py")
    make: Callable[[JSON, torch.Tensor], nn.Module] = _KINDS[kind]
    return make(layer, x)


def _conv(layer: JSON, x: torch.Tensor) -> nn.Module:
    window, stride, dilation = (_pair(layer.get(name, 1)) for name in ("kernel_size", "stride", "dilation"))
    margins = [_margins(layer["padding"], x.shape[2 + i], window[i], stride[i], dilation[i], i) for i in (0, 1)]
    (top, bottom), (left, right) = margins
    even = top == bottom and left == right
    conv = nn.Conv2d(
        *(x.shape[1], layer["filters"], window, stride),
        padding=(top, left) if even else 0,
        dilation=dilation,
        groups=layer.get("groups", 1),
        bias=layer.get("use_bias", True),
    )
    return conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def _margins(padding: Any, length: int, window: int, stride: int, dilation: int, axis: int) -> Pair:
    """Return the pixels before and after an axis, as asynctrain pads it."""
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = max(0, (-(-length // stride) - 1) * stride + (window - 1) * dilation + 1 - length)
        return total // 2, total - total // 2
    return _pair(_pair(padding)[axis])


def _max_pool(layer: JSON, x: torch.Tensor) -> nn.Module:
    size = _pair(layer["size"])
    stride = size if layer.get("stride") is None else _pair(layer["stride"])
    margins = [_margins(layer["padding"], x.shape[2 + i], size[i], stride[i], 1, i) for i in (0, 1)]
    (top, bottom), (left, right) = margins
    if top == bottom and left == right:
        return nn.MaxPool2d(size, stride, (top, left))
    return nn.Sequential(nn.ConstantPad2d((left, right, top, bottom), float("-inf")), nn.MaxPool2d(size, stride))


def _batch_norm(layer: JSON, x: torch.Tensor) -> nn.Module:
    made = nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm1d
    return made(x.shape[1], eps=layer["eps"], momentum=1 - layer["momentum"])


def _flatten(layer: JSON, x: torch.Tensor) -> nn.Module:
    flatten = nn.Flatten()
    flatten.image_shape = tuple(x.shape[1:])  # by which ``load`` orders the rows of the next dense layer
    return flatten


def _residual(layer: JSON, x: torch.Tensor) -> nn.Module:
    main, projection = (_chain(layer[branch], x)[0] for branch in ("layers", "projection"))
    return Residual(main, projection)


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_KINDS = {
    "batch_norm": _batch_norm,
    "conv2d": _conv,
    "dense": lambda layer, x: nn.Linear(x.shape[1], layer["units"], bias=layer.get("use_bias", True)),
    "dropout": lambda layer, x: nn.Dropout(layer["rate"]),
    "flatten": _flatten,
    "global_average_pool": lambda layer, x: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "max_pool2d": _max_pool,
    "relu": lambda layer, x: nn.ReLU(inplace=True),
    "residual": _residual,
    "sequential": lambda layer, x: _chain(layer["layers"], x)[0],
}


# Weights


def _leaves(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Yield the modules with parameters in their order, each with the shape (C, H, W) that was flattened before it."""
    flattened: tuple[int, ...] = ()
    for module in model.modules():
        if isinstance(module, nn.Flatten):
            flattened = getattr(module, "image_shape", ())
        elif isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
            yield module, flattened
            flattened = ()


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module, _ in _leaves(model):
        yield module.weight
        if module.bias is not None:
            yield module.bias
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            yield module.running_mean
            yield module.running_var


def _arrays(model: nn.Module, params: Arrays, state: Arrays) -> Iterator[np.ndarray]:
    """Yield asynctrain's arrays in PyTorch's order of axes, in the order of ``_tensors``; all of them, or it raises."""
    own, running = iter(params.values()), iter(state.values())
    try:
        for module, flattened in _leaves(model):
            yield _weight(next(own), flattened)
            if module.bias is not None:
                yield next(own)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                yield from (next(running), next(running))
    except StopIteration:
        raise ValueError("the twin has more parameters than the model") from None
    if [*own, *running]:
        raise ValueError("the model has more parameters than the twin")


def _weight(weight: np.ndarray, flattened: tuple[int, ...]) -> np.ndarray:
    """(kh, kw, C, F) -> (F, C, kh, kw); (I, O) -> (O, I), its rows from the order H, W, C to C, H, W."""
    if weight.ndim == 4:
        return weight.transpose(3, 2, 0, 1)
    if weight.ndim == 2 and len(flattened) == 3:
        channels, height, width = flattened
        by_pixel = weight.reshape(height, width, channels, -1)
        weight = by_pixel.transpose(2, 0, 1, 3).reshape(weight.shape)
    return weight.T


def _assign(pairs: Iterator[tuple[torch.Tensor, np.ndarray]]) -> None:
    with torch.no_grad():
        for tensor, array in pairs:
            if tuple(tensor.shape) != array.shape:
                raise ValueError(f"the twin has a parameter of shape {tuple(tensor.shape)}, the model {array.shape}")
            tensor.copy_(torch.from_numpy(np.array(array, np.float32, order="C")))  # a copy: it may be read-only
