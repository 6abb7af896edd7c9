"""Dense weights as GPU kernels want them: sizes rounded up with zeros, in the type of the activations."""

import torch
from torch import Tensor

from widedeep.model import WideDeep

ALIGNMENT = 64  # floats: each gradient starts on 256 bytes, what the fastest products want


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class PaddedWeights:
    """Copies and gradients of a model's dense weights.

    Hidden widths are rounded up to 8 and the deep input to `FeatureSpec.padded_width`. Padding is zero and stays so:
    a padded unit has weights and bias 0, so its output and its gradients are 0.

    Args:
        dtype: of the activations.
    Attributes:
        widths: of the deep input and of every hidden layer, padded.
        masters: the model's float32 weights by name.  copies: padded copies of those that differ in size or type.
        flat: all gradients in one float32 buffer.  padded: its parts, by name.  grads: their rows that are no padding,
            which `rmsprop_dense_` takes.
    """

    def __init__(self, model: WideDeep, dtype: torch.dtype, device: torch.device):
        hidden = [round_up(units, 8) for units in model.hidden] if model.has_deep else []
        self.widths = [model.layout.padded_width, *hidden]
        self.masters = {name: a for name, a in model.named_arrays().items() if ".table." not in name}
        shapes = {name: self._padded_shape(name, a) for name, a in self.masters.items()}
        self.copies = {}
        for name, a in self.masters.items():
            wanted = dtype if name.startswith("deep.layer.") else torch.float32
            if shapes[name] != tuple(a.shape) or wanted != torch.float32:
                self.copies[name] = torch.zeros(shapes[name], dtype=wanted, device=device)
        starts, total = {}, 0
        for name, shape in shapes.items():
            starts[name] = total
            total += round_up(torch.Size(shape).numel(), ALIGNMENT)
        self.flat = torch.zeros(total, device=device)
        self.padded = {
            name: self.flat[starts[name] : starts[name] + torch.Size(shape).numel()].view(shape)
            for name, shape in shapes.items()
        }
        self.grads = {name: self._rows(name, g) for name, g in self.padded.items()}

    def _padded_shape(self, name: str, a: Tensor) -> tuple[int, ...]:
        if name.startswith("deep.layer."):
            i = int(name.split(".")[2])
            return (self.widths[i + 1], self.widths[i]) if a.ndim == 2 else (self.widths[i + 1],)
        return (1, self.widths[-1]) if name == "deep.out.weight" else tuple(a.shape)

    def _rows(self, name: str, padded: Tensor) -> Tensor:
        return padded[: len(self.masters[name])]

    def get(self, name: str) -> Tensor:
        """What the kernels read: the padded copy, or the weight itself."""
        return self.copies.get(name, self.masters[name])

    def refresh(self) -> None:
        """Copies the weights anew, after somebody else has written them."""
        for name, copy in self.copies.items():
            self.unpadded(name, copy).copy_(self.masters[name])

    def unpadded(self, name: str, padded: Tensor) -> Tensor:
        """The part of a padded tensor that has the weight's shape."""
        a = self.masters[name]
        return padded[: a.shape[0], : a.shape[1]] if a.ndim == 2 else padded[: a.shape[0]]

    def update_lists(self, with_copies: bool) -> tuple[list[str], list[Tensor]]:
        """Names of the deep weights that have a copy, or have none, and the copies' rows that are no padding."""
        names = [n for n in self.masters if n.startswith("deep.") and (n in self.copies) == with_copies]
        return names, [self._rows(n, self.copies[n]) for n in names] if with_copies else []
