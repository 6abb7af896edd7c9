"""The flavours by name."""

from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.nvtabular import Nvtabular
from preprocess.outbrain.spark import Spark

FLAVOURS: dict[str, Flavour] = {flavour.name: flavour for flavour in (Nvtabular(), Spark())}
