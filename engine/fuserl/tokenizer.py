"""Text to token ids and back, over a fast tokenizer of transformers.

Ids are plain lists of Python ints. A prompt carries what the tokenizer itself puts in front (a
BOS, usually) and never an EOS; a completion is encoded without special tokens, and the caller
appends the EOS it trains. Special tokens written out in a text are recognised as such, as chat
templates need. transformers is imported by the functions that need it, not by this module.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # ids 0, 1, 2 of a tokenizer trained here
BYTES = 256  # the alphabet of a byte-level tokenizer

# One line a message; the completion of "assistant:" is what the policy writes.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_OTHER_FILES = (
    *("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "additional_chat_templates/*.jinja",
)
# Class names that say "tokenizer.json is the whole tokenizer".
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


class ChatTemplateError(ValueError):
    """The chat template refuses these messages; the template itself is fine."""


class Tokenizer:
    """Encodes prompts, completions and conversations. Immutable: changes return a new one."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, files: Mapping[str, bytes] | None = None
    ) -> None:
        """tokenizer: a fast tokenizer, owned by this object from now on. files: the content of
        those it came from, by their paths in its folder; they are saved unchanged."""
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: "
                "save it with a tokenizer.json (transformers converts most of them)"
            )
        self._files = dict(files or {})
        self._tokenizer: Any = tokenizer  # its methods' types are unions of every call form
        self._backend = tokenizer.backend_tokenizer
        # A tokenizer.json may ask for both; lengths are decided by the data loaders alone.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._prefix = self._added_in_front()

    def _added_in_front(self) -> list[int]:
        """The ids the post-processor puts before a text (those behind it, an EOS, are left out)."""
        probe = self._backend.encode("a")
        added = probe.special_tokens_mask
        length = added.index(0) if 0 in added else len(added)
        prefix: list[int] = probe.ids[:length]
        return prefix

    def encode_text(self, text: str) -> list[int]:
        """The ids of `text`, nothing added: for completions and rendered conversations."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_text` of each, in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt: what the tokenizer adds in front, then `text`, no EOS behind.
        A text that already begins with the written-out prefix gets no second one."""
        return self.encode_prompts([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_prompt` of each, in parallel."""
        prefix, length = self._prefix, len(self._prefix)
        return [ids if ids[:length] == prefix else prefix + ids for ids in self.encode_texts(texts)]

    @functools.cached_property
    def token_texts(self) -> list[str]:
        """The text of each id alone, as `decode` gives it."""
        texts: list[str] = self._tokenizer.batch_decode(
            [[i] for i in range(self.vocab_size)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return texts

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens, spaces as they are."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def special_tokens_in(self, text: str) -> dict[str, int]:
        """The special tokens that `text` spells out, with their ids: `decode` gives none of
        them."""
        added = self._backend.get_added_tokens_decoder()
        return {
            token.content: i
            for i, token in added.items()
            if token.special and token.content in text
        }

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        """The conversation as text, special tokens written out; encode it with `encode_text`.

        ValueError if there is no usable template, ChatTemplateError if it refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template and the data is conversational: "
                "give a chat template file with --chat-template, or use plain-text rows"
            )
        from jinja2 import TemplateSyntaxError

        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template does not parse: line {error.lineno}: {error.message}; "
                "mend the file given with --chat-template"
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            raise ChatTemplateError(
                f"the chat template refuses the messages: {error or type(error).__name__}"
            ) from error
        return text

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with another (Jinja) chat template; saved with it."""
        changed = copy.deepcopy(self._tokenizer)
        changed.chat_template = chat_template
        files = self._files
        if files:  # this one goes before a template in tokenizer_config.json
            files = files | {"chat_template.jinja": chat_template.encode()}
        return Tokenizer(changed, files)

    def save(self, folder: str | Path) -> None:
        """Write the Hugging Face tokenizer files; AutoTokenizer and `load_tokenizer` read them.
        Files it was loaded from are written as they were."""
        folder = Path(folder)
        if "tokenizer.json" not in self._files:
            self._tokenizer.save_pretrained(str(folder))
        for name, content in self._files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both give every token the same id."""
        return bool(self._tokenizer.get_vocab() == other._tokenizer.get_vocab())

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return len(self._tokenizer)

    @property
    def eos_token(self) -> str:
        """The EOS as text; ValueError if the tokenizer has none."""
        token: str | None = self._tokenizer.eos_token
        if token is None:
            raise ValueError(
                "the tokenizer has no EOS token, so a completion cannot end: "
                'set "eos_token" in its tokenizer_config.json'
            )
        return token

    @property
    def eos_token_id(self) -> int:
        """The id that ends a completion; ValueError if the tokenizer has none."""
        token_id: int = self._tokenizer.convert_tokens_to_ids(self.eos_token)
        return token_id

    @property
    def bos_token_id(self) -> int | None:
        token_id: int | None = self._tokenizer.bos_token_id
        return token_id

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's pad id, else its EOS: masks come from lengths, never from this id."""
        token_id: int | None = self._tokenizer.pad_token_id
        return self.eos_token_id if token_id is None else token_id


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None if the folder holds no tokenizer files.

    Local files only, and no code out of the folder. FileNotFoundError without the folder,
    ValueError if its files cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder to load a tokenizer from")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # AutoTokenizer lets config.json's model type overrule a generic class and rebuild the
        # tokenizer by that model's rules (seen with qwen2); the file itself is the truth here.
        loader = PreTrainedTokenizerFast if _is_generic(folder) else AutoTokenizer
        tokenizer: Any = loader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files fail in many ways, one of them a bare Exception
        raise ValueError(f"{folder}: the tokenizer files cannot be loaded: {error}") from error
    paths = files_in(folder)
    return Tokenizer(
        tokenizer, {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    )


def files_in(folder: Path) -> list[Path]:
    """All files of a folder that belong to its tokenizer."""
    patterns = (*TOKENIZER_FILES, *_OTHER_FILES)
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _is_generic(folder: Path) -> bool:
    """Whether the folder's tokenizer.json is declared to be the whole tokenizer."""
    config = folder / "tokenizer_config.json"
    if not (config.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    declared = json.loads(config.read_text(encoding="utf-8"))
    return declared.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in declared


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with at most `vocab_size` ids, the same for the same texts.

    <pad>, <s>, </s> are 0, 1, 2; prompts begin with <s>; every text round-trips.
    """
    smallest = len((PAD, BOS, EOS)) + BYTES
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, not {vocab_size}")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, backend.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        chat_template=PLAIN_CHAT_TEMPLATE,
    )
    return Tokenizer(tokenizer)
