"""Source files of jlora that a call enters: those to read in order to follow it.

python -m benchmarks.code.files_entered --json files_entered.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import pathlib
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jlora

PACKAGE = pathlib.Path(inspect.getfile(jlora)).parent
DECODER = PACKAGE.parent / "tests" / "models" / "data" / "decoders" / "llama"

# Function that runs all steps, the one that the compiled step traces, and that of the product it is
# traced up to.
LOOP_FUNCTION = "TrainLoop.run"
STEP_FUNCTION = "make_train_step.<locals>.step"
DOT_GENERAL = inspect.unwrap(lax.dot_general).__code__


class _StopRecordingError(BaseException):
    """Raised in the recorded call at the first product of the step."""


class FileRecorder:
    """Records the files of jlora whose functions are called, in the order of their first call.

    What runs while a module is imported does not count.

    Attributes:
        functions: Names of the called functions, by the path of their file in the package.
    """

    def __init__(self, *, start: str | None = None, stop_at_step_product: bool = False) -> None:
        """Builds a recorder.

        Args:
            start: Qualified name of the function at whose first call recording begins. None: it
                begins at once.
            stop_at_step_product: True to end the recorded call at the first `dot_general` that the
                training step traces.
        """
        self._start = start
        self.functions: dict[str, list[str]] = collections.defaultdict(list)
        self._stop_at_step_product = stop_at_step_product
        self._in_step = False
        self._import_depths: dict[int, int] = collections.defaultdict(int)  # By thread.

    @property
    def files(self) -> list[str]:
        """Paths of the files in the package, in the order of their first call."""
        return list(self.functions)

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records this thread, and threads that start meanwhile, until the block ends."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            with contextlib.suppress(_StopRecordingError):
                yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>":
            self._import_depths[threading.get_ident()] += 1 if event == "call" else -1
        elif event == "call" and not self._import_depths[threading.get_ident()]:
            self._add(code)

    def _add(self, code: CodeType) -> None:
        if code is DOT_GENERAL and self._in_step and self._stop_at_step_product:
            raise _StopRecordingError
        path = pathlib.PurePath(code.co_filename)
        if path.is_relative_to(PACKAGE):
            self._in_step |= code.co_qualname == STEP_FUNCTION
            if self._start == code.co_qualname:
                self._start = None
            if self._start is not None:
                return
            names = self.functions[path.relative_to(PACKAGE).as_posix()]
            if code.co_qualname not in names:
                names.append(code.co_qualname)


def record_transform() -> dict[str, FileRecorder]:
    """Traces the functions of `lora_transform` for one product with LoRA."""
    params, x = {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))
    lora = jlora.lora_transform(
        lambda params, x: lax.dot_general(x, params["kernel"], (([1], [0]), ([], []))),
        jlora.LoRA(rank=2, alpha=4),
    )
    key = jax.random.key(0)
    adapter = jax.eval_shape(lora.init, key, params, x)
    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: jax.make_jaxpr(lora.apply)(params, adapter, x),
        "explain": lambda: lora.explain(params, x),
        "merge": lambda: jax.make_jaxpr(lora.merge)(params, adapter),
        # Another function than above, whose trace JAX has cached.
        "init": lambda: jax.eval_shape(lambda *inputs: lora.init(*inputs), key, params, x),
    }
    recorders = {}
    for name, call in calls.items():
        recorders[name] = FileRecorder()
        with recorders[name].record():
            call()
    return recorders


def record_training(folder: pathlib.Path, start: str | None = None) -> FileRecorder:
    """Trains a tiny decoder up to the first `dot_general` of the traced step.

    Args:
        folder: Empty folder for the base, the data and the run.
        start: Qualified name of the function at which recording begins. None: at `train`.
    """
    from jlora.training import recipe, train

    run = recipe.validate(_write_run_inputs(folder))
    recorder = FileRecorder(start=start, stop_at_step_product=True)
    with recorder.record():
        train(run, devices=jax.devices()[:1], quiet=True)
        raise RuntimeError(f"{STEP_FUNCTION} was not traced up to a product. Was it renamed?")
    return recorder


def _write_run_inputs(folder: pathlib.Path) -> dict[str, Any]:
    """Writes a base with a tokenizer of letters, and texts; returns the recipe's fields."""
    import tokenizers

    base = folder / "base"
    shutil.copytree(DECODER, base)
    vocab = {token: number for number, token in enumerate(["</s>", *"abcdefghij"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # type: ignore
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "texts.jsonl").write_text('{"text": "abcdefghij"}\n' * 4)
    return {
        "output": str(folder / "run"),
        "model": {"path": str(base), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {
            "train": [{"path": str(folder / "texts.jsonl"), "format": "text"}],
            "max_seq_length": 16,
        },
        "batch": {"size": 2},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="OUT", help="file for the files and their functions")
    options = parser.parse_args()
    recorders = record_transform()
    starts = {"train": None, "training step": LOOP_FUNCTION}
    for name, start in starts.items():
        with tempfile.TemporaryDirectory() as folder:
            recorder = record_training(pathlib.Path(folder), start)
        recorders[f"{name}, up to the first product"] = recorder
    print("| call | files |\n|---|---|")
    for name, recorder in recorders.items():
        print(f"| {name} | {len(recorder.files)} |")
    for name, recorder in recorders.items():
        print(f"\n{name}")
        for path, functions in recorder.functions.items():
            print(f"  {path}: {', '.join(function.split('.')[-1] for function in functions)}")
    if options.json:
        functions = {name: recorder.functions for name, recorder in recorders.items()}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(functions, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
