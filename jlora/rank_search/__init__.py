"""Search for rank, target modules, learning rate and alpha by trials of a recipe."""

from __future__ import annotations

from jlora.rank_search.search import SearchResult, search
from jlora.rank_search.study import SearchOptions, Study, Trial, TrialSetting

__all__ = [
    "SearchOptions",
    "SearchResult",
    "Study",
    "Trial",
    "TrialSetting",
    "search",
]
