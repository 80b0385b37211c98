"""Fine-tuning data on the host: reading, tokenization, packing and batches.

`load_rows` reads a table, a function of `FORMATS` tokenizes it with a `Tokenizer` into a
`TokenizedDataset`, a `BatchStream` builds batches of datasets, and `prefetch` builds them ahead in
a thread.
"""

from __future__ import annotations

from jlora.training.data.batch_stream import (
    BatchStream,
    ClassificationBatch,
    DatasetKind,
    LMBatch,
    StreamBatch,
    StreamPosition,
)
from jlora.training.data.chat_template import ChatTemplate
from jlora.training.data.formats import (
    FORMATS,
    tokenize_chats,
    tokenize_classification,
    tokenize_completions,
    tokenize_preferences,
    tokenize_texts,
)
from jlora.training.data.packing import BatchConfig, EpochPlan, PlannedBatch, plan_epoch
from jlora.training.data.prefetch import PrefetchIterator, prefetch
from jlora.training.data.sources import load_rows
from jlora.training.data.tokenized_dataset import (
    TokenizeConfig,
    TokenizedDataset,
    TokenizedDatasetBuilder,
    TokenizeStats,
    TokenSequence,
)
from jlora.training.data.tokenizer import Tokenizer

__all__ = [
    "FORMATS",
    "BatchConfig",
    "BatchStream",
    "ChatTemplate",
    "ClassificationBatch",
    "DatasetKind",
    "EpochPlan",
    "LMBatch",
    "PlannedBatch",
    "PrefetchIterator",
    "StreamBatch",
    "StreamPosition",
    "TokenSequence",
    "TokenizeConfig",
    "TokenizeStats",
    "TokenizedDataset",
    "TokenizedDatasetBuilder",
    "Tokenizer",
    "load_rows",
    "plan_epoch",
    "prefetch",
    "tokenize_chats",
    "tokenize_classification",
    "tokenize_completions",
    "tokenize_preferences",
    "tokenize_texts",
]
