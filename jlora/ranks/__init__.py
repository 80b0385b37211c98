"""How much each weight matters, ranks that follow from it, and ranks that fall in training."""

from jlora.ranks.allocation import allocate as allocate
from jlora.ranks.allocation import cost as cost
from jlora.ranks.gradients import Fisher as Fisher
from jlora.ranks.gradients import GradientNorm as GradientNorm
from jlora.ranks.gradients import Sensitivity as Sensitivity
from jlora.ranks.measuring import Method as Method
from jlora.ranks.measuring import importance as importance
from jlora.ranks.recipes import as_recipe as as_recipe
from jlora.ranks.schedule import shrinking as shrinking
from jlora.ranks.schedule import trimmed as trimmed
from jlora.ranks.scores import Importance as Importance
from jlora.ranks.scores import Scored as Scored
from jlora.ranks.spectra import Activation as Activation
from jlora.ranks.spectra import Condition as Condition
from jlora.ranks.spectra import StableRank as StableRank

DATA_FREE: tuple[type[Method], ...] = (Condition, StableRank)
"""The methods that look at the weights alone."""
METHODS: tuple[type[Method], ...] = (GradientNorm, Fisher, Sensitivity, Activation, *DATA_FREE)
"""All methods."""
