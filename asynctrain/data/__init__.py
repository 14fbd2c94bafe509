"""From image files to batches: datasets, the order of their samples, decoding, and the loader that streams them."""

from asynctrain.data.datasets import ArrayDataset, ArraySource, Dataset, FileSource, ImageFolder, Splitting, Subset
from asynctrain.data.images import ImageSettings, decode
from asynctrain.data.loader import Batches, Loader
from asynctrain.data.sampler import Sampler

__all__ = [
    "ArrayDataset",
    "ArraySource",
    "Batches",
    "Dataset",
    "FileSource",
    "ImageFolder",
    "ImageSettings",
    "Loader",
    "Sampler",
    "Splitting",
    "Subset",
    "decode",
]
