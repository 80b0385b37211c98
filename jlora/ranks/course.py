"""The course of a search: which settings each stage tries, from what the one before it chose."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from jlora.ranks.black_box import imported, tree_of_parzen
from jlora.ranks.judging import rungs
from jlora.ranks.ledger import Setting
from jlora.ranks.options import Options
from jlora.ranks.stages import Played, Stage, compared, halving, ladder, sampled
from jlora.ranks.trials import Runner, patterns, setting_of
from jlora.training.recipe.sections import Recipe


class Course:
    """The stages of a search, each of which begins where the one before it ended.

    Attributes:
        own: The recipe as it is.
        played: The scores of all settings of learning rate and alpha, by rung.
    """

    def __init__(self, recipe: Recipe, options: Options) -> None:
        """Lays them out.

        Raises:
            ValueError: Targets are unknown, or the recipe's family has no rank.
            ModuleNotFoundError: The sampler is Optuna, which is not installed.
        """
        known = patterns(recipe)
        unknown = [name for name in options.targets if name not in known]
        if unknown or not options.targets:
            raise ValueError(
                f"targets={list(options.targets)}: {unknown} are none of {list(known)}. Give one "
                f"or more of those."
            )
        if options.sampler == "optuna":
            imported()
        self.own = setting_of(recipe)
        self.played: Played = {}
        self._options = options
        self._stabilized = bool(recipe.lora.values().get("rank_stabilized"))
        self._seeds = [recipe.seed + number for number in range(options.seeds)]

    def of_rank(self, rank: int) -> Setting:
        """The recipe with another rank."""
        alpha = self.own.alpha
        if self._options.hold == "scale":
            ratio = rank / self.own.rank
            alpha *= math.sqrt(ratio) if self._stabilized else ratio
        return dataclasses.replace(self.own, rank=rank, alpha=alpha)

    def of_ranks(self) -> list[Setting]:
        """The recipe with each of the ranks."""
        return list(map(self.of_rank, self._options.ranks))

    def extremes(self) -> list[Setting]:
        """Settings of which all others are parts: the largest ranks, and every pattern."""
        largest = max(self._options.ranks)
        own = self.of_rank(largest)
        every = [dataclasses.replace(own, targets=name) for name in self._options.targets]
        return list(dict.fromkeys([self.own, own, *every]))

    def grid(self, around: Setting) -> list[Setting]:
        """Learning rates and alphas around a setting, which comes first."""
        alphas = [around.alpha, *(ratio * around.rank for ratio in self._options.alphas)]
        found = [
            dataclasses.replace(
                around, learning_rate=float(f"{factor * around.learning_rate:.6g}"), alpha=alpha
            )
            for alpha in dict.fromkeys(alphas)
            for factor in self._options.rates
        ]
        return list(dict.fromkeys([around, *found]))

    def run(self, runner: Runner) -> Iterator[Stage]:
        """Makes the trials of one stage after the other; gives each stage when it is over."""
        options, seeds = self._options, self._seeds
        ranks = ladder(runner, self.of_ranks(), seeds)
        yield ranks
        named = dict.fromkeys([self.own.targets, *options.targets])
        choices = [dataclasses.replace(ranks.setting, targets=name) for name in named]
        targets = compared(runner, choices, seeds, name="targets")
        yield targets
        rates = self._rates(runner, targets.setting)
        yield rates
        finalists = [rates.setting, targets.setting, self.own]
        yield compared(runner, finalists, seeds, name="confirmation")

    def _rates(self, runner: Runner, around: Setting) -> Stage:
        """The stage of learning rate and alpha.

        It has a seed of its own: the winner was lucky with it, and is confirmed with the others.
        """
        seed, options = self._seeds[-1] + 1, self._options
        if options.sampler == "optuna":
            rates = [factor * around.learning_rate for factor in (1, *options.rates)]
            alphas = [around.alpha, *(ratio * around.rank for ratio in options.alphas)]
            ends = (min(rates), max(rates)), (min(alphas), max(alphas))
            play = tree_of_parzen(around, *ends, options.settings, seed)
            stage, self.played = sampled(runner, play, seed, options.rungs)
        else:
            stage, self.played = halving(runner, self.grid(around), seed, options.rungs)
        return stage

    def estimate(self, steps: int) -> str:
        """What will be run at most, in a sentence."""
        options = self._options
        several = len(options.ranks) * options.seeds
        named = dict.fromkeys([self.own.targets, *options.targets])
        several += (len(named) - 1) * options.seeds
        several += options.seeds  # Of the winner.
        if self.own not in self.of_ranks():
            several += options.seeds
        count = options.settings
        if options.sampler == "grid":
            count = max(len(self.grid(setting)) for setting in self.of_ranks())
        looks, done, left, short = rungs(steps, options.rungs), 0, count, 0
        for look in looks:
            short += left * (look - done)
            # Optuna may let all go on.
            left, done = left if options.sampler == "optuna" else math.ceil(left / 2), look
        return (
            f"At most {several} trials of {steps} steps, and {count} settings of learning rate and "
            f"alpha that are looked at after {', '.join(map(str, looks))} steps: "
            f"{several * steps + short:,} steps in all."
        )
