"""config.json of models that our decoder lacks, as transformers reads it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl.model.config import DecoderConfig
from fuserl.model.config_json import CONFIG_FILE, GENERATION_FILE
from fuserl.model.fallback import FAMILY
from fuserl.model.files import read_json

logger = logging.getLogger(__name__)

_UNBOUNDED = 1 << 20  # positions of an architecture that names no limit (ALiBi, state spaces)
_SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNSOUND = {"rwkv": "its module divides its own weights when it leaves training"}
_told: set[str] = set()


def read_config(folder: Path, reason: ValueError) -> DecoderConfig:
    """The sizes of a model that our decoder lacks, for the reason given, which is said once a
    process and architecture. Its switches are transformers' business: the config's are not set.

    Raises ValueError where transformers has no such decoder either.
    """
    source = _source_config(folder, reason)
    text = source.get_text_config()
    architecture = _language_model_class(source, reason).__name__
    if architecture not in _told:
        _told.add(architecture)
        logger.warning(
            "%s runs through transformers' own module, slower than fuserl's decoder: %s",
            architecture,
            reason,
        )
    num_heads = _size(text, "num_attention_heads", 1)
    bos, eos, pad = (getattr(text, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad"))
    generation = folder / GENERATION_FILE
    return DecoderConfig(
        family=FAMILY,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=_size(text, "intermediate_size", 4 * text.hidden_size),
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_size(text, "head_dim", max(1, text.hidden_size // num_heads)),
        max_positions=_first(text, _POSITION_KEYS) or _UNBOUNDED,
        rope=None,
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        final_softcap=_first(text, _SOFTCAP_KEYS),
        bos_token_id=bos,
        eos_token_id=next(iter(eos), None) if isinstance(eos, list | tuple) else eos,
        pad_token_id=pad,
        source=read_json(folder / CONFIG_FILE),
        generation=read_json(generation) if generation.exists() else {},
    )


def _source_config(folder: Path, reason: ValueError) -> Any:
    import transformers

    try:
        source = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # strict dataclasses raise a kind of their own
        raise ValueError(
            f"{reason}; transformers {transformers.__version__} cannot read it either: {error}"
        ) from error
    if getattr(source, "is_encoder_decoder", False):
        raise ValueError(f"{reason}; and is_encoder_decoder is true: this engine runs decoders")
    if source.model_type in _UNSOUND:
        raise ValueError(f"{reason}; and {_UNSOUND[source.model_type]}")
    if source.get_text_config() is not source:
        raise ValueError(f"{reason}; and it reads more than text, which this engine does not")
    return source


def _language_model_class(source: Any, reason: ValueError) -> Any:
    import transformers

    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(source)]
    except KeyError:
        raise ValueError(
            f"{reason}; and transformers {transformers.__version__} has no causal language model "
            f"of model_type {source.model_type!r}"
        ) from None


def _first(text: Any, keys: Sequence[str]) -> Any:
    """What the first of these keys that is set says; None where none is."""
    return next((value for key in keys if (value := getattr(text, key, None))), None)


def _size(text: Any, key: str, default: int) -> int:
    """One number; the default where the key is unset, or says one for each layer."""
    value = getattr(text, key, None)
    return value if isinstance(value, int) and value > 0 else default


def switch_length(text: Any) -> int | None:
    """Tokens past which longrope gives a sequence other frequencies."""
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope":
            trained = rope.get("original_max_position_embeddings")
            return int(trained or text.original_max_position_embeddings)
    return None


def logit_scale(text: Any) -> float:
    """Cohere multiplies its logits, Granite divides them."""
    scale = getattr(text, "logit_scale", None) or 1.0
    return float(scale / (getattr(text, "logits_scaling", None) or 1.0))
