"""From a file of chats to batches."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from jlora.training import data

HERE = pathlib.Path(__file__).parent


def test_pipeline_loss_tokens_are_the_answers(tmp_path: pathlib.Path) -> None:
    answers = [f"Größe {number}, 🙂" * (1 + number % 4) for number in range(23)]
    lines = []
    for number, answer in enumerate(answers):
        messages = [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"chat": messages}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))

    tokenizer = data.Tokenizer.from_folder(HERE / "tiny")
    reading = data.TokenizeConfig(
        max_seq_length=128,
        vocab_size=tokenizer.vocab_size,
        columns={"messages": "chat"},
        data_name="train.jsonl",
    )
    corpus = data.tokenize_chats(data.load_rows(tmp_path / "train.jsonl"), tokenizer, reading)
    batching = data.BatchConfig(batch_size=2, seq_length=128, gradient_accumulation_steps=2)
    stream = data.BatchStream([corpus], batching, seed=0, pad_token_id=tokenizer.pad_token_id)
    found = {}
    with data.prefetch(stream.batches(epochs=1), lambda item: item[1]) as batches:
        for arrays, ids in batches:
            rows = [array.reshape(-1, 128) for array in arrays]
            for row, examples in enumerate(ids):
                _, targets, learn, segments, _ = (array[row] for array in rows)
                for segment, (_, example) in enumerate(examples, start=1):
                    learnt = targets[(segments == segment) & (learn > 0)]
                    found[example] = tokenizer.decode(np.asarray(learnt).tolist())
    assert found == {number: f"{answer}<|im_end|>" for number, answer in enumerate(answers)}
