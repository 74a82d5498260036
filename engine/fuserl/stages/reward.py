"""The reward model: a scalar head on a decoder, trained so that better completions score higher."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.checkpoint import digest, digest_ids
from fuserl.config import RewardConfig
from fuserl.data.examples import Ranking, load_rankings
from fuserl.data.rows import Source, source_name
from fuserl.device import default_device
from fuserl.model.folder import check_vocabulary, load_scalar_model, read_config
from fuserl.model.heads import ScalarModel
from fuserl.model.hub import resolve_folder
from fuserl.model.notes import FolderNotes
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.run import Run, prepare_folder
from fuserl.sequences import Sequences, last_values
from fuserl.stages.opening import loading, open_notes, open_policy, open_tokenizer, tell
from fuserl.stages.supervised import evaluate_on, plan_epochs, train_on
from fuserl.stages.trainable import adapt, make_trainable, save_trained, training_dtype
from fuserl.tokenizer import Tokenizer


class RewardTrainer:
    """RewardTrainer("runs/sft", data="pairs.jsonl", out="runs/reward").train()

    model: a folder or hub id of any stage: a head it lacks is drawn anew, one it has is kept
    (preference-model pretraining is this stage run twice); or a Policy, which is copied under a
    new head. data, validation_data: a file, or a list of dicts. options: RewardConfig's fields.
    """

    def __init__(
        self,
        model: str | Path | Policy,
        *,
        data: Source,
        out: str | Path,
        validation_data: Source | None = None,
        **options: Any,
    ) -> None:
        self._data, self._validation_data = data, validation_data
        self._given = model if isinstance(model, Policy) else None
        self.config = RewardConfig(
            model=model.source if isinstance(model, Policy) else str(model),
            data=source_name(data),
            out=str(out),
            validation_data=None if validation_data is None else source_name(validation_data),
            **options,
        )

    def train(self) -> dict[str, Any]:
        """Train, centre the scores and save; returns what summary.json says."""
        config = self.config
        if (finished := prepare_folder("reward", config)) is not None:
            return finished
        model, tokenizer, notes = self._open()
        make_trainable(model, config)
        options = loading(config, notes)
        rankings = self._load(self._data, tokenizer, model, options, "data")
        objective = PairwiseLoss(model, rankings, config.center_coef)
        validation = None
        if self._validation_data is not None:
            held_out = self._load(
                self._validation_data, tokenizer, model, options, "validation data"
            )
            validation = PairwiseLoss(model, held_out, config.center_coef)
        plan = plan_epochs([objective] * config.epochs, config.batch_size, seed=config.seed)
        adapt(model, config, seed=config.seed)
        modules = {"reward": model}
        optimizer = Optimizer(modules, config, total_steps=len(plan))
        facts = {
            "data": digest_ids((r.prompt_ids, *r.completions) for r in rankings),
            "starting model": digest(model),
        }
        with Run(
            "reward",
            config,
            total_steps=len(plan),
            modules=modules,
            optimizer=optimizer,
            facts=facts,
        ) as run:
            last = train_on(
                run,
                plan,
                optimizer,
                config,
                validate=lambda: evaluate_on(validation, config.microbatch_size),
                validate_every=config.validate_every,
                show=("loss/train", "reward/accuracy"),
            )
            mean = objective.center()
            save_trained(run.out, model, tokenizer, notes, base=config.model)
            summary = {"steps": len(plan), "rows": len(rankings), "mean_before_centring": mean}
            return run.finish({**summary, **last})

    def _open(self) -> tuple[ScalarModel, Tokenizer, FolderNotes]:
        config = self.config
        if self._given is not None:
            policy = open_policy(config, self._given, dtype=training_dtype(config))
            model = ScalarModel.on_trunk(policy.model, config.seed, config.head or "linear")
            return model, policy.text_tokenizer, policy.notes
        folder = resolve_folder(config.model)
        tokenizer = open_tokenizer(folder, config)
        check_vocabulary(read_config(folder), tokenizer.vocab_size, folder)
        model, _ = load_scalar_model(
            folder,
            device=default_device(config.device),
            dtype=training_dtype(config),
            head=config.head or "linear",
            head_seed=config.seed,
        )
        model = model.with_head(config.head, config.seed)
        return model, tokenizer, open_notes(folder, config)

    def _load(
        self,
        source: Source,
        tokenizer: Tokenizer,
        model: ScalarModel,
        options: dict[str, Any],
        name: str,
    ) -> list[Ranking]:
        rankings, counts = load_rankings(
            source,
            tokenizer,
            max_length=min(self.config.max_length, model.config.max_positions),
            **options,
        )
        tell(name, counts)
        return rankings


class PairwiseLoss:
    """-log sigmoid of the score difference over all pairs of a ranking, each completion computed
    once (an Objective of supervised.py; Ouyang et al., 2022, with pairs, not prompts, weighing
    the same)."""

    def __init__(
        self, model: ScalarModel, rankings: Sequence[Ranking], center_coef: float = 0.0
    ) -> None:
        self._model, self._rankings, self._center_coef = model, rankings, center_coef
        self.lengths = [
            sum(len(r.prompt_ids) + len(completion) for completion in r.completions)
            for r in rankings
        ]

    def weight(self, rows: Sequence[int]) -> int:
        return sum(math.comb(len(self._rankings[row].completions), 2) for row in rows)

    def loss(self, rows: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        rankings = [self._rankings[row] for row in rows]
        scores = self.scores(rankings)
        chosen, rejected, first = [], [], 0
        for ranking in rankings:
            for better, worse in combinations(range(len(ranking.completions)), 2):
                chosen.append(first + better)
                rejected.append(first + worse)
            first += len(ranking.completions)
        loss, metrics = fk.pairwise_loss(
            scores[chosen], scores[rejected], center_coef=self._center_coef
        )
        return loss, {name: value for name, value in metrics.items() if name != "num_pairs"}

    def scores(self, rankings: Sequence[Ranking]) -> Tensor:
        """One score a completion, [completions] fp32, in the rankings' order."""
        prompts = [ranking.prompt_ids for ranking in rankings for _ in ranking.completions]
        completions = [ids for ranking in rankings for ids in ranking.completions]
        return last_values(self._model, Sequences.of(prompts, completions, self._model.device))

    @torch.no_grad()
    def center(self, num_rankings: int = 256) -> float:
        """Move the head's bias so that the best completions score 0 on average (Huang et al.,
        2024). Returns the mean before."""
        total, count = 0.0, 0
        for start in range(0, min(num_rankings, len(self._rankings)), 16):
            rankings = self._rankings[start : start + 16]
            best, first = [], 0
            for ranking in rankings:
                best.append(first)
                first += len(ranking.completions)
            total += float(self.scores(rankings)[best].sum())
            count += len(best)
        self._model.score.bias.sub_(total / count)
        return total / count
