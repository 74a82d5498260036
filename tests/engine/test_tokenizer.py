"""Tokenizer: ids round-trip through text and through transformers, and what is missing is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from fuserl.tokenizer import ChatTemplateError, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "user: a question\nassistant: an answer"]
HELLO = [{"role": "user", "content": "hello"}]


def byte_tokenizer(
    post_processor: processors.PostProcessor | None = None, **specials: str
) -> PreTrainedTokenizerFast:
    """256 bytes and the given special tokens, nothing learnt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if post_processor is not None:
        backend.add_special_tokens(list(specials.values()))
        backend.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def test_import_is_light() -> None:
    code = (
        "import sys, fuserl.tokenizer, fuserl.data\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == "</s>"
    assert 259 < tokenizer.vocab_size <= 300


def test_special_tokens_spelled_out_are_found(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens_in("a</s>b<s>") == {"<s>": 1, "</s>": 2}
    assert tokenizer.special_tokens_in("</ s>, <S> and the fox") == {}
    for token, i in tokenizer.special_tokens_in("<pad><s></s>").items():
        assert token not in tokenizer.decode([i])


def test_prompt_begins_with_bos_and_has_no_eos(tokenizer: Tokenizer) -> None:
    text = "the lazy dog"
    assert tokenizer.encode_prompt(text) == [1, *tokenizer.encode_text(text)]
    assert tokenizer.encode_prompt("") == [1]
    assert tokenizer.encode_prompt("<s>" + text) == tokenizer.encode_prompt(text)


def test_encoding_many_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "a", "the fox", "é\n\n x"]
    assert tokenizer.encode_texts(texts) == [tokenizer.encode_text(text) for text in texts]
    assert tokenizer.encode_prompts(texts) == [tokenizer.encode_prompt(text) for text in texts]
    assert tokenizer.encode_texts([]) == []


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=40).filter(lambda text: "<" not in text))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode([*tokenizer.encode_prompt(text), tokenizer.eos_token_id]) == text


def test_decode_cleans_nothing_up(tokenizer: Tokenizer) -> None:
    text = "wait , do n't  stop . "
    assert tokenizer.decode(tuple(tokenizer.encode_text(text))) == text


def test_training_is_deterministic_and_bounded(tokenizer: Tokenizer) -> None:
    again = train_tokenizer(iter(TEXTS), 300)
    assert again._backend.to_str() == tokenizer._backend.to_str()
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(TEXTS, 258)


def test_transformers_loads_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert len(theirs) == loaded.vocab_size == tokenizer.vocab_size
    for text in (*TEXTS, "12345 élan\t\n\n  x", ""):
        ids = tokenizer.encode_prompt(text)
        assert loaded.encode_prompt(text) == ids
        assert theirs(text)["input_ids"] == ids
    assert theirs.apply_chat_template(HELLO, tokenize=False) == loaded.render_chat(HELLO, False)


def test_the_model_type_beside_it_does_not_change_the_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded._backend.to_str() == tokenizer._backend.to_str()


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{broken"), ("tokenizer_config.json", "[]"), ("tokenizer.json", "{}")],
)
def test_damaged_files_name_the_folder(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="tokenizer files cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_code_in_the_folder_is_never_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    config["tokenizer_class"] = "EvilTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path)


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Tokenizer(Slow())  # type: ignore[arg-type]


def test_truncation_and_padding_in_the_file_are_ignored(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.encode_texts(["a b c d", "x"]) == tokenizer.encode_texts(["a b c d", "x"])


def test_without_pad_the_eos_stands_in() -> None:
    tokenizer = Tokenizer(byte_tokenizer(eos_token="<end>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    assert tokenizer.bos_token_id is None
    assert tokenizer.vocab_size == 257  # the added token counts
    assert tokenizer.encode_prompt("") == []


def test_without_eos_the_remedy_is_named() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        _ = tokenizer.eos_token_id
    with pytest.raises(ValueError, match="EOS"):
        _ = tokenizer.pad_token_id


def test_a_trailing_eos_of_the_post_processor_is_left_out() -> None:
    both = processors.TemplateProcessing(
        single="<b> $A <e>", special_tokens=[("<b>", 256), ("<e>", 257)]
    )
    hf = byte_tokenizer(both, bos_token="<b>", eos_token="<e>")
    assert hf("a")["input_ids"][-1] == 257
    tokenizer = Tokenizer(hf)
    assert tokenizer.encode_prompt("a") == [256, *tokenizer.encode_text("a")]


def test_plain_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "be brief"}, *HELLO]
    expected = "<s>system: be brief\nuser: hello\n"
    assert tokenizer.render_chat(messages, False) == expected
    rendered = tokenizer.render_chat(messages, True)
    assert rendered == expected + "assistant:"
    assert tokenizer.encode_text(rendered)[:1] == [1]
    assert tokenizer.encode_text(rendered).count(1) == 1


def test_another_chat_template_is_used_and_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    changed = tokenizer.with_chat_template(
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    assert changed.render_chat(HELLO, False) == "[hello]"
    assert tokenizer.render_chat(HELLO, False) == "<s>user: hello\n"
    changed.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.render_chat(HELLO, False) == "[hello]"


def test_chat_template_faults(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--chat-template"):
        Tokenizer(byte_tokenizer(eos_token="<end>")).render_chat(HELLO, False)
    refuses = tokenizer.with_chat_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        refuses.render_chat(HELLO, False)
    with pytest.raises(ValueError, match=r"does not parse: line 1.*--chat-template") as caught:
        tokenizer.with_chat_template("{% for %}").render_chat(HELLO, False)
    assert not isinstance(caught.value, ChatTemplateError)


def test_every_file_of_a_loaded_tokenizer_is_saved_unchanged(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    tokenizer.save(source)
    (source / "additional_chat_templates").mkdir()
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "README.md").write_text("not the tokenizer's")
    loaded = load_tokenizer(source)
    assert loaded is not None
    before = {
        path.relative_to(source): path.read_bytes() for path in source.rglob("*") if path.is_file()
    }
    shutil.rmtree(source)  # what is saved does not depend on the source's folder any more
    loaded.save(tmp_path / "saved")
    after = {
        path.relative_to(tmp_path / "saved"): path.read_bytes()
        for path in (tmp_path / "saved").rglob("*")
        if path.is_file()
    }
    assert after == {name: content for name, content in before.items() if name.name != "README.md"}


@pytest.mark.parametrize("in_config", [False, True])
def test_another_template_over_a_loaded_one_is_saved(
    in_config: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "source")
    if in_config:  # where transformers 4 keeps it
        path = tmp_path / "source" / "tokenizer_config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"chat_template": "{{ 'old' }}"}))
        (tmp_path / "source" / "chat_template.jinja").unlink()
    loaded = load_tokenizer(tmp_path / "source")
    assert loaded is not None
    loaded.with_chat_template("{{ 'new' }}").save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again is not None
    assert again.render_chat(HELLO, False) == "new"
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template(HELLO, tokenize=False) == "new"
