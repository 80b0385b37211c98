"""Data of fine-tuning: rows to batches, on the host alone.

`rows` reads them, a format of `FORMATS` makes a `Corpus` of them with a `Tokenizer`, a `Stream`
makes batches of corpora, and `prefetch` makes them ahead.
"""

from jlora.training.data.arrays import Classes as Classes
from jlora.training.data.arrays import Language as Language
from jlora.training.data.batches import Batch as Batch
from jlora.training.data.batches import Kind as Kind
from jlora.training.data.batches import Position as Position
from jlora.training.data.batches import Stream as Stream
from jlora.training.data.corpus import Corpus as Corpus
from jlora.training.data.corpus import Reading as Reading
from jlora.training.data.corpus import Report as Report
from jlora.training.data.examples import FORMATS as FORMATS
from jlora.training.data.examples import chat as chat
from jlora.training.data.examples import classification as classification
from jlora.training.data.examples import completion as completion
from jlora.training.data.examples import preference as preference
from jlora.training.data.examples import text as text
from jlora.training.data.order import Batching as Batching
from jlora.training.data.order import Plan as Plan
from jlora.training.data.order import Planned as Planned
from jlora.training.data.order import epoch_plan as epoch_plan
from jlora.training.data.prefetching import Prefetch as Prefetch
from jlora.training.data.prefetching import prefetch as prefetch
from jlora.training.data.sources import rows as rows
from jlora.training.data.template import ChatTemplate as ChatTemplate
from jlora.training.data.tokenizer import Tokenizer as Tokenizer
