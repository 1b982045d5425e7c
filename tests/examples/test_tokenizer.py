"""Tokenizers, chat templates, and which tokens of a chat count."""

import _lm
import _tokenizer
import numpy as np
import pytest
import tiny_lm

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return _tokenizer.load(tiny_lm.write(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def smollm2():
    return _tokenizer.load(_lm.default_base())


def test_the_answers_and_their_ends_count_on_the_real_model(smollm2):
    chat = smollm2.chat(CHAT)
    assert len(chat.ids) == 51
    assert np.flatnonzero(chat.answer).tolist() == [31, 32, 33, 48, 49]
    assert chat.ids[-7:].tolist() == [1, 520, 9531, 198, 36, 2, 198]


def test_template_tokens_are_not_in_the_loss(tokenizer):
    chat = tokenizer.chat(CHAT)
    assert tokenizer.decode(chat.ids[chat.answer], special=True) == (
        "Hello!<|im_end|>4<|im_end|>"
    )


def test_the_last_answer_alone_counts_if_asked(tokenizer):
    chat = tokenizer.chat(CHAT, last_only=True)
    assert tokenizer.decode(chat.ids[chat.answer], special=True) == "4<|im_end|>"


def test_the_end_counts_although_it_is_what_pads(tokenizer):
    assert tokenizer.pad in tokenizer.stop
    chat = tokenizer.chat(CHAT[:2])
    ends = chat.ids == tokenizer.pad
    assert ends.sum() == 2 and (ends & chat.answer).sum() == 1


def test_no_bos_is_doubled(tokenizer, smollm2):
    for t in (tokenizer, smollm2):
        first, second = t.prompt(CHAT[:1])[:2]
        assert t.decode([first], special=True) == "<|im_start|>"
        assert second != first
        assert t.document("a")[0] != first


def test_a_prompt_is_the_beginning_of_the_chat(tokenizer):
    prompt, whole = tokenizer.prompt(CHAT[:3]), tokenizer.chat(CHAT).ids
    assert whole[: len(prompt)].tolist() == prompt


def test_plain_text_ends_with_a_stop_token(tokenizer):
    assert tokenizer.document("ab")[-1] in tokenizer.stop


def refused(tmp_path, template, says):
    t = _tokenizer.load(tiny_lm.write(tmp_path / "x", template=template))
    with pytest.raises(_tokenizer.TemplateError, match=says):
        t.chat(CHAT)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}", "cannot be read, line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "failed on messages by user"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            "none of the stop tokens",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}"
            "<|im_end|>{% endfor %}",
            "other than as the beginning of the whole",
        ),
    ],
)
def test_a_template_that_fails_is_refused(tmp_path, template, says):
    refused(tmp_path, template, says)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = tiny_lm.write(tmp_path / "x", more=-1)
    with pytest.raises(ValueError, match="258 tokens, the embedding 257 rows"):
        _lm.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        _tokenizer.load(tmp_path)


def test_a_sentencepiece_tokenizer_of_gguf_is_refused():
    with pytest.raises(ValueError, match=r"pass the folder of the model's"):
        _tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})
