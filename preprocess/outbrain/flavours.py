"""The flavours by name."""

from preprocess.outbrain.flavour import Flavour
from preprocess.outbrain.nvtabular import Nvtabular

FLAVOURS: dict[str, Flavour] = {flavour.name: flavour for flavour in (Nvtabular(),)}
