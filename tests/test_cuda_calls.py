"""Calls of ops in tests and benchmarks fit the signatures, as far as the text tells: only GPUs run some of them."""

import ast
import inspect
from pathlib import Path

import pytest

from widedeep import ops
from widedeep.ops import linear_sm90

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("tests", "bench") for path in sorted((ROOT / folder).glob("*.py"))]
MODULES = {"ops": ops, "linear_sm90": linear_sm90}


def misfits(text: str) -> list[str]:
    """Line and reason of each call of a module in MODULES that its function does not take."""
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)) if module in MODULES:
                function = getattr(MODULES[module], name, None)
                if function is None:
                    found.append(f"{node.lineno}: {module} has no {name}")
                elif problem := _misfit(inspect.signature(function), node):
                    found.append(f"{node.lineno}: {name}: {problem}")
    return found


def _misfit(signature: inspect.Signature, call: ast.Call) -> str | None:
    plain = [a for a in call.args if not isinstance(a, ast.Starred)]
    named = {k.arg: k for k in call.keywords if k.arg}
    spread = len(plain) < len(call.args) or len(named) < len(call.keywords)  # of any number: there may be more
    try:
        (signature.bind_partial if spread else signature.bind)(*plain, **named)
    except TypeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_calls_fit(source):
    assert misfits(source.read_text()) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("linear_sm90.linear_sm90_dgrad_out(dz, w, m, dx=dx, dbias=d)", "missing a required argument: 'p'"),
        ("linear_sm90.linear_sm90_dgrad_out(*args, keep=k)", "got an unexpected keyword argument 'keep'"),
        ("ops.dropout_keep(p)", "ops has no dropout_keep"),
    ],
)
def test_a_call_that_does_not_fit_is_named(call, reason):
    assert len(found := misfits(f"\n{call}")) == 1
    assert found[0].startswith("2: ")
    assert reason in found[0]
