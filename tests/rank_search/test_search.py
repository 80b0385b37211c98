"""The search on synthetic runs, which return at once, and once on real runs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import pytest
import safetensors.numpy
import yaml
from _support.training_fixtures import Make

from jlora.rank_search import trials
from jlora.rank_search.search import SearchResult
from jlora.rank_search.selection import DIVERGED
from jlora.rank_search.study import STUDY_FILE, SearchOptions, Study, Trial, TrialSetting
from jlora.training import recipe, report
from jlora.training.loop import NonFiniteError
from jlora.training.recipe.sections import Recipe
from jlora.training.train import TrainResult, train

# The package has a function of this name.
search = importlib.import_module("jlora.rank_search.search")

Quality = Callable[[Recipe, int], float]


class Killed(BaseException):
    """Ends a search as SIGKILL would."""


class Runs:
    """Replaces `train`: writes the files of a run, with synthetic accuracies.

    Attributes:
        calls: Recipe and last step of each run that was started or continued.
        kill: Index of the call to kill, and whether to kill it after it wrote its result.
    """

    def __init__(self, quality: Quality) -> None:
        self.quality = quality
        self.calls: list[tuple[Recipe, int]] = []
        self.kill: tuple[int, bool] | None = None

    def train(
        self, given: Recipe, *, resume: bool, pause_after_step: int, program_cache: Any, **_: Any
    ) -> TrainResult:
        folder, steps = pathlib.Path(given.output), given.training.steps
        assert steps is not None
        there = [int(path.name) for path in folder.glob("checkpoints/*")]
        assert resume == bool(there)
        assert not there or max(there) <= pause_after_step
        number, at = len(self.calls), min(pause_after_step, steps)
        self.calls.append((given, at))
        program_cache.data_fingerprints = {"train": f"{given.seed}", "validation": "v"}
        (folder / "checkpoints" / f"{at}").mkdir(parents=True, exist_ok=True)
        self._die(number, False)
        accuracy = self.quality(given, at)
        if math.isnan(accuracy):
            raise NonFiniteError("Step 1: loss=nan")
        lines = [json.dumps({"step": n + 1, "loss": 1.0, "seconds": 0.5}) for n in range(at)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if at == steps:
            means = {"loss": 1 - accuracy, "accuracy": accuracy}
            result = {"validation": means, "trainable_params": trained(given), "seconds": 0.5 * at}
            (folder / "result.json").write_text(json.dumps(result))
        self._die(number, True)
        paused = {} if at == steps else {"accuracy": accuracy, "loss": 1 - accuracy}
        return TrainResult("max_steps" if at == steps else "paused", at, at, {}, [], [], paused)

    def _die(self, number: int, after: bool) -> None:
        if self.kill == (number, after):
            self.kill = None
            raise Killed


def trained(given: Recipe) -> int:
    """Trainable parameters of a synthetic run."""
    targets = given.adapter.target_pattern or "all"
    share = 5 if "attention" in targets else 7 if "mlp" in targets else 12
    return share * given.adapter.config_values()["rank"]


def noise(given: Recipe, size: float) -> float:
    """Deterministic noise of a run, different for every setting and seed."""
    lora = given.adapter
    what = (
        lora.config_values()["rank"],
        lora.config_values()["alpha"],
        lora.target_pattern,
        given.seed,
    )
    text = repr((*what, given.optimizer.learning_rate))
    return size * (int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**31 - 1)


def plausible(given: Recipe, at: int) -> float:
    """Score that grows up to rank 4, needs the MLP, and is best at twice the learning rate."""
    steps = given.training.steps
    assert steps is not None
    value = 0.5 + 0.1 * math.log2(min(given.adapter.config_values()["rank"], 4))
    value -= 0.08 if "attention" in (given.adapter.target_pattern or "") else 0.0
    value -= 0.05 * abs(math.log2(given.optimizer.learning_rate / 0.02))
    # The effect of a seed is the same for all settings, except for noise that breaks ties.
    return value - 0.1 * (1 - at / steps) + 0.01 * (given.seed % 3) + noise(given, 1e-4)


WIDE = SearchOptions(
    ranks=(1, 2, 4, 8, 16),
    seeds=3,
    lr_multipliers=(0.25, 0.5, 1.0, 2.0, 4.0),
    alpha_over_rank=(1.0, 2.0),
    num_rungs=3,
)


@pytest.fixture
def raw(recipe_of: Make, encoder: pathlib.Path, tmp_path: pathlib.Path) -> dict[str, Any]:
    """A classification recipe for synthetic runs, which read no data."""
    source = {"path": str(tmp_path / "none.jsonl"), "format": "classification"}
    return recipe_of(
        model={"path": str(encoder)},
        adapter={"rank": 4, "alpha": 8.0},
        data={"train": [source], "validation": [source], "test": [source], "max_seq_length": 16},
        training={"steps": 8, "metric": "accuracy"},
        optimizer={"learning_rate": 0.01},
        export={"merged": True},
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(plausible)
    monkeypatch.setattr(trials, "train", made.train)
    # It traces the model, and has its own test.
    monkeypatch.setattr(search, "check_settings", lambda *_: None)
    return made


def searched(raw: dict[str, Any], options: SearchOptions = WIDE, **more: Any) -> SearchResult:
    return search.search(recipe.validate(raw), options, quiet=True, **more)


def state_of(folder: pathlib.Path) -> dict[str, Any]:
    """search.json without times."""
    held = json.loads((folder / STUDY_FILE).read_text())
    held.pop("seconds")
    for trial in held["trials"]:
        trial.pop("seconds")
    return held


# --- trials and choices -------------------------------------------------------------


def test_search_stages_start_from_last_choice(raw: dict[str, Any], runs: Runs) -> None:
    found = searched(raw)
    rank, targets, rates, confirmation = found.stages
    # Rank 8 gains nothing over 4, so 16 is not tried.
    assert [each.setting.rank for each in rank.candidates] == [1, 2, 4, 8]
    assert rank.setting == TrialSetting(4, "all", 0.01, 8.0)
    # The MLP alone is as good as all, with fewer parameters.
    assert [each.setting.targets for each in targets.candidates] == ["all", "attention", "mlp"]
    assert targets.setting == TrialSetting(4, "mlp", 0.01, 8.0)
    assert (rates.setting.rank, rates.setting.targets, rates.setting.learning_rate) == (
        4,
        "mlp",
        0.02,
    )
    assert {each.setting for each in confirmation.candidates} == {
        rates.setting,
        targets.setting,
        rank.setting,
    }
    assert found.setting == confirmation.setting == rates.setting
    assert found.finished
    assert [each.trainable_params for each in rank.candidates] == [12, 24, 48, 96]
    assert rank.candidates[0].step_ms == 500


def test_search_runs_trials_once_from_recipe(raw: dict[str, Any], runs: Runs) -> None:
    searched(raw)
    ends = [(given.output, at) for given, at in runs.calls]
    assert len(set(ends)) == len(ends)
    for given, _ in runs.calls:
        assert given.data.test == []
        assert not given.export.merged
        assert (given.training.steps, given.training.eval_steps) == (8, 8)
        assert given.data.train == recipe.validate(raw).data.train
        assert given.adapter.dropout == 0.1  # type: ignore[attr-defined]
    seeds = {given.seed for given, at in runs.calls if at == 8}
    # The last seed is that of learning rates, which is not used for confirmation.
    assert seeds == {0, 1, 2, 3}


def test_successive_halving_of_learning_rates(raw: dict[str, Any], runs: Runs) -> None:
    found = searched(raw)
    of_rates = [(given, at) for given, at in runs.calls if given.seed == 3]
    # Five learning rates with alpha 8 of the recipe and alpha 4; 2 * 4 is 8 again.
    assert [at for _, at in of_rates] == [2] * 10 + [4] * 5 + [8] * 3
    for last, at in ((5, 2), (3, 4)):
        scores = {g.output: plausible(g, at) for g, step in of_rates if step == at}
        later = {g.output for g, step in of_rates if step == 2 * at}
        assert later == set(sorted(scores, key=lambda name: -scores[name])[:last])
    ended = {g.output: plausible(g, 8) for g, at in of_rates if at == 8}
    best = max(ended, key=lambda name: ended[name])
    assert found.setting is not None
    assert f"lr{found.setting.learning_rate!r}-a{found.setting.alpha!r}" in best


def test_rank_ladder_stops_within_noise(raw: dict[str, Any], runs: Runs) -> None:
    runs.quality = lambda given, at: 0.5 + noise(given, 0.2)
    rank = searched(raw).stages[0]
    assert len(rank.candidates) < 5
    before, after = (each.summary for each in rank.candidates[-2:])
    assert after.mean - before.mean <= math.hypot(before.stderr, after.stderr)
    assert "the standard error of this is" in rank.reason
    # Without noise each doubling counts, however small its gain.
    runs.quality = lambda given, at: 0.5 + 1e-3 * given.adapter.config_values()["rank"]
    raw["output"] += "-other"
    assert len(searched(raw).stages[0].candidates) == 5


def test_search_keeps_recipe_if_nothing_is_better(raw: dict[str, Any], runs: Runs) -> None:
    def of_recipe(given: Recipe, at: int) -> float:
        own = (given.adapter.config_values()["rank"], given.adapter.target_pattern) == (4, None)
        same = (
            given.adapter.config_values()["alpha"] == 8.0 and given.optimizer.learning_rate == 0.01
        )
        # The seed of learning rates is misleading.
        return 0.9 if own and same and given.seed < 3 else 0.5 + noise(given, 1e-3)

    runs.quality = of_recipe
    found = searched(raw, dataclasses.replace(WIDE, ranks=(1, 2)))
    assert found.stages[0].setting.rank < 4
    assert found.setting == TrialSetting(4, "all", 0.01, 8.0)
    assert "It is the original recipe." in (found.folder / "table.md").read_text()


def test_table_equal_scores_are_not_the_recipe(raw: dict[str, Any], runs: Runs) -> None:
    runs.quality = lambda given, at: 1.0
    found = searched(raw, dataclasses.replace(WIDE, ranks=(1, 2)))
    assert found.setting is not None
    assert found.setting.rank == 1
    text = (found.folder / "table.md").read_text()
    assert "It is the original recipe." not in text
    assert "Its mean is 0.0000 better than that of the original recipe, which is no more" in text


def test_halving_leaders_diverge_keeps_setting(raw: dict[str, Any], runs: Runs) -> None:
    def leaders_diverge(given: Recipe, at: int) -> float:
        own = (
            given.optimizer.learning_rate == 0.01 and given.adapter.config_values()["alpha"] == 8.0
        )
        if own or given.seed < 3:
            return plausible(given, at) - (0.4 if given.seed == 3 else 0.0)
        return 0.9 if at == 2 else math.nan

    runs.quality = leaders_diverge
    found = searched(raw)
    rates = found.stages[2]
    assert rates.setting == found.stages[1].setting
    assert "diverged by the next. The first, which the earlier stages selected" in rates.reason
    assert found.finished
    assert {path.name for path in found.folder.iterdir()} >= {"table.md", "best.yaml", STUDY_FILE}


def test_search_metric_loss_prefers_smaller(raw: dict[str, Any], runs: Runs) -> None:
    raw["training"]["metric"] = "loss"
    found = searched(raw)
    assert found.setting is not None
    assert (found.setting.rank, found.setting.learning_rate) == (4, 0.02)
    (line,) = [x for x in (found.folder / "table.md").read_text().splitlines() if "| 1 | all" in x][
        :1
    ]
    shown = float(line.split("|")[5].split("±")[0])
    assert shown == pytest.approx(-found.stages[0].candidates[0].summary.mean, abs=5e-5)  # Rounded.


def test_search_diverged_trials_stop_early(raw: dict[str, Any], runs: Runs) -> None:
    def fragile(given: Recipe, at: int) -> float:
        return math.nan if given.optimizer.learning_rate >= 0.02 else plausible(given, at)

    runs.quality = fragile
    found = searched(raw)
    assert found.setting is not None
    assert found.setting.learning_rate == 0.01
    held = state_of(found.folder)
    diverged = [trial for trial in held["trials"] if trial["stop_reason"] == "diverged"]
    assert len(diverged) == 4  # 0.02 and 0.04 with two alphas, at the first rung only.
    assert all(trial["values"] == {} for trial in diverged)
    assert "diverged" in (found.folder / "table.md").read_text()
    # Trials that diverged are not run again.
    calls = len(runs.calls)
    searched(raw, resume=True)
    assert len(runs.calls) == calls

    runs.quality = lambda given, at: math.nan
    raw["output"] += "-other"
    with pytest.raises(ValueError, match="settings diverged.*Lower optimizer.learning_rate"):
        searched(raw)


def test_rank_settings_fix_alpha_or_scale(raw: dict[str, Any], runs: Runs) -> None:
    for fix, use_rslora, alphas in (
        ("alpha", False, [8.0, 8.0]),
        ("scale", False, [2.0, 32.0]),
        ("scale", True, [4.0, 16.0]),
    ):
        raw["adapter"]["use_rslora"] = use_rslora
        staged = search.StagedSearch(recipe.validate(raw), SearchOptions(ranks=(1, 16), fix=fix))
        assert [setting.alpha for setting in staged.rank_settings()] == alphas


def test_search_tries_targets_of_recipe(raw: dict[str, Any], runs: Runs) -> None:
    raw["adapter"]["target_pattern"] = "query"
    found = searched(raw, dataclasses.replace(WIDE, targets=("attention", "all")))
    tried = [each.setting.targets for each in found.stages[1].candidates]
    assert tried == ["recipe", "attention", "all"]
    by_name = {
        pathlib.Path(given.output).name.split("-")[1]: given.adapter.target_pattern
        for given, _ in runs.calls
    }
    assert by_name["recipe"] == "query"
    assert by_name["all"] is None


def test_describe_cost_bounds_steps(
    raw: dict[str, Any], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every doubling gains, so that all ranks are tried.
    runs.quality = lambda given, at: 0.1 * math.log2(given.adapter.config_values()["rank"])
    raw["adapter"]["rank"] = 3
    search.search(recipe.validate(raw), WIDE)
    cost = capsys.readouterr().out.partition("\n")[0]
    announced = int(cost.rpartition(":")[2].split()[0].replace(",", ""))
    made: dict[str, int] = {}
    for given, at in runs.calls:
        made[given.output] = max(at, made.get(given.output, 0))
    assert 0.8 * announced <= sum(made.values()) <= announced


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["in a run", "after its result"])
@pytest.mark.slow
def test_killed_search_resumes_to_same_result(
    raw: dict[str, Any], runs: Runs, tmp_path: pathlib.Path, after: bool
) -> None:
    small = dataclasses.replace(
        WIDE, ranks=(2, 4), seeds=2, lr_multipliers=(1.0, 2.0), num_rungs=2, targets=("all", "mlp")
    )
    whole = searched(raw, small)
    calls = list(runs.calls)
    want = state_of(whole.folder)
    table = (whole.folder / "table.md").read_text()
    other = {**raw, "output": str(tmp_path / "killed")}
    runs.calls.clear()
    for number in range(len(calls)):
        # A call that was killed during its run is repeated.
        runs.kill = (number if after else 2 * number, after)
        with pytest.raises(Killed):
            searched(other, small, resume=number > 0)
    found = searched(other, small, resume=True)
    got = state_of(found.folder)
    assert got == want
    assert found.stages == whole.stages
    count = len(runs.calls)
    searched(other, small, resume=True)
    assert len(runs.calls) == count
    assert state_of(found.folder) == want
    same = [line for line in table.splitlines() if "±" in line and "|" in line]
    assert same == [
        line
        for line in (found.folder / "table.md").read_text().splitlines()
        if "±" in line and "|" in line
    ]
    # A run that wrote its result is not started again; a paused one may be evaluated again.
    ends = [(given.output.rpartition("/")[2], at) for given, at in runs.calls]
    if after:
        assert all(ends.count(end) == 1 for end in ends if end[1] == 8)


def test_resume_other_recipe_raises(raw: dict[str, Any], runs: Runs) -> None:
    searched(raw)
    calls = len(runs.calls)
    with pytest.raises(FileExistsError, match="has a search already, which is left unchanged"):
        searched(raw)
    other = {**raw, "batch": {"size": 3}, "seed": 4}
    with pytest.raises(ValueError, match=r"another recipe: seed=0 there, 4 here, batch.size=2 th"):
        searched(other, resume=True)
    assert len(runs.calls) == calls
    with pytest.raises(FileNotFoundError, match=r"search.json is missing.*Start without --resume"):
        searched({**raw, "output": raw["output"] + "-other"}, resume=True)


def test_resume_other_rungs_raises(raw: dict[str, Any], runs: Runs) -> None:
    searched(raw)
    with pytest.raises(
        ValueError, match="num_rungs=2, but .*search.json has trials .* of num_rungs=3"
    ):
        searched(raw, dataclasses.replace(WIDE, num_rungs=2), resume=True)


def test_resume_other_data_raises(
    raw: dict[str, Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.kill = (4, True)
    with pytest.raises(Killed):
        searched(raw)

    def changed(given: Recipe, **options: Any) -> TrainResult:
        outcome = runs.train(given, **options)
        options["program_cache"].data_fingerprints["validation"] = "w"
        return outcome

    monkeypatch.setattr(trials, "train", changed)
    with pytest.raises(
        ValueError, match="The validation data differs from that of earlier trials in"
    ):
        searched(raw, resume=True)


def change_base(folder: pathlib.Path) -> None:
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(
        {name: array * 2 for name, array in arrays.items()}, folder / "model.safetensors"
    )


def test_resume_other_base_raises(
    raw: dict[str, Any], runs: Runs, encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(encoder, tmp_path / "base")
    raw["model"]["path"] = str(folder)
    runs.kill = (4, True)
    with pytest.raises(Killed):
        searched(raw)
    change_base(folder)
    before = len(runs.calls)
    message = r"The base has other weights than in earlier trials in .*search.json, so that scores"
    with pytest.raises(ValueError, match=message):
        searched(raw, resume=True)
    assert len(runs.calls) == before
    # Other settings of the same weights.
    shutil.copy(encoder / "model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.5}))
    with pytest.raises(ValueError, match="The base has another config.json than"):
        searched(raw, resume=True)
    shutil.copy(encoder / "config.json", folder)
    assert searched(raw, resume=True).finished


def test_search_changed_base_raises(
    raw: dict[str, Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(given: Recipe, **options: Any) -> TrainResult:
        outcome = runs.train(given, **options)
        options["program_cache"].base_summary = {"tensors": "1", "config": "2"}
        return outcome

    monkeypatch.setattr(trials, "train", changed)
    with pytest.raises(ValueError, match="The base has other weights than in earlier trials"):
        searched(raw)
    # Its result is not taken for one of the base.
    folder = pathlib.Path(raw["output"]) / "trials"
    assert not list(folder.iterdir())
    monkeypatch.setattr(trials, "train", runs.train)
    assert searched(raw, resume=True).finished
    assert runs.calls[0][0].output == runs.calls[1][0].output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "search.json is not JSON"),
        ("[]", "search.json must contain a JSON object"),
        ('{"format": 99, "recipe": {}, "trials": []}', "has format=99"),
    ],
)
def test_resume_damaged_state_raises(
    raw: dict[str, Any], runs: Runs, text: str, message: str
) -> None:
    folder = pathlib.Path(raw["output"])
    folder.mkdir(parents=True)
    (folder / STUDY_FILE).write_text(text)
    with pytest.raises(ValueError, match=message):
        searched(raw, resume=True)


def test_timeout_stops_search_that_resumes(
    raw: dict[str, Any], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(trials.time, "monotonic", lambda: clock["now"])

    def slow(given: Recipe, at: int) -> float:
        clock["now"] += 60.0
        return plausible(given, at)

    runs.quality = slow
    found = searched(raw, dataclasses.replace(WIDE, timeout_minutes=4.5))
    assert len(runs.calls) == 5
    assert (found.setting, found.stages, found.finished) == (None, (), False)
    assert {path.name for path in found.folder.iterdir()} == {"trials", STUDY_FILE, "table.md"}
    seconds = [
        trial["seconds"] for trial in json.loads((found.folder / STUDY_FILE).read_text())["trials"]
    ]
    assert seconds == [60.0] * 5 + [0.0]  # The last one did not start.
    found = searched(raw, dataclasses.replace(WIDE, timeout_minutes=10.5), resume=True)
    assert len(runs.calls) == 16
    assert [stage.name for stage in found.stages] == ["rank"]
    assert found.setting == TrialSetting(4, "all", 0.01, 8.0)
    assert "The search is not finished" in (found.folder / "best.yaml").read_text()
    assert searched(raw, resume=True).finished


# --- output files -------------------------------------------------------------------------------


def test_search_files_report_result(raw: dict[str, Any], runs: Runs) -> None:
    given = {**raw, "training": {**raw["training"], "early_stopping_patience": 3, "eval_steps": 4}}
    found = searched(given, command="jlora rank-search r.yaml")
    assert found.setting is not None
    best = recipe.load(found.folder / "best.yaml")
    want = recipe.validate(
        {
            **given,
            "output": f"{given['output']}/best",
            "adapter": {
                **given["adapter"],
                "rank": 4,
                "alpha": found.setting.alpha,
                "target_pattern": trials.TARGET_PATTERNS["mlp"],
            },
            "optimizer": {"learning_rate": 0.02},
        }
    )
    assert best == want  # With the steps, early stopping and exports of the original recipe.
    comments = (found.folder / "best.yaml").read_text().partition("\noutput")[0]
    assert all(line.startswith("# ") for line in comments.splitlines())
    for text in ("optimistic", "rank 4, mlp, learning rate 0.02", "± "):
        assert text in comments
    table = (found.folder / "table.md").read_text()
    for text in (
        "3 seeds",
        "itself uncertain by about 50%",
        "optimistic",
        "original recipe",
    ):
        assert text in table
    held = state_of(found.folder)
    assert len(held["trials"]) == len({given.output for given, _ in runs.calls})
    assert held["command"] == "jlora rank-search r.yaml"
    assert held["finished"] is True
    assert [stage["chosen"] for stage in held["stages"]] == [s.chosen for s in found.stages]
    assert (found.folder / "quality.png").read_bytes()[:4] == b"\x89PNG"
    first = held["trials"][0]
    assert first["setting"] == {
        "rank": 1,
        "targets": "all",
        "learning_rate": 0.01,
        "alpha": 8.0,
    }
    assert (first["stop_reason"], first["trainable_params"]) == ("max_steps", 12)
    assert list(first["values"]) == ["8"]


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": ()}, r"ranks=\(\) must be positive and increasing"),
        ({"ranks": (4, 2)}, r"ranks=\(4, 2\) must be positive and increasing"),
        ({"ranks": (2, 2)}, "must be positive and increasing"),
        ({"ranks": (0, 2)}, "must be positive and increasing"),
        ({"seeds": 1}, "seeds=1 must be 2 or more"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"num_rungs": 0}, "num_rungs=0 must be 1 or more"),
        ({"lr_multipliers": ()}, r"lr_multipliers=\(\) must be one or more positive"),
        ({"lr_multipliers": (1.0, math.nan)}, "must be one or more positive numbers"),
        ({"alpha_over_rank": (0.0,)}, "must be one or more positive numbers"),
        ({"fix": "rank"}, "fix='rank' must be one of alpha, scale"),
        ({"timeout_minutes": 0.0}, r"timeout_minutes=0.0 must be positive"),
    ],
)
def test_search_options_invalid_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        ({"data": {"validation": []}}, {}, "data.validation=.. must have sources"),
        ({"adapter": {"family": "IA3"}}, {}, "adapter.family=IA3 has no rank and alpha"),
        (
            {
                "adapter": {"family": "AdaLoRA", "rank": 4, "alpha": 8.0},
                "optimizer": {"budget": {"target_rank": 2}},
            },
            {},
            "adapter.family=AdaLoRA chooses ranks during training",
        ),
        (
            {"training": {"epochs": 2}},
            {},
            "training.epochs=2 does not fix the number of steps.*--steps",
        ),
        (
            {},
            {"targets": ("mpl",)},
            r"must be one or more of \['attention', 'mlp', 'all'\], got \['mpl'\]",
        ),
        ({}, {"targets": ("recipe",)}, r"must be one or more of .* got \['recipe'\]"),
        ({}, {"num_rungs": 5}, "num_rungs=5 do not fit into steps=8"),
        ({"distributed": {"auto": True}}, {}, "a search runs in one process"),
    ],
)
def test_search_invalid_recipe_raises_early(
    raw: dict[str, Any],
    runs: Runs,
    sections: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    for name, section in sections.items():
        whole = name == "adapter" or (name, section) == ("training", {"epochs": 2})
        raw[name] = section if whole else {**raw.get(name, {}), **section}
    if not raw["data"]["validation"]:
        raw["training"].pop("metric")
    with pytest.raises(ValueError, match=message):
        searched(raw, dataclasses.replace(WIDE, **options))
    assert not runs.calls
    assert not pathlib.Path(raw["output"]).exists()


def test_search_impossible_setting_raises_early(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Runs(plausible)
    monkeypatch.setattr(trials, "train", made.train)
    raw["adapter"]["target_pattern"] = "atention/query/kernel"
    with pytest.raises(
        ValueError, match="A trial of rank 4, recipe,.* is not possible: .*matches none"
    ):
        searched(raw)
    assert not made.calls
    assert not pathlib.Path(raw["output"]).exists()


# --- real runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(
    tmp_path_factory: pytest.TempPathFactory, encoder: pathlib.Path, no_cache: None
) -> tuple[dict[str, Any], SearchResult, list[tuple[str, int]]]:
    """A search of two ranks with two seeds and two steps, killed once and resumed."""
    folder = tmp_path_factory.mktemp("search")
    for name, words in (("train", ["cat", "dog", "cow", "hen", "owl"]), ("held", ["fox", "bee"])):
        rows = [{"text": f"a {w} {verb}s", "label": verb} for w in words for verb in ("eat", "see")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "classification"}
    raw: dict[str, Any] = {
        "output": str(folder / "out"),
        "model": {"path": str(encoder), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0},
        "data": {
            "train": [{"path": str(folder / "train.jsonl"), **source}],
            "validation": [{"path": str(folder / "held.jsonl"), **source}],
            "max_seq_length": 16,
            "buckets": [16],
        },
        "batch": {"size": 4},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 2, "metric": "loss"},
    }
    options = SearchOptions(
        ranks=(1, 2),
        seeds=2,
        targets=("all",),
        lr_multipliers=(1.0, 2.0),
        alpha_over_rank=(2.0,),
        fix="scale",
        num_rungs=2,
    )
    calls: list[tuple[str, int]] = []

    def dying(given: Recipe, **more: Any) -> TrainResult:
        if len(calls) == 2 and not more["resume"]:
            calls.append(("died", 0))
            pathlib.Path(given.output).mkdir(parents=True)
            (pathlib.Path(given.output) / "recipe.yaml").write_text("half of")
            raise Killed
        calls.append((pathlib.Path(given.output).name, more["pause_after_step"]))
        return train(given, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trials, "train", dying)
        patched.setattr(report, "write_report", lambda *_, **__: None)  # Plots take a second each.
        with pytest.raises(Killed):
            searched(raw, options, devices=jax.devices()[:1])
        found = searched(raw, options, resume=True, devices=jax.devices()[:1])
    return raw, found, calls


@pytest.mark.slow
def test_real_search_writes_valid_best_recipe(
    real: tuple[dict[str, Any], SearchResult, list[tuple[str, int]]],
) -> None:
    raw, found, _ = real
    assert found.finished
    assert [stage.name for stage in found.stages] == ["rank", "targets", "rates", "confirmation"]
    assert {path.name for path in found.folder.iterdir()} == {
        STUDY_FILE,
        "table.md",
        "quality.png",
        "best.yaml",
        "trials",
        "cache",
    }
    best = recipe.load(found.folder / "best.yaml")
    assert found.setting is not None
    assert best.adapter.config_values()["rank"] == found.setting.rank
    assert best.optimizer.learning_rate == found.setting.learning_rate
    assert best.data == recipe.validate(raw).data
    assert list((found.folder / "cache").iterdir())


@pytest.mark.slow
def test_real_trials_run_once_in_own_folders(
    real: tuple[dict[str, Any], SearchResult, list[tuple[str, int]]],
) -> None:
    _, found, calls = real
    assert calls.count(("died", 0)) == 1
    assert len(set(calls)) == len(calls)
    held = json.loads((found.folder / STUDY_FILE).read_text())
    for facts in held["trials"]:
        trial = Trial.from_dict(facts)
        folder = found.folder / "trials" / trial.name
        kept = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert kept["seed"] == trial.seed
        assert kept["adapter"]["rank"] == trial.setting.rank
        assert kept["adapter"]["alpha"] == trial.setting.alpha
        assert kept["optimizer"]["learning_rate"] == trial.setting.learning_rate
        if trial.stop_reason == "max_steps":
            result = json.loads((folder / "result.json").read_text())
            assert trial.values[2] == result["validation"]["loss"]
            assert trial.trainable_params == result["trainable_params"]
    # One of two settings continued after the first rung.
    values = [list(one["values"]) for one in held["trials"] if one["stage"] == "rates"]
    assert sorted(values) == [["1"], ["1", "2"]]


def test_study_save_is_atomic(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"recipe": {"seed": 1}, "options": {"num_rungs": 3}}
    study = Study.create(tmp_path, facts)
    trial = study.get_or_add_trial("rank", TrialSetting(2, "all", 0.1, 4.0), 3, 8)
    trial.values[4] = 0.25
    trial.stop_reason = "paused"
    study.save()
    assert [path.name for path in tmp_path.iterdir()] == [STUDY_FILE]
    again = Study.resume(tmp_path, facts)
    assert again.trials == study.trials
    assert trial.score(4, "accuracy") == 0.25
    assert trial.score(4, "loss") == -0.25
    assert trial.score(2, "loss") == -0.25  # Not measured there: the next measurement counts.
    assert trial.score(8, "loss") is None
    trial.stop_reason = "diverged"
    assert trial.score(8, "loss") == DIVERGED

    def killed(_: int) -> None:
        raise Killed

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        study.save()
    again = Study.resume(tmp_path, facts)
    assert next(iter(again.trials.values())).stop_reason == "paused"
