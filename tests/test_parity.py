"""Parity: the files of real TensorFlow numbers pass, so do odd cases of our own, and every altered rule is caught."""

import json

import golden_numpy
import numpy as np
import pytest
from golden_numpy import Case

from widedeep import parity
from widedeep.errors import InputError

STEPS = ["reference", "fused"]
ODD = {
    "both": Case(),
    "wide only": Case(parts="wide", hidden=[]),
    "wide only, no numerics": Case(parts="wide", hidden=[], numeric=[]),
    "deep only": Case(parts="deep", seed=7),
    "no numerics": Case(numeric=[]),
    "no categoricals": Case(categorical=[]),
    "no categoricals, deep only": Case(categorical=[], parts="deep"),
    "no categoricals, wide only": Case(categorical=[], parts="wide", hidden=[]),
    "no numerics, no wide bias": Case(numeric=[], wide_bias=False),
    "numerics, no wide bias": Case(wide_bias=False),
    "no hidden layer": Case(hidden=[]),
    "one hidden layer": Case(hidden=[5]),
    "four hidden layers": Case(hidden=[9, 17, 33, 3]),
    "one feature of one row": Case(categorical=[("only", 1, 1)], numeric=["x"], seed=6),
    "other rates and rules": Case(deep_lr=2e-3, wide_lr=0.3, rho=0.9, eps=1e-5, accumulator=0.5, l1=0.01, l2=0.1),
    "no warm-up": Case(warmup=0, num_epochs=3),
    "half an epoch of warm-up": Case(warmup=0.5, num_epochs=2, steps_per_epoch=6),
    "three steps": Case(steps=3),
    "names that sort apart": Case(
        categorical=[("b", 9, 3), ("B", 8, 2), ("b_e", 7, 4), ("é", 5, 1), ("a", 6, 5)],
        numeric=["b_d", "b_f", "Z", "a_", "B_embedding_", "0"],
    ),
    "sampled tables": Case(
        sampled={"deep/emb/page": [0, 3, 50, 299], "deep/emb/item": [1, 2, 49], "wide/emb/page": [0, 299]}
    ),
}
WRONG = [
    "eps inside the root",
    "eps 1e-8",
    "rho 0.9",
    "lazy decay",
    "squares before summing",
    "summed loss",
    "Adagrad for FTRL",
    "accumulator starts at 0",
    "beta 1",
    "FTRL over whole tables",
    "wide numerics sorted",
    "order by bare names",
    "schedule one step off",
    "no quarter",
    "< at the boundary",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The arrays of the plain case."""
    return golden_numpy.write(tmp_path_factory.mktemp("golden") / "whole.npz", Case())


def failing(quantities):
    return [f"{q.quantity}: {q.max_error:.3g} > {q.limit:.3g}" for q in quantities if not q.ok]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["tiny", "outbrain_small"])
def test_real_tensorflow(name, step, shared):
    quantities = parity.replay(shared / "golden" / f"{name}.npz", "cpu", step)
    assert failing(quantities) == []
    assert len(quantities) == {"tiny": 21, "outbrain_small": 26}[name]


@pytest.mark.cuda
@pytest.mark.parametrize("step", ["reference", "auto"])
@pytest.mark.parametrize("name", ["tiny", "outbrain_small"])
def test_real_tensorflow_on_a_gpu(name, step, shared):
    assert failing(parity.replay(shared / "golden" / f"{name}.npz", "cuda", step)) == []


@pytest.mark.parametrize("step", STEPS)
def test_bfloat16_keeps_losses_and_predictions(step, shared):
    quantities = parity.replay(shared / "golden" / "tiny.npz", "cpu", step, "bf16")
    assert failing(quantities) == []
    names = " ".join(q.quantity for q in quantities)
    assert "weights" not in names
    assert "gradient" not in names
    loss = next(q for q in quantities if q.quantity == "loss, every step")
    assert loss.max_error > 1e-6  # it was bfloat16 indeed
    assert loss.limit == 2e-3


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ODD)
def test_odd_cases(name, step, tmp_path):
    golden_numpy.write(tmp_path / "odd.npz", ODD[name])
    quantities = parity.replay(tmp_path / "odd.npz", "cpu", step)
    assert failing(quantities) == []
    if name == "sampled tables":
        assert sum("row sums" in q.quantity for q in quantities) >= 6


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("wrong", WRONG)
def test_every_altered_rule_is_caught(wrong, step, tmp_path):
    # Long warm-up steps would hide the schedule's boundary, and pauses need more rows than a batch.
    case = Case(wrong=wrong, categorical=[("page", 300, 6), ("user", 7, 4), ("hall", 50, 8)], steps=16)
    case.numeric = ["user_ctr", "hour", "zeta", "hall_age"]
    golden_numpy.write(tmp_path / "right.npz", Case(**(vars(case) | {"wrong": ""})))
    assert failing(parity.replay(tmp_path / "right.npz", "cpu", step)) == []
    golden_numpy.write(tmp_path / "wrong.npz", case)
    assert failing(parity.replay(tmp_path / "wrong.npz", "cpu", step))


@pytest.mark.parametrize(
    ("drop", "gone"),
    [
        (["heldout/"], "held-out"),
        (["grad0/"], "gradient"),
        (["step1/", "step10/", "end/"], "weights"),
        (["slot/"], "slot"),
        (["step0/"], "logit"),
        (["lr_deep"], "learning rate"),
    ],
)
def test_optional_arrays_may_be_absent(drop, gone, whole, tmp_path):
    golden_numpy.edit(tmp_path / "g.npz", whole, drop)
    quantities = parity.replay(tmp_path / "g.npz", "cpu", "fused")
    assert failing(quantities) == []
    assert all(gone not in q.quantity for q in quantities)


def test_a_file_without_optional_settings(whole, tmp_path):
    config = json.loads(whole["config"].tobytes())
    kept = {k: v for k, v in config.items() if k not in ("format", "heldout", "deep_optimizer", "wide_numeric_order")}
    golden_numpy.edit(tmp_path / "g.npz", whole, config=np.frombuffer(json.dumps(kept).encode(), np.uint8))
    assert failing(parity.replay(tmp_path / "g.npz")) == []


@pytest.mark.parametrize("part", ["wide", "deep"])
def test_one_part_alone_needs_no_settings_of_the_other(part, tmp_path):
    whole = golden_numpy.write(tmp_path / "g.npz", Case(parts=part, numeric=[], hidden=[] if part == "wide" else [6]))
    config = json.loads(whole["config"].tobytes())
    unused = {
        "wide": [
            "deep_learning_rate",
            "steps_per_epoch",
            "num_epochs",
            "deep_warmup_epochs",
            "deep_optimizer",
            "hidden",
        ],
        "deep": ["linear_learning_rate", "linear_optimizer"],
    }
    for key in [*unused[part], "numeric", "wide_numeric_order"]:
        del config[key]
    config = np.frombuffer(json.dumps(config).encode(), np.uint8)
    golden_numpy.edit(tmp_path / "g.npz", whole, ["numeric", "heldout"], config=config)
    assert failing(parity.replay(tmp_path / "g.npz")) == []


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("loss", "loss, every step"),
        ("lr_deep", "learning rate"),
        ("step0/linear_logit", "wide logit"),
        ("step0/deep_logit", "deep logit"),
        ("step0/prob", "probability, step 0"),
        ("grad0/deep/dense_0/kernel", "gradient"),
        ("grad0/wide/emb/page", "gradient"),
        ("step1/deep/emb/item", "weights, step1"),
        ("step10/wide/dense/bias", "weights, step10"),
        ("end/deep/out/kernel", "weights, end"),
        ("slot/rms/deep/emb/item", "slot rms"),
        ("slot/accum/wide/emb/user", "slot accum"),
        ("slot/linear/wide/dense/kernel", "slot linear"),
        ("heldout/init_prob", "probability, held-out init"),
        ("heldout/end_prob", "probability, held-out end"),
        ("heldout/end_loss", "loss, held-out end"),
    ],
)
def test_every_array_is_compared(name, quantity, whole, tmp_path):
    """One number of one array off by one percent is found, and under its name."""
    changed = np.array(whole[name])
    changed.flat[np.argmax(np.abs(changed))] *= 1.01
    golden_numpy.edit(tmp_path / "g.npz", whole, **{name: changed})
    bad = [q.quantity for q in parity.replay(tmp_path / "g.npz") if not q.ok]
    assert any(q.startswith(quantity) for q in bad)


def test_another_input_order_is_reported(whole, tmp_path):
    order = [{"sort_key": "hour", "kind": "numeric", "name": "hour", "offset": 0, "width": 1}]
    golden_numpy.edit(tmp_path / "g.npz", whole, config={"deep_concat_order": order})
    (bad,) = [q for q in parity.replay(tmp_path / "g.npz") if not q.ok]
    assert bad.quantity.startswith("order of the deep input")
    assert bad.max_error == 6


MALFORMED = [
    ({"ids": np.zeros((14, 48, 2), np.int32)}, "ids: expected shape [14, 48, 3], got [14, 48, 2]"),
    ({"ids": np.full((14, 48, 3), 7, np.int32)}, "ids, column 1 (user): expected ids from 0 to 6"),
    ({"ids": np.full((14, 48, 3), -1, np.int32)}, "ids, column 0 (page): expected ids from 0 to 299"),
    ({"ids": np.zeros((14, 48, 3), np.float32)}, "ids: expected integers"),
    ({"labels": np.zeros((14, 47), np.float32)}, "labels: expected shape [14, 48]"),
    ({"numeric": np.full((14, 48, 4), np.nan, np.float32)}, "numeric: expected finite numbers"),
    ({"init/deep/out/kernel": np.zeros((13, 1), np.float32)}, "init/deep/out/kernel: expected shape [12, 1]"),
    ({"end/deep/emb/page": np.zeros((3, 6), np.float32)}, "end/deep/emb/page: expected shape [300, 6]"),
    ({"rows/deep/emb/page": np.array([300], np.int32)}, "rows/deep/emb/page: expected row numbers from 0 to 299"),
    ({"heldout/end_prob": np.zeros(3, np.float32)}, "heldout/end_prob: expected shape [96]"),
    ({"config": np.frombuffer(b"{", np.uint8)}, "config: expected JSON"),
    ({"config": np.frombuffer(b"[]", np.uint8)}, "config: expected a JSON object"),
    ({"config": {"steps": 0}}, "config.steps: expected an integer >= 1, got 0"),
    ({"config": {"hidden": [3.5]}}, "config.hidden: expected a list of integers >= 1"),
    ({"config": {"categorical": [{"rows": 3}]}}, "config.categorical[0]: expected an object with name"),
    ({"config": {"categorical": [{"name": "a", "rows": "3"}]}}, "config.categorical[0].rows: expected an integer"),
    ({"config": {"numeric": ["a", "a"]}}, "config: expected each feature once, got 'a' twice"),
    ({"config": {"deep_dropout": 0.1}}, "config.deep_dropout: expected 0"),
    ({"config": {"format": "other/2"}}, "config.format: expected 'wide-deep-golden/1', got 'other/2'"),
    ({"config": {"deep_optimizer": {"momentum": 0.9}}}, "config.deep_optimizer.momentum: expected 0.0, got 0.9"),
    ({"config": {"linear_optimizer": {"beta": 1.0}}}, "config.linear_optimizer.beta: expected 0.0, got 1.0"),
    ({"config": {"deep_warmup_epochs": 9}}, "deep_warmup_epochs: expected a number from 0 to num_epochs"),
]


@pytest.mark.parametrize(("changes", "words"), MALFORMED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_malformed_file_is_refused(changes, words, whole, tmp_path):
    golden_numpy.edit(tmp_path / "bad.npz", whole, **changes)
    with pytest.raises(InputError) as error:
        parity.replay(tmp_path / "bad.npz")
    assert words in str(error.value)


ABSENT = [
    *("config", "ids", "labels", "loss", "init/deep/dense_0/bias", "end/deep/dense_1/bias"),
    *("init/wide/emb/page", "init/wide/dense/bias", "grad0/wide/dense/kernel", "slot/accum/wide/emb/user"),
]


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_array_is_named(name, whole, tmp_path):
    golden_numpy.edit(tmp_path / "bad.npz", whole, [name])
    with pytest.raises(InputError, match=f"bad.npz: {name}: expected"):
        parity.replay(tmp_path / "bad.npz")


def test_a_damaged_or_missing_file_is_named(whole, tmp_path):
    path = tmp_path / "bad.npz"
    golden_numpy.edit(path, whole)
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (b"", b"no zip", content[:middle], content[:middle] + b"\0" * 9999 + content[middle + 9999 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad\.npz"):
            parity.replay(path)
    path.write_bytes(b"label,prob\n1,0.5\n")
    with pytest.raises(InputError, match=r"bad\.npz: expected a readable \.npz file, got something else$"):
        parity.replay(path)
    with pytest.raises(InputError, match=r"none\.npz: expected a readable \.npz file"):
        parity.replay(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"precision": "fp8"}, "precision: expected one of"),
        ({"precision": "tf32"}, "which has no tf32"),
        ({"step": "best"}, "step: expected one of"),
    ],
)
def test_unknown_choices_are_refused(changes, words, whole, tmp_path):
    golden_numpy.edit(tmp_path / "g.npz", whole)
    with pytest.raises(InputError) as error:
        parity.replay(tmp_path / "g.npz", **changes)
    assert words in str(error.value)


def test_run_prints_and_returns_the_exit_code(whole, tmp_path, capsys):
    golden_numpy.edit(tmp_path / "good.npz", whole)
    golden_numpy.edit(tmp_path / "bad.npz", whole, loss=whole["loss"] + 1)
    assert parity.run(tmp_path / "good.npz", json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert {"quantity", "max_error", "limit", "ok"} <= set(printed["quantities"][0])
    assert parity.run(tmp_path / "bad.npz", json=True) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [q["quantity"] for q in printed["quantities"] if not q["ok"]] == ["loss, every step"]
    assert parity.run(tmp_path / "good.npz") == 0
    assert "every limit holds" in capsys.readouterr().out
    assert parity.run(tmp_path / "bad.npz") == 1
    assert "1 of 20 quantities exceed their limit" in capsys.readouterr().out
