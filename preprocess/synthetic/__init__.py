"""A synthetic Outbrain: raw files in the Kaggle layout, with clicks from a planted model whose best score is known."""

from preprocess.synthetic.generate import run

__all__ = ["run"]
