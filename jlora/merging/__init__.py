"""Adapters combined and compared by what they change, and merged into their base."""

from jlora.merging.combining import Combined as Combined
from jlora.merging.combining import analogy as analogy
from jlora.merging.combining import combine as combine
from jlora.merging.interference import Interference as Interference
from jlora.merging.interference import Meeting as Meeting
from jlora.merging.interference import heat_map as heat_map
from jlora.merging.interference import interference as interference
from jlora.merging.methods import DARE as DARE
from jlora.merging.methods import DELLA as DELLA
from jlora.merging.methods import TIES as TIES
from jlora.merging.methods import Linear as Linear
from jlora.merging.methods import Magnitude as Magnitude
from jlora.merging.methods import Method as Method
