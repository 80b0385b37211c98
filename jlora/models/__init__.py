"""Flax models that read and write Hugging Face checkpoints."""

from jlora.models import bert as bert
from jlora.models.decoder import Cache as Cache
from jlora.models.decoder import Decoder as Decoder
from jlora.models.decoder import DecoderConfig as DecoderConfig
from jlora.models.decoder import empty_cache as empty_cache
from jlora.models.folders import Loaded as Loaded
from jlora.models.folders import load as load
from jlora.models.folders import save as save
from jlora.models.folders import stop_tokens as stop_tokens
from jlora.models.folders import stored_weights as stored_weights
from jlora.models.generate import Generated as Generated
from jlora.models.generate import Sampling as Sampling
from jlora.models.generate import generate as generate
