"""Architectures our decoder lacks run through transformers and equal it: logits, gradients,
completions, folders, a step of each stage."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
from other_models import LENGTH, OTHER_NAMES, VOCAB_SIZE
from packed import run
from torch import Tensor

from fuserl.checkpoint import Checkpoint
from fuserl.config import SFTConfig
from fuserl.model import fallback_config, fallback_folder
from fuserl.model.fallback import FAMILY, TransformersTrunk
from fuserl.model.folder import (
    is_reward_model,
    load_language_model,
    load_scalar_model,
    save_model,
)
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.lora import add_lora
from fuserl.model.notes import FolderNotes
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.rollout.decode import decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.stages.reward import RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.sft import SFTTrainer
from fuserl.tokenizer import Tokenizer

Folders = Callable[[str], Path]
ROWS = [
    torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (9, LENGTH, 1, 14, 15)
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder that transformers saves of a tiny model. Not to be written to."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            other_models.build(name).save_pretrained(made[name])
        return made[name]

    return folder


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy with other keys in config.json."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_logits_and_gradients_equal_transformers(name: str, folder_of: Folders) -> None:
    """Each row alone in transformers: neither packing nor the rows beside it change anything."""
    ours, theirs = load_language_model(folder_of(name)), other_models.build(name)
    assert isinstance(ours.trunk, TransformersTrunk)
    assert ours.config.family == FAMILY
    ours.train()
    logits = ours.logits(run(ours, ROWS))
    expected = torch.cat([theirs(torch.tensor([row])).logits[0] for row in ROWS])
    assert expected.std() > 0.1
    assert apart(logits, expected) < 1e-5
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    base = dict(theirs.base_model.named_parameters())
    gradients = {key: p.grad for key, p in ours.trunk.module.named_parameters()}
    assert gradients.keys() == base.keys()
    largest = max(float(p.grad.abs().max()) for p in base.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, base[key].grad, rtol=1e-4, atol=1e-5 * largest)
    assert ours.output_weight.grad is not None


def greedy(
    model: LanguageModel, eos: int | None, num_samples: int = 1, num_slots: int | None = None
) -> list[list[int]]:
    out = decode(
        model,
        ROWS,
        max_new_tokens=16,
        sampling=SamplingParams(temperature=0.0),
        eos_token_id=eos,
        num_samples=num_samples,
        num_slots=num_slots,
    )
    lengths = out.lengths.tolist()
    return [row[:n] for row, n in zip(out.token_ids.tolist(), lengths, strict=True)]


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_greedy_completions_equal_transformers_generate(name: str, folder_of: Folders) -> None:
    """Ragged prompts, rows that end early and are dropped, frequencies that switch on the way."""
    ours, theirs = load_language_model(folder_of(name)), other_models.build(name)
    trunk: Any = ours.trunk
    assert trunk.has_cache == (name != "mamba")
    free = greedy(ours, None)
    ids = [token for row in free for token in row[1:7]]
    eos = max(set(ids), key=ids.count)
    rows = greedy(ours, eos, num_samples=2)
    assert rows[::2] == rows[1::2]
    assert greedy(ours, eos, num_samples=2, num_slots=3) == rows, "in waves"
    for prompt, row in zip(ROWS, rows[::2], strict=True):
        given = torch.tensor([prompt])
        expected = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=eos,
            pad_token_id=0,
            use_cache=name != "phi3-longrope",  # some versions keep keys past the switch
        )
        assert row == expected[0, len(prompt) :].tolist()
    assert len({len(row) for row in rows}) > 1


@pytest.mark.parametrize("name", ["olmo2", "mixtral-window", "opt"])
def test_recomputing_rows_gives_what_the_cache_gives(name: str, folder_of: Folders) -> None:
    model = load_language_model(folder_of(name))
    trunk: Any = model.trunk
    assert trunk.has_cache
    cached = greedy(model, 7)
    trunk.has_cache = False
    assert greedy(model, 7) == cached


def test_rollout_logprobs_are_the_trainers(folder_of: Folders) -> None:
    policy = Policy(load_language_model(folder_of("bloom")), None, FolderNotes(), "made")
    out = policy.generate(ROWS, max_new_tokens=8, n=2, temperature=0.8, ignore_eos=True)
    prompts = [row for row in ROWS for _ in range(2)]
    again = policy.logprobs(prompts, out.token_ids, temperature=0.8)
    for logprobs, expected in zip(out.logprobs, again, strict=True):
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-5)


def test_ended_rows_pass_no_table_of_positions(folder_of: Folders) -> None:
    """They decode on, unread: past the last learned position too."""
    model: Any = load_language_model(folder_of("opt"))
    long = [*ROWS[1], *ROWS[1][:20]]
    assert len(long) + 40 > model.config.max_positions == 48
    for has_cache in (True, False):
        model.trunk.has_cache = has_cache
        out = decode(
            model,
            [long, [5], [6], [7], [8]],
            max_new_tokens=[4, 40, 40, 40, 40],  # four of five rows are no reason to drop one
            sampling=SamplingParams(temperature=0.0),
            eos_token_id=None,
        )
        assert out.lengths.tolist() == [4, 40, 40, 40, 40]


# Folders


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_folders_keep_their_bits(name: str, folder_of: Folders, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_language_model(folder_of(name))
    save_model(model, tmp_path)
    before = other_models.build(name).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = load_language_model(tmp_path)
    assert torch.equal(run(again, ROWS), run(model, ROWS))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    was, now = (
        json.loads((folder / "config.json").read_text()) for folder in (folder_of(name), tmp_path)
    )
    assert was == now


def test_keys_nobody_knows_are_kept(folder_of: Folders, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    changed(folder_of("olmo2"), before, made_by="somebody")
    settings = {"temperature": 0.3, "top_p": 0.5, "eos_token_id": [2, 9]}
    (before / "generation_config.json").write_text(json.dumps(settings))
    model = load_language_model(before)
    save_model(model, after)
    assert json.loads((after / "config.json").read_text())["made_by"] == "somebody"
    kept = json.loads((after / "generation_config.json").read_text())
    assert kept | settings == kept
    assert model.config.eos_token_id == 2


@pytest.mark.parametrize("name", ["olmo2", "bloom", "opt", "cohere-scale", "biogpt"])
def test_a_reward_model_is_one_for_transformers_where_it_has_the_class(
    name: str, folder_of: Folders, tmp_path: Path
) -> None:
    """cohere has none: its head lies in our own file, and the base model in the others."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    start = load_language_model(folder_of(name))
    fresh, is_new = load_scalar_model(folder_of(name), head_seed=4)
    assert is_new
    model = ScalarModel.on_trunk(start, seed=4)
    torch.testing.assert_close(run(fresh, ROWS), run(model, ROWS))
    torch.nn.init.constant_(model.score.bias, 0.5)
    save_model(model, tmp_path)
    assert is_reward_model(tmp_path)
    again, is_new = load_scalar_model(tmp_path)
    assert not is_new
    assert torch.equal(run(again, ROWS), run(model, ROWS))
    row = torch.tensor([ROWS[0]])
    if name == "cohere-scale":
        states = AutoModel.from_pretrained(tmp_path)(row).last_hidden_state[0]
        expected = 0.25 * states @ model.score.weight[0]
    else:
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert theirs.config.num_labels == 1
        expected = theirs(row).logits[0]
    torch.testing.assert_close(run(model, ROWS[:1])[-1] - 0.5, expected[-1].squeeze())
    # A later stage finds the language-model head again.
    back = load_language_model(tmp_path)
    assert torch.equal(back.logits(run(back, ROWS)), start.logits(run(start, ROWS)))


def test_an_mlp_head_is_kept(folder_of: Folders, tmp_path: Path) -> None:
    model, is_new = load_scalar_model(folder_of("bloom"), head="mlp", head_seed=2)
    assert is_new
    save_model(model, tmp_path)
    again, is_new = load_scalar_model(tmp_path)
    assert not is_new
    assert torch.equal(run(again, ROWS), run(model, ROWS))


def test_shards_and_another_dtype(folder_of: Folders, tmp_path: Path) -> None:
    model = load_language_model(folder_of("mixtral-window"))
    save_model(model, tmp_path, dtype=torch.bfloat16, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    stored = load_language_model(tmp_path, dtype=None)
    assert stored.trunk.dtype == torch.bfloat16
    wide = load_language_model(tmp_path)
    for ours, saved in zip(model.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), saved)
    error = (run(stored, ROWS).float() - run(wide, ROWS)).abs().mean()
    assert error < 0.05 * run(wide, ROWS).abs().mean()


@pytest.mark.parametrize("move", ["load", "to", "head"])
def test_bf16_weights_compute_with_fp32_constants(move: str, folder_of: Folders) -> None:
    """Rotary frequencies rounded to bf16 would be other positions."""
    wide = load_language_model(folder_of("olmo2"))
    model: Any = load_language_model(folder_of("olmo2"), dtype=torch.bfloat16)
    if move == "to":
        model = copy.deepcopy(wide).to(torch.bfloat16)
    elif move == "head":
        model = ScalarModel.on_trunk(model, seed=0)
    assert {p.dtype for p in model.trunk.parameters()} == {torch.bfloat16}
    frequencies = dict(wide.trunk.named_buffers())["module.rotary_emb.inv_freq"]
    kept = dict(model.trunk.named_buffers())["module.rotary_emb.inv_freq"]
    assert torch.equal(kept, frequencies)
    assert apart(run(model.trunk, ROWS).float(), run(wide, ROWS)) < 0.1


# Refusals


def test_folders_that_do_not_fit_are_refused_before_weights_are_read(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import PreTrainedModel

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", read)
    other = tmp_path / "vocabulary"
    other.mkdir()
    with pytest.raises(ValueError, match=r"embed_tokens.*\(61, 32\).*config.json makes it \(64,"):
        load_language_model(changed(folder_of("olmo2"), other, vocab_size=64))
    holed = tmp_path / "holed"
    holed.mkdir()
    changed(folder_of("olmo2"), holed)
    tensors = load_file(holed / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is missing"):
        load_language_model(holed)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    changed(folder_of("olmo2"), pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle"):
        load_language_model(pickled)
    with_code = tmp_path / "code"
    with_code.mkdir()
    with pytest.raises(ValueError, match="auto_map is refused"):
        load_language_model(changed(folder_of("olmo2"), with_code, auto_map={"AutoConfig": "x.y"}))


def test_converted_tensors_that_do_not_fit_are_refused(folder_of: Folders, tmp_path: Path) -> None:
    """Experts are stored one by one: only transformers knows what they make."""
    from safetensors.torch import load_file, save_file

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    with pytest.raises(ValueError, match=r"experts.* has shape \(4, .*config.json makes it \(4, "):
        load_language_model(changed(folder_of("mixtral-window"), narrow, intermediate_size=48))
    changed(folder_of("mixtral-window"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.q_proj.weight is missing"):
        load_language_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "never_heard_of"}, r"'never_heard_of'.*transformers .* cannot read it"),
        ({"model_type": "t5", "vocab_size": 40}, "is_encoder_decoder is true"),
        ({"model_type": "rwkv"}, "divides its own weights"),
        ({"model_type": "clip"}, "reads more than text|no causal language model"),
    ],
)
def test_what_transformers_cannot_run_either_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_language_model(tmp_path)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, vocab_size=VOCAB_SIZE)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no causal decoder|neither in its trunk"):
        load_language_model(tmp_path)


def test_logits_that_are_no_product_are_refused(
    folder_of: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback_folder, "logit_scale", lambda text: 1.0)
    with pytest.raises(ValueError, match="logits of CohereForCausalLM are no product"):
        load_language_model(folder_of("cohere-scale"))


def test_what_only_our_decoder_has_is_refused(folder_of: Folders) -> None:
    model = load_language_model(folder_of("olmo2"))
    with pytest.raises(ValueError, match="frozen_layers needs a family of our own decoder"):
        freeze_lowest(model, 1)
    with pytest.raises(ValueError, match="adapters need this engine's own decoder"):
        add_lora(model, rank=2, alpha=4)
    with pytest.raises(ValueError, match="activation_checkpointing needs a family of our own"):
        model.trunk.checkpointing = True
    model.trunk.checkpointing = False
    freeze_lowest(model, 0)


def test_it_is_said_once(
    folder_of: Folders, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback_config, "_told", set())
    with caplog.at_level(logging.WARNING):
        for name in ("olmo2", "olmo2", "mamba"):
            load_language_model(folder_of(name))
    said = [record.message for record in caplog.records if record.name.startswith("fuserl")]
    assert len(said) == 3
    assert said[0].startswith("Olmo2ForCausalLM runs through transformers' own module, slower")
    assert "model_type 'olmo2'" in said[0]
    assert said[1].startswith("MambaForCausalLM")
    assert "decodes without a cache" in said[2]


# Training


def test_a_checkpoint_brings_everything_back(folder_of: Folders, tmp_path: Path) -> None:
    config = SFTConfig(model="m", data="d", out=str(tmp_path))

    def trained(model: LanguageModel, steps: int) -> Optimizer:
        optimizer = Optimizer({"policy": model}, config, total_steps=4)
        for _ in range(steps):
            model.logits(run(model, ROWS)).square().mean().backward()
            optimizer.step()
        return optimizer

    model = load_language_model(folder_of("mixtral-window"))
    optimizer = trained(model, 2)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"policy": model}, optimizer, {"step": 2})
    again = load_language_model(folder_of("mixtral-window"))
    checkpoint.load({"policy": again}, trained(again, 0))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    frozen = copy.deepcopy(model).requires_grad_(False)
    before = run(frozen, ROWS)
    model.logits(run(model, ROWS)).square().mean().backward()
    optimizer.step()
    assert torch.equal(run(frozen, ROWS), before)
    assert not torch.equal(run(model, ROWS), before)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with a tokenizer, of an architecture that is not ours."""
    folder = tmp_path_factory.mktemp("start")
    other_models.build(
        "opt",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def losses(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_the_stages_train_it(start: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """SFT, a reward model, and PPO with a critic that starts from it; transformers opens all."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"batch_size": 8, "microbatch_size": 4, "learning_rate": 1e-3}
    sft, reward, out = tmp_path / "sft", tmp_path / "reward", tmp_path / "rl"
    SFTTrainer(str(start), data=rows, out=sft, epochs=2, **options).train()
    assert losses(sft, "loss/train")[-1] < losses(sft, "loss/train")[0]
    RewardTrainer(str(sft), data=rows, out=reward, epochs=2, **options).train()
    assert losses(reward, "loss/train")[-1] < losses(reward, "loss/train")[0]
    RLTrainer(
        str(sft),
        data=rows,
        reward=str(reward),
        out=out,
        algorithm="ppo",
        steps=2,
        max_new_tokens=6,
        **options,
    ).train()
    assert all(abs(ratio - 1) < 1e-4 for ratio in losses(out, "first/val/ratio"))
    trained = AutoModelForCausalLM.from_pretrained(out).lm_head.weight
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(sft).lm_head.weight)
    scorers = [
        AutoModelForSequenceClassification.from_pretrained(folder).score.weight
        for folder in (reward, out / "critic")
    ]
    assert len(scorers[0]) == 1
    assert not torch.equal(*scorers)


def test_an_interrupted_run_resumes_to_the_same_bits(
    start: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    SFTTrainer(str(start), data=rows, out=whole, **options).train()
    steps = Optimizer.step

    def stop_at_fourth(self: Optimizer) -> dict[str, Tensor]:
        if self.steps == 3:
            raise KeyboardInterrupt
        return steps(self)

    monkeypatch.setattr(Optimizer, "step", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        SFTTrainer(str(start), data=rows, out=parts, **options).train()
    monkeypatch.undo()
    assert (parts / "checkpoint").exists()
    SFTTrainer(str(start), data=rows, out=parts, resume=True, **options).train()
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
