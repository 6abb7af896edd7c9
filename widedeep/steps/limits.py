"""What the kernels of the GPU step take. A model past it is for the reference step."""

from widedeep.model import WideDeep

# csrc/kernels/head.h, csrc/kernels/embedding.h and csrc/bindings/embedding_cuda.h
WIDEST_HEAD, MOST_TABLES, WIDEST_TABLE, MOST_NUMERICS, MOST_ID_COLUMNS = 2048, 256, 256, 256, 4096
_GPU = " for the fused step on a GPU"


def excess(model: WideDeep) -> str | None:
    """In which size a model is past the limits, as half a sentence: what was expected. None: in none."""
    spec = model.layout
    if model.has_deep and model.hidden and model.hidden[-1] > WIDEST_HEAD:
        expected = f"a last layer of at most {WIDEST_HEAD} units{_GPU}"
        return f"--deep_hidden_units: expected {expected}, got {model.hidden[-1]}"
    if model.has_deep and not model.hidden and spec.padded_width > WIDEST_HEAD:
        expected = f"at most {WIDEST_HEAD} columns of the deep input where there are no hidden layers{_GPU}"
        return f"expected {expected}, got {spec.padded_width}"
    for name, limit, count in (
        ("tables", MOST_TABLES, len(spec.categorical)),
        ("numeric features", MOST_NUMERICS, len(spec.numeric)),
        ("id columns", MOST_ID_COLUMNS, spec.id_columns),
    ):
        if count > limit:
            return f"feature spec: expected at most {limit} {name}{_GPU}, got {count}"
    for f in spec.categorical:
        if f.dim > WIDEST_TABLE:
            return f"feature {f.name}: expected an embedding_dim of at most {WIDEST_TABLE}{_GPU}, got {f.dim}"
    return None
