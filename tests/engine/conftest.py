"""What the tests of the engine share: a small tokenizer, and models, folders and batches on it.

The models' weights are large, so that outputs vary from token to token and from row to row.
Tests import tiny_models.py beside this file, whatever pytest's import mode.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl.batch import RolloutBatch
from fuserl.data.batching import pad_rows
from fuserl.data.examples import Prompt
from fuserl.model.config import DecoderConfig
from fuserl.model.folder import save_model
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.notes import FolderNotes, write_notes
from fuserl.policy import Policy
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.sequences import mask_of_lengths
from fuserl.tokenizer import Tokenizer, train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))

SIZES = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=96,
    init_std=0.35,
    eos_token_id=2,
)
WORDS = "red blue green dog cat runs sleeps house tree big small old".split()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to share out, and waiting threads slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sizes() -> DecoderConfig:
    """Of a model without a tokenizer."""
    return SIZES


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 5, 300)


@pytest.fixture(scope="session")
def make_policy(tokenizer: Tokenizer) -> Callable[..., Policy]:
    """A policy with the tokenizer, its weights from a seed; changes are of its sizes."""

    def make(seed: int = 0, template: str = "{prompt}", **changes: Any) -> Policy:
        config = dataclasses.replace(
            SIZES,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LanguageModel(dataclasses.replace(config, **changes))
        model.initialize(seed)
        return Policy(model, tokenizer, FolderNotes(prompt_template=template), "made")

    return make


@pytest.fixture(scope="session")
def policy_folder(
    make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved policy with weights of ordinary size: what SFT would leave. Not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    make_policy(init_std=0.1, template="{prompt} =>").save(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(
    make_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved reward model that reads the policy's ids. Not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    policy = make_policy(init_std=0.1)
    model = ScalarModel(policy.model.config)
    model.initialize(5)
    model.initialize_head(6)
    save_model(model, folder)
    assert policy.tokenizer is not None
    policy.tokenizer.save(folder)
    write_notes(FolderNotes(prompt_template="{prompt} =>"), folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Prompt and completion, chosen and rejected: any stage takes them. "dog" is good."""
    generator = torch.Generator().manual_seed(3)

    def phrase(num_words: int) -> str:
        picks = torch.randint(len(WORDS), (num_words,), generator=generator).tolist()
        return " ".join(WORDS[pick] for pick in picks)

    made = []
    for i in range(24):
        completion = phrase(1 + i % 3)
        made.append(
            {
                "prompt": phrase(2 + i % 4),
                "completion": f" dog {completion}",
                "chosen": f" dog {completion}",
                "rejected": f" cat {completion}",
                "number": i,
            }
        )
    return made


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LanguageModel]:
    """A language model without a tokenizer."""

    def make(seed: int = 0, **changes: Any) -> LanguageModel:
        model = LanguageModel(dataclasses.replace(SIZES, **changes))
        model.initialize(seed)
        return model

    return make


@pytest.fixture(scope="session")
def make_scalar_model() -> Callable[..., ScalarModel]:
    """A reward model or critic without a tokenizer."""

    def make(seed: int = 0, **changes: Any) -> ScalarModel:
        model = ScalarModel(dataclasses.replace(SIZES, **changes))
        model.initialize(seed)
        model.initialize_head(seed)
        return model

    return make


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[Prompt]]:
    """Ragged prompts of random ids above the special ones."""

    def make(num_prompts: int, *, seed: int = 0, longest: int = 7) -> list[Prompt]:
        generator = torch.Generator().manual_seed(seed)
        prompts = []
        for i in range(num_prompts):
            length = 1 + (i * 5) % longest
            ids = torch.randint(3, SIZES.vocab_size, (length,), generator=generator).tolist()
            prompts.append(Prompt(tuple(ids), f"prompt {i}", {"number": i}, f"data[{i}]"))
        return prompts

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., RolloutBatch]:
    """What the rollout phase hands on: sampled by `model` with one slot after the longest row,
    where the limit leaves room. The EOS is an id that ends some of the rows early."""

    def make(
        model: LanguageModel,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 8,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> RolloutBatch:
        def sample(eos: int | None) -> Completions:
            return decode(
                model,
                [prompt.ids for prompt in prompts],
                max_new_tokens=max_new_tokens,
                sampling=SamplingParams(temperature=temperature, seed=seed),
                eos_token_id=eos,
            )

        early = sample(None).token_ids[:, 1 : max_new_tokens - 2]
        in_how_many_rows = {
            token: int((early == token).any(1).sum()) for token in early.flatten().tolist()
        }
        half = len(prompts) / 2
        out = sample(min(in_how_many_rows, key=lambda token: abs(in_how_many_rows[token] - half)))
        assert 0 < int(out.has_eos.sum()) < len(prompts)
        width = min(max_new_tokens, out.token_ids.shape[1] + 1)
        padding = (0, width - out.token_ids.shape[1])
        mask = mask_of_lengths(out.lengths, width)
        return RolloutBatch(
            prompts=out.prompts,
            prompt_lengths=out.prompt_lengths,
            completions=torch.nn.functional.pad(out.token_ids, padding),
            completion_lengths=out.lengths,
            has_eos=out.has_eos,
            loss_mask=mask,
            logprobs=torch.nn.functional.pad(out.logprobs, padding),
            truncated_logprobs=torch.nn.functional.pad(out.truncated_logprobs, padding),
        )

    return make


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., RolloutBatch]:
    """A batch of given prompt and completion ids, with made-up log-probabilities."""

    def make(
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        width: int | None = None,
        eos: int = 2,
    ) -> RolloutBatch:
        prompt_ids, prompt_lengths = pad_rows(prompts)
        ids, lengths = pad_rows(completions)
        width = ids.shape[1] if width is None else width
        mask = mask_of_lengths(lengths, width)
        generator = torch.Generator().manual_seed(1)
        logprobs = -torch.rand(len(ids), width, generator=generator) - 0.1
        return RolloutBatch(
            prompts=prompt_ids,
            prompt_lengths=prompt_lengths,
            completions=torch.nn.functional.pad(ids, (0, width - ids.shape[1])),
            completion_lengths=lengths,
            has_eos=torch.tensor([row[-1] == eos for row in completions]),
            loss_mask=mask,
            logprobs=torch.where(mask, logprobs, 0.0),
            truncated_logprobs=torch.where(mask, logprobs, 0.0),
        )

    return make
