"""Batches: their arrays, and streams that resume at any position."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from corpora import made

from jlora.training.data import batch_stream
from jlora.training.data.batch_stream import BatchStream, StreamBatch, StreamPosition
from jlora.training.data.packing import BatchConfig
from jlora.training.data.tokenized_dataset import TokenizedDataset

SIZES = [7, 3, 9, 2, 12, 5, 5, 11, 4, 6, 8, 2, 3]
MORE = [4, 9, 6, 2, 10]
PACKED = BatchConfig(batch_size=4, seq_length=14, gradient_accumulation_steps=2)
ALONE = BatchConfig(batch_size=2, seq_length=13, packing=False, buckets=(5, 13))


def corpora(kind: str = "language") -> list[TokenizedDataset]:
    options: dict[str, Any] = {"sequences": 2 if kind == "preference" else 1}
    options["labelled"] = kind == "classification"
    return [made(SIZES, **options), made(MORE, first=5000, **options)]


def stream(kind: Any = "language", batching: BatchConfig = PACKED, **options: Any) -> BatchStream:
    return BatchStream(corpora(kind), batching, kind=kind, **{"seed": 3, **options})


def epoch(of: BatchStream, number: int = 0) -> list[StreamBatch]:
    return [b for _, b in of.batches(StreamPosition(number, 0), epochs=number + 1)]


def digest(batch: StreamBatch) -> str:
    parts = [repr(batch.example_ids).encode(), *(array.tobytes() for array in batch.arrays)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("batching", [PACKED, ALONE], ids=["packed", "alone"])
def test_batches_rows_equal_their_examples(batching: BatchConfig) -> None:
    """Compares every row with its examples, token by token."""
    sources = corpora()
    found = []
    for batch in epoch(stream(batching=batching, pad_token_id=9)):
        got = batch.arrays
        assert isinstance(got, batch_stream.LMBatch)
        assert got.tokens.shape[:2] == (batching.gradient_accumulation_steps, batching.batch_size)
        flat = [array.reshape(-1, array.shape[-1]) for array in got]
        for row, examples in enumerate(batch.example_ids):
            want = []
            for segment, (source, example) in enumerate(examples, start=1):
                tokens, learn = sources[source].get_sequence(example)
                for place in range(len(tokens)):
                    last = place + 1 == len(tokens)
                    target = (0, 0.0) if last else (tokens[place + 1], float(learn[place + 1]))
                    want.append((tokens[place], *target, segment, place))
            want += [(9, 0, 0.0, 0, 0)] * (len(flat[0][row]) - len(want))
            assert list(zip(*(array[row] for array in flat), strict=True)) == want
        found += [pair for row in batch.example_ids for pair in row]
    assert sorted(found) == [(0, i) for i in range(13)] + [(1, i) for i in range(5)]
    assert [array.dtype for array in got] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_batches_targets_stay_in_segments() -> None:
    for batch in epoch(stream()):
        got = batch.arrays
        assert isinstance(got, batch_stream.LMBatch)
        ends = np.concatenate(
            [np.diff(got.segment_ids) != 0, np.ones((*got.tokens.shape[:2], 1))], -1
        )
        assert not got.targets[ends > 0].any()
        assert not got.loss_mask[ends > 0].any()
        assert not got.loss_mask[got.segment_ids == 0].any()
        inside = ends[..., :-1] == 0
        kept = got.segment_ids[..., :-1] > 0
        assert (got.targets[..., :-1] == got.tokens[..., 1:])[inside & kept].all()


def test_batches_loss_tokens_count_once_per_epoch() -> None:
    for kind in ("language", "preference"):
        batching = PACKED if kind == "language" else ALONE
        total = sum(batch.arrays.loss_mask.sum() for batch in epoch(stream(kind, batching)))
        assert total == sum(corpus.stats.loss_tokens for corpus in corpora(kind))


def test_batches_preferences_are_pairs() -> None:
    sources = corpora("preference")
    found = []
    for batch in epoch(
        stream(
            "preference", BatchConfig(batch_size=2, seq_length=14, gradient_accumulation_steps=2)
        )
    ):
        got = batch.arrays
        assert isinstance(got, batch_stream.LMBatch)
        assert got.tokens.shape == (2, 2, 2, 14)
        pairs = got.tokens.reshape(4, 2, 14), got.segment_ids.reshape(4, 2, 14)
        for row, examples in enumerate(batch.example_ids):
            assert len(examples) <= 1
            for source, example in examples:
                for half in range(2):
                    tokens, _ = sources[source].get_sequence(2 * example + half)
                    size = len(tokens)
                    assert pairs[0][row, half, :size].tolist() == tokens.tolist()
                    assert pairs[1][row, half].tolist() == [1] * size + [0] * (14 - size)
            if not examples:
                assert not pairs[1][row].any()
        found += [pair for row in batch.example_ids for pair in row]
    assert sorted(found) == [(0, i) for i in range(13)] + [(1, i) for i in range(5)]


def test_batches_classification_have_labels() -> None:
    sources = corpora("classification")
    real = 0
    for batch in epoch(stream("classification", ALONE)):
        got = batch.arrays
        assert isinstance(got, batch_stream.ClassificationBatch)
        assert got.labels.shape == got.example_mask.shape == (1, 2)
        for row, examples in enumerate(batch.example_ids):
            assert got.example_mask[0, row] == len(examples)
            size = 0
            for source, example in examples:
                corpus = sources[source]
                tokens, _ = corpus.get_sequence(example)
                size = len(tokens)
                assert got.tokens[0, row, :size].tolist() == tokens.tolist()
                halves = [0] * (size // 2) + [1] * (size - size // 2)
                assert got.token_type_ids[0, row, :size].tolist() == halves
                assert got.labels[0, row] == example % 3
            rest = got.tokens.shape[-1] - size
            assert got.attention_mask[0, row].tolist() == [1] * size + [0] * rest
            assert not got.token_type_ids[0, row, size:].any()
        real += int(got.example_mask.sum())
    assert real == 18


@pytest.mark.parametrize(
    ("kind", "batching", "weights"),
    [
        ("language", PACKED, [1.0, 0.3]),
        ("language", ALONE, None),
        ("preference", BatchConfig(batch_size=2, seq_length=14), [0.5, 2.0]),
        ("classification", ALONE, None),
    ],
)
def test_batches_resumed_equal_uninterrupted(
    kind: Any, batching: BatchConfig, weights: Any
) -> None:
    whole = list(stream(kind, batching, weights=weights).batches(epochs=3))
    digests = [digest(batch) for _, batch in whole]
    assert len(set(digests)) > 1
    for done, (position, _) in enumerate(whole, start=1):
        rest = stream(kind, batching, weights=weights).batches(position, epochs=3)
        assert [digest(batch) for _, batch in rest] == digests[done:]


def test_positions_count_batches_and_epochs() -> None:
    of = stream()
    sizes = [len(of.epoch_plan(number)) for number in range(3)]
    assert of.num_batches(3) == sum(sizes)
    positions = [position for position, _ in of.batches(epochs=3)]
    want = [
        *[StreamPosition(e, b) for e in range(3) for b in range(sizes[e])][1:],
        StreamPosition(3, 0),
    ]
    assert positions == want
    at_end = of.batches(StreamPosition(0, sizes[0]))
    assert digest(next(at_end)[1]) == digest(next(of.batches(StreamPosition(1, 0)))[1])


def share_of(rows: int, process: int, processes: int) -> slice:
    share = rows // processes
    return slice(process * share, (process + 1) * share)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("kind", ["language", "preference", "classification"])
def test_local_slices_concatenate_to_full_batch(kind: Any, processes: int) -> None:
    batching = BatchConfig(batch_size=4, seq_length=14, gradient_accumulation_steps=2)
    whole = epoch(stream(kind, batching))
    parts = [
        epoch(stream(kind, batching, local_slice=share_of(4, process, processes)))
        for process in range(processes)
    ]
    for number, batch in enumerate(whole):
        for name in batch.arrays._fields:
            joined = [getattr(part[number].arrays, name) for part in parts]
            want = getattr(batch.arrays, name)
            np.testing.assert_array_equal(np.concatenate(joined, axis=1), want)
        share = 4 // processes
        ids = [
            part[number].example_ids[first : first + share]
            for first in (0, share)
            for part in parts
        ]
        assert sum(ids, ()) == batch.example_ids
    prints = {
        stream(kind, local_slice=share_of(4, p, processes)).fingerprint for p in range(processes)
    }
    assert prints == {stream(kind).fingerprint}


def test_batches_unshuffled_keep_order() -> None:
    of = stream(batching=BatchConfig(batch_size=2, seq_length=13, packing=False), shuffle=False)
    found = [pair for batch in epoch(of) for row in batch.example_ids for pair in row]
    assert found == [(0, i) for i in range(13)] + [(1, i) for i in range(5)]
    assert [digest(batch) for batch in epoch(of, 1)] == [digest(batch) for batch in epoch(of)]


def test_fingerprint_covers_all_options() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"seed": 4},
        {"weights": [1.0, 2.0]},
        {"shuffle": False},
        {"batching": BatchConfig(batch_size=8, seq_length=14)},
        {"batching": BatchConfig(batch_size=4, seq_length=14)},
    ]
    prints = [stream(**given).fingerprint for given in options]
    prints.append(BatchStream(corpora()[::-1], PACKED, seed=3).fingerprint)
    assert len(set(prints)) == len(prints)
    assert stream().fingerprint == prints[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "preferences"}, "kind='preferences' must be one of language, preference"),
        ({"kind": "preference"}, "kind='preference' must be .* but source 0 is for language"),
        ({"weights": [0.01, 0.01]}, r"weights=\[0.01, 0.01\] take none of the \[13, 5\] exam"),
        ({"weights": [0.07, 0.19]}, "in the first epoch, which would have no batch. Increase one"),
        ({"seed": -3}, "seed=-3 must be an int from 0"),
        (
            {"config": BatchConfig(batch_size=4, seq_length=8)},
            "Example 4 of source 0 has 12 tokens",
        ),
    ],
)
def test_stream_invalid_options_raise(given: dict[str, Any], message: str) -> None:
    options = {"config": PACKED, "kind": "language", **given}
    with pytest.raises(ValueError, match=message):
        BatchStream(corpora(), **options)


def test_epoch_plan_every_epoch_has_a_batch() -> None:
    pair = [made([4]), made([5, 6], first=50)]
    for weights in ([1.0, 0.1], [0.3, 0.5], [0.01, 1.7]):
        of = BatchStream(pair, PACKED, weights=weights)
        assert all(len(of.epoch_plan(number)) for number in range(20))
    # Together they have one example per epoch, but neither completes one in the first epoch.
    with pytest.raises(ValueError, match=r"weights=\[0.5, 0.5\] take none of the \[1, 1\]"):
        BatchStream([made([4]), made([5], first=50)], PACKED, weights=[0.5, 0.5])


def test_stream_label_name_mismatch_raises() -> None:
    first, second = corpora("classification")
    second = second._replace(label_names=("c", "b", "a"))
    with pytest.raises(ValueError, match="have different label names"):
        BatchStream([first, second], ALONE, kind="classification")


@pytest.mark.parametrize(
    "position", [StreamPosition(0, 99), StreamPosition(-1, 0), StreamPosition(0, -1)]
)
def test_batches_invalid_position_raises(position: StreamPosition) -> None:
    with pytest.raises(ValueError, match=r"is outside of this data: its epoch has \d+ batches"):
        stream().batches(position)
