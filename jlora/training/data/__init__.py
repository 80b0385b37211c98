"""Data of fine-tuning: rows to batches, on the host alone.

`rows` reads them, a format of `FORMATS` makes a `Corpus` of them with a `Tokenizer`, a `Stream`
makes batches of corpora, and `prefetch` makes them ahead.
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
from jlora.training.data.tokenized_dataset import TokenizeConfig, TokenizedDataset, TokenizeStats
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
    "TokenizeConfig",
    "TokenizeStats",
    "TokenizedDataset",
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
