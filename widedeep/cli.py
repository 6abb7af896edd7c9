"""The command line: finds the command, lets it declare its flags, runs it, and turns errors into one sentence.

A command is a module of `widedeep.commands` with `add_arguments(parser)` and `run(args) -> int`; only the one asked
for is imported. This is the one module that imports jsonargparse.
"""

import os
import re
import sys
import traceback
from argparse import Action
from collections.abc import Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from widedeep.errors import DISK_FULL, InputError, RunError
from widedeep.feature_spec import UniqueKeyLoader

COMMANDS = {
    "synth": "write synthetic raw CSVs in the Outbrain layout",
    "preprocess outbrain": "raw Outbrain CSVs to shards",
    "preprocess tabular": "your own CSV, Parquet or Arrow tables to shards",
    "preprocess tfrecord": "TFRecords of the Feb-2021 release to shards",
    "spec infer": "propose a feature spec from your tables",
    "describe": "what is in a data set: rows, clicks, values, numbers",
    "train": "train, and evaluate after each epoch",
    "evaluate": "metrics of a checkpoint on a data set",
    "predict": "probabilities of a checkpoint to a Parquet or CSV file",
    "export": "a checkpoint as an ONNX model, a torch .pt2 program or a model of Triton",
    "benchmark": "samples/s of training, or with --evaluate of the forward pass",
    "metrics": "metrics of a file of predictions",
    "parity": "replay a file of golden numbers and compare",
    "report": "one HTML page of a finished run",
    "doctor": "what is installed, what was built, what is missing",
}
ALIASES = {"--evaluation": "--evaluate"}
# Flags of the original's programs that have no place here, by the command that does their work: what to give instead.
_RECORDS = "--dataset_path instead; `widedeep preprocess tfrecord` makes a data set of TFRecords"
_FILES = "--rows_per_shard instead, which sets how many files there are"
GONE = {
    "train": dict.fromkeys(("--train_data_pattern", "--eval_data_pattern", "--transformed_metadata_path"), _RECORDS),
    "preprocess outbrain": {
        "--metadata_path": "--out instead",
        "--tfrecords_path": "--out instead; `widedeep train` reads what is there, so TFRecords are not written",
        "--use_dask": "--device cuda or --engine dask instead",
        "--num_train_partitions": _FILES,
        "--num_valid_partitions": _FILES,
    },
    "preprocess tabular": {
        "--input": "--spec instead, the feature spec beside the files",
        "--feature_spec_in": "--spec instead",
        "--output": "--out instead",
        "--feature_spec_out": "--out instead; the feature spec of the data set is in it",
        "--chunk_size": "--rows_per_shard instead",
        "--minimum_partition_number": "no such flag, since processes share out rows, not files",
    },
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


class Parser(ArgumentParser):
    """An ArgumentParser that also takes the options of a config dataclass."""

    def add_options(self, kind: type, title: str | None = None) -> None:
        """Adds one flag for each field of a dataclass made with `config.option`; tuples take several values."""
        group = self.add_argument_group(title) if title else self
        types = get_type_hints(kind)
        for f in fields(kind):
            how: dict[str, Any] = {"type": types[f.name], "help": f.metadata["help"]}
            how |= {"required": True} if f.default is MISSING else {"default": f.default}
            if get_origin(types[f.name]) is tuple:
                how |= {"type": get_args(types[f.name])[0], "nargs": "+", "default": list(how["default"])}
            elif types[f.name] is bool:
                how |= {"nargs": "?", "const": True}
            group.add_argument(f"--{f.name}", **how)

    def add_config_file(self) -> None:
        """Adds `--config FILE` and `--print_config`."""
        self.add_argument(
            "--config", action=ActionConfigFile, help="YAML file of flag names and values; given flags win over it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed run, 2 for bad input."""
    code = _run(argv)
    error = _flush()
    if code or error is None:  # a failed run has said so
        return code
    return 1 if isinstance(error, BrokenPipeError) else _complain(_sentence(error), 1)


def _run(argv: Sequence[str] | None) -> int:
    words = [_normalised(word) for word in (sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name, rest = _split(words)
    try:
        if name is None:
            return _overview(rest)
        _check_here()
        command = import_module(f"widedeep.commands.{name.replace(' ', '_')}")
        return command.run(_parse(name, command, rest))
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader of our output left; nothing to say, and nowhere to say it
        sys.stdout = None
        return 1
    except Exception as error:
        code = _exit_code(error)
        if code is None and _is_interrupted(error):
            return _complain("interrupted", 130)
        if debug or code is None:
            traceback.print_exc()
            return code or 1
        if isinstance(error, OSError) and not error.filename:
            error = _flush() or _with_name(error)
        return _complain(_sentence(error), code)


def _check_here() -> None:
    """Raises InputError where relative paths lead nowhere: there MKL ends the process, in words of its own."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working directory was removed: expected one that is there") from error


def _normalised(word: str) -> str:
    """`--num-epochs=3` as `--num_epochs=3`; values are left alone."""
    if not word.startswith("--") or word == "--":
        return word
    flag, equals, value = word[2:].partition("=")
    flag = "--" + flag.replace("-", "_")
    return ALIASES.get(flag, flag) + equals + value


def _split(words: list[str]) -> tuple[str | None, list[str]]:
    """The command (one or two words) and what follows it."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS:
            return name, words[length:]
    return None, words


def _overview(words: list[str]) -> int:
    """No command, or an unknown one: say which there are."""
    if words and words[0] == "--version":
        from widedeep import __version__

        print(__version__)
        return 0
    wanted = words[0] if words else ""
    known = {name: text for name, text in COMMANDS.items() if name.startswith(f"{wanted} ")} or COMMANDS
    asks_for_help = {"-h", "--help", "help"} & set(words[:2])
    if words and not asks_for_help:
        if known is COMMANDS:
            return _complain(f"unknown command {wanted!r}: expected one of {', '.join(COMMANDS)}", 2)
        return _complain(f"{wanted} needs one of: {', '.join(name.split()[1] for name in known)}", 2)
    stream = sys.stdout if asks_for_help else sys.stderr
    print("usage: widedeep COMMAND [FLAGS]\n", file=stream)
    print("\n".join(f"  {name:<20} {text}" for name, text in known.items()), file=stream)
    print("\n--help after a command lists its flags; --debug adds a traceback to an error", file=stream)
    return 0 if asks_for_help else 2


def _parse(name: str, command: ModuleType, words: list[str]) -> Any:
    parser = Parser(prog=f"widedeep {name}", description=COMMANDS[name], exit_on_error=False)
    command.add_arguments(parser)
    for path in _config_files(words):
        _check_config_file(path, {action.dest: action for action in parser._actions})
    try:
        return parser.parse_args(_config_first(words))
    except ArgumentError as error:
        given = {word.partition("=")[0] for word in words}
        for flag, instead in GONE.get(name, {}).items():
            if flag in given:
                raise InputError(f"{flag}: expected {instead}") from error
        if not (missing := re.match(r"the following arguments are required: (.*)", str(error))):
            raise
        places = {action.dest for action in parser._actions if not action.option_strings}
        absent = [word.upper() if word in places else f"--{word}" for word in missing[1].split(", ")]
        raise InputError(f"expected {' and '.join(absent)}: see `widedeep {name} --help`") from error


def _config_first(words: list[str]) -> list[str]:
    """The same words with `--config FILE` in front: flags win over the file, wherever they stand."""
    is_file = [word == "--config" or word.startswith("--config=") for word in words]
    is_file = [own or before == "--config" for own, before in zip(is_file, ["", *words])]
    return [w for w, first in zip(words, is_file) if first] + [w for w, first in zip(words, is_file) if not first]


def _config_files(words: list[str]) -> list[str]:
    after = [value for word, value in pairwise(words) if word == "--config"]
    return after + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def _check_config_file(path: str, flags: dict[str, Action]) -> None:
    """jsonargparse would refuse most of such files too, but without their name; it lets null pass for any value."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: expected YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a map of flag names to values")
    for key, value in values.items():
        if key in ("config", "help", "print_config"):
            raise InputError(f"{path}: {key}: expected on the command line alone")
        if key not in flags:
            meant = ALIASES.get(f"--{key}", "")[2:] or "the name of a flag"
            raise InputError(f"{path}: unknown key {key!r}: expected {meant}")
        if flags[key].nargs in ("*", "+") and not isinstance(value, list):
            raise InputError(f"{path}: {key}: expected a list, got {value!r}")
        if value is None and (flags[key].default is not None or flags[key].required):
            raise InputError(f"{path}: {key}: expected a value, got null")


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that is one of ours to explain; None for a defect of the program."""
    if isinstance(error, (InputError, RunError)):
        return error.exit_code
    if isinstance(error, ArgumentError):
        return 2
    if isinstance(error, OSError):
        return 1 if error.errno in DISK_FULL else 2
    return 1 if _is_out_of_memory(error) or type(error).__name__ == "OutOfMemoryError" else None


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether it comes of Ctrl-C: torch's ONNX exporter makes an error of its own of that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _with_name(error: OSError) -> OSError:
    """The same, with the file's name where pathlib was at work: reading and writing, the system does not say it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(path := frame.f_locals.get("self"), Path):
            error.filename = str(path)
    return error


def _flush() -> OSError | None:
    """Writes what was printed; the error of that, after which nothing more is printed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = None
        error.filename = "standard output"
        return error
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Of the host: torch's own allocator raises a RuntimeError with many lines."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else f"a file operation failed: {error.strerror}"
    if _is_out_of_memory(error):
        return "out of memory"
    return _wrong_value(str(error)) if isinstance(error, ArgumentError) else str(error)


def _wrong_value(text: str) -> str:
    """jsonargparse's account of a value of the wrong type, in the words of the flags; other texts as they are."""
    flag = re.match(r'Parser key "(\w+)"', text)
    wanted = re.search(r"Expected a (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>)", text)
    value = re.search(r"value: (.*)\Z", text, re.DOTALL)
    if not (flag and wanted and value):
        return text
    choices, kind = wanted.groups()
    expected = f"one of {choices.replace(chr(39), '')}" if choices else KINDS.get(kind, kind)
    return f"--{flag[1]}: expected {expected}, got {value[1]}"


def _complain(sentence: str, code: int) -> int:
    """One line on stderr, if it takes one."""
    if sys.stderr is not None:
        try:
            print("widedeep: " + " ".join(sentence.split()), file=sys.stderr)
        except OSError:
            sys.stderr = None
    return code
