"""Logger of Weights & Biases runs."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax

from jlora.training.callbacks import MetricValues
from jlora.training.metrics import MetricsLogger

if TYPE_CHECKING:
    from jlora.training.loop import TrainLoop

WANDB_ID_FILE = "wandb_run_id.txt"


class WandbLogger(MetricsLogger):
    """Logger of a Weights & Biases run, whose config is the recipe.

    The id of the W&B run is kept in the output folder, so that a resumed run continues it. W&B
    drops the steps that it has already; the resumed run computes the same values again.

    Example:
        >>> from jlora.training import WandbLogger, recipe, train
        >>> logger = WandbLogger("my-project", mode="offline")  # doctest: +SKIP
        >>> train(recipe.load("recipe.yaml"), callbacks=[logger])  # doctest: +SKIP
    """

    def __init__(
        self,
        project: str,
        *,
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        """Sets the place of the W&B run.

        Args:
            project: Project of the W&B run.
            entity: User or team of the project; None: the default one of the account.
            name: Name of the W&B run; None: a random one.
            mode: Whether data is uploaded ("online") or kept in the output folder ("offline"), from
                which `wandb sync` uploads it; None: the environment variable WANDB_MODE, or online.

        Raises:
            ImportError: wandb is not installed.
        """
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                'Logging to Weights & Biases requires wandb. Run: pip install "jlora[wandb]"'
            ) from error
        self._settings = {"project": project, "entity": entity, "name": name, "mode": mode}
        self._run: Any = None
        self._loop: TrainLoop | None = None

    def on_train_start(self, loop: TrainLoop) -> None:
        """Starts a W&B run, or continues that of a resumed run."""
        self._loop = loop
        if jax.process_index() > 0:
            return
        output = Path(loop.recipe.output)
        id_path = output / WANDB_ID_FILE
        if not (loop.progress.step and id_path.exists()):
            id_path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._run = self._wandb.init(
            id=id_path.read_text(encoding="utf-8"),
            resume="allow",
            dir=output,
            config=loop.recipe.model_dump(mode="json"),
            **self._settings,
        )

    def log(self, step: int, metrics: MetricValues) -> None:
        """Logs the values at a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the W&B run: finished, or failed where the training raised an exception."""
        if self._run is not None:
            assert self._loop is not None
            self._run.finish(exit_code=0 if self._loop.is_finished else 1)
