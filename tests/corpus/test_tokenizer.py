"""Encoding and decoding, saving and loading, and finding the end-of-text token."""

import json
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from fiveply.corpus.tokenizer import Tokenizer
from fiveply.spec.errors import InputError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 20
TRAINED = Tokenizer.train([TEXT], 300)


def word_level(words, special=()):
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    return inner


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_comes_back(text):
    ids = TRAINED.encode(text)
    assert ids.dtype == np.int64
    assert TRAINED.decode(ids, keep_special=True) == text
    np.testing.assert_array_equal(TRAINED.encode_batch([text])[0], ids)


def test_trained_has_end_zero_and_the_size_asked_for():
    assert (TRAINED.end, TRAINED.vocabulary) == (0, 300)
    assert len(TRAINED.encode("question")) < len("question")
    assert TRAINED.decode([0, *TRAINED.encode("be"), 0]) == "be"
    assert TRAINED.decode([0], keep_special=True) == "<|endoftext|>"


def test_other_threads_go_on_beside_a_long_text():
    begun, ended, found = threading.Event(), threading.Event(), []

    def encode():
        begun.set()
        found.append(TRAINED.encode_aside(TEXT * 500))
        ended.set()

    thread, turns = threading.Thread(target=encode), 0
    thread.start()
    begun.wait()
    while not ended.is_set():
        time.sleep(0)  # lets the other one have the interpreter
        turns += 1
    thread.join()
    assert turns > 50
    np.testing.assert_array_equal(found[0], TRAINED.encode(TEXT * 500))


@pytest.mark.parametrize("name", ["", "tokenizer.json", "other.json"])
def test_save_and_load(tmp_path, name):
    TRAINED.save(tmp_path / name)
    loaded = Tokenizer.load(tmp_path / name)
    assert (loaded.end, loaded.vocabulary, loaded.fingerprint) == (0, 300, TRAINED.fingerprint)
    np.testing.assert_array_equal(loaded.encode(TEXT), TRAINED.encode(TEXT))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "stop"}),
        ("tokenizer_config.json", {"eos_token": {"content": "stop", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "stop"}),
        ("generation_config.json", {"eos_token_id": [2, 3]}),
        ("config.json", {"eos_token_id": 2}),
    ],
)
def test_end_is_what_the_directory_says(tmp_path, file, content):
    word_level(["?", "a", "stop", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).end == 3, "by its common name"
    (tmp_path / file).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).end == 2
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").end == 2


def test_ids_may_have_gaps(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"?": 0, "</s>": 9}, unk_token="?"))
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).vocabulary == 10


def test_saved_truncation_and_padding_are_dropped(tmp_path):
    inner = word_level(["?", "a", "</s>"])
    inner.enable_truncation(4)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("a " * 6).tolist() == [1] * 6


def test_errors_name_the_file_and_the_fix(tmp_path):
    with pytest.raises(InputError, match=r"no such tokenizer file; give a tokenizer\.json or train:4096"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    word_level(["?", "a"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"no end-of-text token known.*name it as \"eos_token\""):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not a JSON object"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="a vocabulary of 256 is too small"):
        Tokenizer.train([TEXT], 256)
