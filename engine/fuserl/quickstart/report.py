"""report.html of a quickstart run: one file, curves inside, readable without a network."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuserl.metrics import read_metrics

_BLUE, _ORANGE, _GREEN, _GRAY = "#3264a8", "#c8641e", "#2f7d4f", "#777777"


def write_report(out: Path, summary: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Draw plots/*.png from metrics.jsonl and put them, the numbers and sample completions into
    report.html."""
    plots = draw_plots(out)
    figures = "".join(_figure(path, caption) for path, caption in plots)
    samples = "".join(_sample_row(example) for example in examples)
    (out / "report.html").write_text(
        _PAGE.format(
            verdict=html.escape(verdict(summary)),
            css_class="good" if summary["gold_gain_ci95"][0] > 0 else "bad",
            numbers=_numbers(summary),
            figures=figures,
            samples=samples,
        )
    )


def verdict(summary: dict[str, Any]) -> str:
    """What happened, in a sentence that does not flatter."""
    low, high = summary["gold_gain_ci95"]
    if low > 0:
        outcome = "PPO raised"
    elif high < 0:
        outcome = "PPO lowered"
    else:
        outcome = "PPO did not clearly change"
    return (
        f"{outcome} the gold score on {summary['held_out_prompts']} held-out prompts: "
        f"{summary['gold_before']:.3f} to {summary['gold_after']:.3f} (gain, 95 % interval "
        f"{low:+.3f} to {high:+.3f}) at a KL of {summary['kl']:.2f} nats from the SFT model. "
        f"The reward model orders {summary['reward_accuracy']:.1%} of held-out pairs rightly."
    )


def draw_plots(out: Path) -> list[tuple[Path, str]]:
    """The curves of out/metrics.jsonl as PNG files, each with its caption."""
    lines = list(read_metrics(out / "metrics.jsonl"))
    (out / "plots").mkdir(exist_ok=True)
    sft, reward, ppo = (
        [line for line in lines if line["stage"] == stage] for stage in ("sft", "reward", "rl")
    )
    curves: list[tuple[str, str, str, list[tuple[str, list[dict[str, Any]], str, str]]]] = [
        (
            "sft_loss",
            "SFT: loss",
            "nats per completion token",
            [("training", sft, "loss/train", _BLUE), ("held out", sft, "validation/loss", _ORANGE)],
        ),
        (
            "reward_accuracy",
            "Reward model: accuracy",
            "share of pairs in order",
            [
                ("training batch", reward, "reward/accuracy", _BLUE),
                ("held out", reward, "validation/accuracy", _ORANGE),
            ],
        ),
        (
            "reward",
            "PPO: reward",
            "mean per completion",
            [
                ("reward model's score", ppo, "objective/scores", _BLUE),
                ("score minus KL penalty", ppo, "objective/rlhf_reward", _GRAY),
            ],
        ),
        (
            "gold",
            "PPO: gold score (never trained on)",
            "mean per completion",
            [("gold score", ppo, "gold", _GREEN)],
        ),
        (
            "kl",
            "PPO: KL from the SFT model",
            "nats per completion",
            [("KL", ppo, "objective/kl", _BLUE)],
        ),
        (
            "throughput",
            "PPO: tokens per second by phase",
            "completion tokens per second",
            [
                (phase, ppo, f"throughput/{phase}_tokens_per_second", color)
                for phase, color in (
                    ("rollout", _BLUE),
                    ("score", _ORANGE),
                    ("shape", _GRAY),
                    ("update", _GREEN),
                )
            ],
        ),
    ]
    return [
        (_draw(out / "plots" / f"{name}.png", title, unit, series), title)
        for name, title, unit, series in curves
    ]


def _draw(
    path: Path, title: str, unit: str, series: list[tuple[str, list[dict[str, Any]], str, str]]
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.0), layout="constrained")
    for label, lines, name, color in series:
        points = [(line["step"], line[name]) for line in lines if name in line]
        few = len(points) < 12
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o" if few else None)
    if "throughput" in path.name:
        axes.set_yscale("log")
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, loc="center right" if "throughput" in path.name else "best")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"></figure>\n'


def _numbers(summary: dict[str, Any]) -> str:
    low, high = summary["gold_gain_ci95"]
    seconds = summary["seconds"]
    rows = [
        ("Reward model accuracy, held-out pairs", f"{summary['reward_accuracy']:.3f}"),
        ("Gold score before PPO (SFT model)", f"{summary['gold_before']:.3f}"),
        ("Gold score after PPO", f"{summary['gold_after']:.3f}"),
        ("Gain, 95 % bootstrap interval", f"{low:+.3f} to {high:+.3f}"),
        ("KL of the policy from the SFT model", f"{summary['kl']:.2f} nats per completion"),
        ("Rollout", f"{summary['rollout_tokens_per_second']:,.0f} tokens per second"),
        ("Seconds", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())),
        ("Peak memory", f"{summary['peak_memory_mb']:,.0f} MB"),
    ]
    return "".join(f"<tr><th>{name}</th><td>{value}</td></tr>\n" for name, value in rows)


def _sample_row(example: dict[str, Any]) -> str:
    cells = [
        html.escape(example["document"]),
        html.escape(example["ideal"]),
        f"{html.escape(example['before'])} <small>{example['gold_before']:.2f}</small>",
        f"{html.escape(example['after'])} <small>{example['gold_after']:.2f}</small>",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fuserl quickstart</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1140px; margin: 2rem auto; padding: 0 1rem;
        color: #222; }}
.verdict {{ padding: .8rem 1rem; border-left: 5px solid; background: #f6f6f6; }}
.good {{ border-color: #2f7d4f; }} .bad {{ border-color: #c8641e; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
          border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; }} small {{ color: #777; white-space: nowrap; }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; }} img {{ width: 100%; }}
</style></head><body>
<h1>A language model learns from preferences</h1>
<p class="verdict {css_class}">{verdict}</p>
<p>A small decoder is trained from scratch on careless summaries (SFT), a reward model learns from
pairs of summaries which one is better, and PPO trains the decoder to please the reward model. The
<em>gold</em> score, by which the pairs were made, is shown to neither: it tells whether the
summaries became better or only the reward model's opinion of them.</p>
<h2>Numbers</h2>
<table>{numbers}</table>
<h2>Curves</h2>
<div class="curves">{figures}</div>
<h2>Held-out documents, before and after</h2>
<p>Sampled at the training temperature; the small number is the gold score (1 is ideal).</p>
<table><tr><th>document</th><th>ideal</th><th>SFT model</th><th>after PPO</th></tr>
{samples}</table>
</body></html>
"""
