"""The committed test data equals the output of the scripts beside it, and of transformers."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest

for package, version in (("torch", None), ("transformers", "5.0"), ("peft", None)):
    pytest.importorskip(package, minversion=version)
chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

from safetensors.torch import load_file  # noqa: E402

from jlora.training.data import ChatTemplate  # noqa: E402

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("default")]

TESTS = pathlib.Path(__file__).parent.parent
SCRIPTS = {
    "models/make_decoder_data.py": ("models/data/decoders", ["llama3", "gemma3", "qwen3_moe"]),
    "models/make_encoder_data.py": ("models/data/encoders", ["bert_sequence", "vit", "vit_image"]),
    "peft/make_folders.py": (
        "peft/data",
        ["lora", "dora", "lokr", "vblora", "roberta_tokens", "vit_loha"],
    ),
}


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, TESTS / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", SCRIPTS)
def test_script_reproduces_committed_data(path: str, tmp_path: pathlib.Path) -> None:
    data, names = SCRIPTS[path]
    # In reverse order: no case depends on the cases before it.
    script(path).main(tmp_path, names[::-1])
    committed = TESTS / data
    for name in names:
        written = sorted(file.name for file in (tmp_path / name).iterdir())
        assert written == sorted(file.name for file in (committed / name).iterdir())
        for file in written:
            new, old = tmp_path / name / file, committed / name / file
            if new.suffix == ".json":
                assert json.loads(new.read_text()) == json.loads(old.read_text()), file
                continue
            again, known = load_file(new), load_file(old)
            assert again.keys() == known.keys()
            for key, value in known.items():
                assert again[key].dtype == value.dtype
                # Draws are the same bits; another processor sums in another order. Outputs in
                # bfloat16 may then round to the other neighbour, 2 ** -8 away.
                loose = 2**-7 if key.endswith("bfloat16") else 1e-6
                np.testing.assert_allclose(
                    again[key].float(), value.float(), atol=1e-5, rtol=loose, err_msg=key
                )


def rendered(text: str, chat: list[dict[str, Any]], **variables: str) -> str:
    """A chat as transformers renders it."""
    texts, _ = chat_template_utils.render_jinja_template(
        [chat], tools=None, documents=None, chat_template=text, **variables
    )
    return texts[0]


def test_chat_templates_match_transformers() -> None:
    published = script("training/data/test_published_templates.py")
    for name, one in published.TABLE.items():
        for kind, chat in published.CHATS.items():
            if kind == "system" and not one.system:
                continue
            want = rendered(one.text, chat, **published.VARIABLES)
            assert ChatTemplate(one.text, published.VARIABLES).render(chat) == want, name


def test_content_forms_match_transformers() -> None:
    """Of the forms of content that a template reads; transformers loses the others."""
    chats = script("training/data/test_chat_template.py")
    for name, (text, _, _) in chats.CONTENT_TEMPLATES.items():
        for role in ("user", "assistant", "system", "tool"):
            texts = [{"role": role, "content": content} for content in ("b", " c\n")]
            parts = [chats.in_parts(role, "one ", " two"), chats.in_parts(role, "b")]
            for chat, others in ((texts, ("parts", "first")), (parts, ("text", "written"))):
                if name not in others and not (chat is parts and name == "first"):
                    assert ChatTemplate(text).render(chat) == rendered(text, chat), name
