"""The built-in model: lifelike counts, exact round trips, and what other folders may contain."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kvindex.errors import ConfigError, TokenizerError
from kvindex.simulator.tokenizer import ChatModel, export


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    return ChatModel.builtin()


@pytest.mark.parametrize("text", ["", "hello", " two  spaces\n\n\ttabs", "naïve 漢字 🦊", "a\x00b", "x" * 500])
def test_any_text_comes_back(chat: ChatModel, text: str) -> None:
    assert chat.decode(chat.encode(text, add_special_tokens=False)) == text


def test_common_words_are_one_token_each(chat: ChatModel) -> None:
    text = " the people would like to know what the government should do about the problem"
    assert len(chat.encode(text, add_special_tokens=False)) == len(text.split())


def test_an_answer_sent_back_is_tokenised_as_it_was_generated(chat: ChatModel) -> None:
    random_ = random.Random(1)
    for _ in range(100):
        messages = [{"role": "user", "content": "hello"}]
        prompt = chat.encode(chat.render(messages), add_special_tokens=False)
        answer = random_.choices(chat.vocabulary, k=30)
        messages += [{"role": "assistant", "content": chat.decode(answer)}, {"role": "user", "content": "more"}]
        following = chat.encode(chat.render(messages), add_special_tokens=False)
        assert following[: len(prompt) + 30] == prompt + answer


def test_special_tokens_come_from_the_post_processor_or_the_template_not_both(chat: ChatModel) -> None:
    begin = chat.tokenizer.token_to_id("<s>")
    assert chat.encode("hello")[0] == begin
    assert chat.encode(chat.render([{"role": "user", "content": "x"}]), add_special_tokens=False).count(begin) == 1


def test_an_exported_folder_loads_as_the_same_model(chat: ChatModel, tmp_path: Path) -> None:
    export(tmp_path / "deep" / "model", context_tokens=512)
    loaded = ChatModel.load(tmp_path / "deep" / "model")
    text = "the same tokens, every time: 123"
    assert loaded.encode(text) == chat.encode(text)
    assert loaded.vocabulary == chat.vocabulary
    messages = [{"role": "user", "content": text}]
    assert loaded.render(messages) == chat.render(messages)
    settings = json.loads((tmp_path / "deep" / "model" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 512
    assert settings["vocab_size"] == chat.tokenizer.get_vocab_size()


def test_a_folder_without_a_template_completes_but_does_not_chat(tmp_path: Path) -> None:
    export(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    plain = ChatModel.load(tmp_path)
    assert plain.encode("hello")
    with pytest.raises(TokenizerError, match="no chat template"):
        plain.render([])


def test_a_template_file_wins_and_its_errors_are_ours(tmp_path: Path) -> None:
    export(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if not messages %}{{ raise_exception('nobody spoke') }}{% endif %}{{ messages | tojson }}"
    )
    chat = ChatModel.load(tmp_path)
    assert chat.render([{"role": "user", "content": "é"}]) == '[{"role": "user", "content": "é"}]'
    with pytest.raises(TokenizerError, match="nobody spoke"):
        chat.render([])


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        ChatModel.load(tmp_path)
