"""A different adapter for each example of a batch, and training of several adapters at once."""

from __future__ import annotations

from jlora.multi_lora.adapter_bank import AdapterBank, BankFullError, BankStats, UnknownAdapterError
from jlora.multi_lora.batched_apply import apply_per_example, check_slot_index, infer_batch_axes
from jlora.multi_lora.parallel_training import (
    ParallelTrainer,
    stack_adapters,
    train_in_parallel,
    unstack_adapters,
)
from jlora.multi_lora.slots import Slots, empty_slots, pad_to_slot, select_slot, set_slot

__all__ = [
    "AdapterBank",
    "BankFullError",
    "BankStats",
    "ParallelTrainer",
    "Slots",
    "UnknownAdapterError",
    "apply_per_example",
    "check_slot_index",
    "empty_slots",
    "infer_batch_axes",
    "pad_to_slot",
    "select_slot",
    "set_slot",
    "stack_adapters",
    "train_in_parallel",
    "unstack_adapters",
]
