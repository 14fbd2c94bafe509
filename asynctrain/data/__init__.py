"""From image files to batches: what there is, in which order, as which arrays, and the loader that streams them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asynctrain.data import augment

# What there is: datasets are read at random
from asynctrain.data.datasets import ArrayDataset, ArraySource, Dataset, FileSource, ImageFolder, Splitting, Subset

# How one image becomes an array
from asynctrain.data.images import ImageSettings, decode

# How they arrive
from asynctrain.data.loader import Batches, Loader, StreamLoader
from asynctrain.data.pipeline import Pipeline, Stream, arriving, hand_on

# In which order
from asynctrain.data.sampler import BalancedSampler, Order, Sampler, WeightedSampler
from asynctrain.data.statistics import StageStatistics, Statistics

if TYPE_CHECKING:
    from asynctrain.data.cache import Cache, FileCache, MemoryCache
    from asynctrain.data.digits import unpack_digits
    from asynctrain.data.manifest import ImageManifest
    from asynctrain.data.mixing import Concat, Interleave
    from asynctrain.data.remote import RemoteImages
    from asynctrain.data.streams import DatasetStream, InterleaveStreams, RecordStream, from_async_iterable
    from asynctrain.data.tar import CompressedTarShards, TarShards
    from asynctrain.data.uploads import Uploads

_LATER = {  # imported when they are first asked for: most programs use none or one of them
    "cache": ("Cache", "FileCache", "MemoryCache"),
    "digits": ("unpack_digits",),
    "manifest": ("ImageManifest",),
    "mixing": ("Concat", "Interleave"),
    "remote": ("RemoteImages",),
    "streams": ("DatasetStream", "InterleaveStreams", "RecordStream", "from_async_iterable"),
    "tar": ("CompressedTarShards", "TarShards"),
    "uploads": ("Uploads",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"asynctrain.data.{module}"), name)
    raise AttributeError(f"module 'asynctrain.data' has no attribute {name!r}")


__all__ = [
    "ArrayDataset",
    "ArraySource",
    "BalancedSampler",
    "Batches",
    "Cache",
    "CompressedTarShards",
    "Concat",
    "Dataset",
    "DatasetStream",
    "FileCache",
    "FileSource",
    "ImageFolder",
    "ImageManifest",
    "ImageSettings",
    "Interleave",
    "InterleaveStreams",
    "Loader",
    "MemoryCache",
    "Order",
    "Pipeline",
    "RecordStream",
    "RemoteImages",
    "Sampler",
    "Splitting",
    "StageStatistics",
    "Statistics",
    "Stream",
    "StreamLoader",
    "Subset",
    "TarShards",
    "Uploads",
    "WeightedSampler",
    "arriving",
    "augment",
    "decode",
    "from_async_iterable",
    "hand_on",
    "unpack_digits",
]
