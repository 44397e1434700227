"""Prompts to token ids: the same as transformers makes, and what is told of a file that is no tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers_pipelines import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.errors import BundleError
from tc_deploy.manifest import TextRecord, TokenizerRecord
from tc_deploy.tokenization import Tokenizers, clean
from tc_deploy.types import Cleaning

TOKENS = 4


def record(**changes: Any) -> TextRecord:
    item = TokenizerRecord.model_validate(
        {"file": "tokenizers/tokenizer.json", "ids": "input_ids", "mask": "attention_mask", "tokens": TOKENS} | changes
    )
    return TextRecord(cleaning=Cleaning.LOWER, tokenizers=(item,), defaults={}, components=())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=0, pad_token="<pad>")
    (tmp_path / "tokenizers").mkdir()
    tokenizer.save(str(tmp_path / "tokenizers" / "tokenizer.json"))
    return tmp_path


def test_ids_and_masks(bundle: Path) -> None:
    arrays = Tokenizers(bundle, record()).arrays([" A CAT ", ""])
    assert {name: array.dtype for name, array in arrays.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), np.dtype(np.int32)
    )
    assert arrays["input_ids"].tolist() == [[4, 5, 2, 0], [2, 0, 0, 0]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert Tokenizers(bundle, record(mask=None)).arrays([""]).keys() == {"input_ids"}


def test_a_longer_prompt_is_cut_with_a_warning(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizers = Tokenizers(bundle, record())
    assert tokenizers.arrays(["a cat on"])["input_ids"].tolist() == [[4, 5, 6, 2]]
    assert caplog.messages == []
    cut = tokenizers.arrays(["a cat on a mat"])["input_ids"]
    assert cut.tolist() == [[4, 5, 6, 2]]
    (message,) = caplog.messages
    assert "the prompt 'a cat on a mat' is cut after 4 tokens, as many as tokenizer takes" in message
    caplog.clear()
    tokenizers.arrays(["cat " * 500], warn=False)
    assert caplog.messages == []
    tokenizers.arrays(["cat " * 500])
    assert len(caplog.messages[0]) < 200


def test_a_file_that_is_no_tokenizer_is_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"expected to cut and pad prompts to 5 tokens, found 4 and 4; export again"):
        Tokenizers(bundle, record(tokens=5))
    path = bundle / "tokenizers" / "tokenizer.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"padding": None}))
    with pytest.raises(BundleError, match=r"found 4 and None; export again"):
        Tokenizers(bundle, record())
    for text in ("{", "[]", "{}", ""):
        path.write_text(text)
        with pytest.raises(BundleError, match=r"tokenizer.json: not a tokenizer: ") as raised:
            Tokenizers(bundle, record())
        assert "\n" not in str(raised.value)


@given(st.text())
def test_web_text_is_cleaned_as_wan_s_pipeline_does(prompt: str) -> None:
    assert clean(prompt, Cleaning.WEB) == prompt_clean(prompt)


def test_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clean(" A  Cat ", Cleaning.NONE) == " A  Cat "
    assert clean(" A  Cat ", Cleaning.LOWER) == "a  cat"
    assert clean(" a &amp;amp; \n b", Cleaning.WEB) == "a & b"
    mended = cast("ModuleType", SimpleNamespace(fix_text=lambda text: text.replace("â€™", "'")))
    monkeypatch.setitem(sys.modules, "ftfy", mended)
    assert clean("a catâ€™s", Cleaning.WEB) == "a cat's"
