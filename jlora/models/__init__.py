"""Flax models that read and write Hugging Face checkpoints."""

from jlora.models.decoder import Cache as Cache
from jlora.models.decoder import Decoder as Decoder
from jlora.models.decoder import DecoderConfig as DecoderConfig
from jlora.models.decoder import empty_cache as empty_cache
from jlora.models.encoder import Encoder as Encoder
from jlora.models.encoder import EncoderConfig as EncoderConfig
from jlora.models.encoder import mean_pool as mean_pool
from jlora.models.folders import Loaded as Loaded
from jlora.models.folders import load as load
from jlora.models.folders import model_of as model_of
from jlora.models.folders import save as save
from jlora.models.folders import shapes as shapes
from jlora.models.folders import stop_tokens as stop_tokens
from jlora.models.folders import stored_weights as stored_weights
from jlora.models.generate import Generated as Generated
from jlora.models.generate import Sampling as Sampling
from jlora.models.generate import generate as generate
from jlora.models.vit import ViT as ViT
from jlora.models.vit import ViTConfig as ViTConfig
