"""Adapters combined and compared by what they change, and merged into their base."""

from jlora.merging.combining import Combined as Combined
from jlora.merging.combining import analogy as analogy
from jlora.merging.combining import combine as combine
from jlora.merging.fusion import Fused as Fused
from jlora.merging.fusion import fuse as fuse
from jlora.merging.fusion import fuse_by_gradient as fuse_by_gradient
from jlora.merging.gates import Gate as Gate
from jlora.merging.gates import apply_per_row as apply_per_row
from jlora.merging.gates import gate_of as gate_of
from jlora.merging.gates import gate_weights as gate_weights
from jlora.merging.hierarchy import stacked as stacked
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
from jlora.merging.mixing import fixed as fixed
from jlora.merging.mixing import mixed as mixed
from jlora.merging.mixing import names_of as names_of
from jlora.merging.mixing import weights_of as weights_of
from jlora.merging.mixing import with_weights as with_weights
