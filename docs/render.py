"""Writes the numbers of README.md and docs/, and the picture of speed, from the files of the runs they come from.

python docs/render.py             # with --check it only compares
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pictures_speed import IMAGE, speed_sweep_svg  # noqa: E402
from render_learning import learning_table  # noqa: E402
from render_modules import modules_table  # noqa: E402
from render_profile import speed_profile_table, stacked_profile_table  # noqa: E402
from render_speed import SPEED_H200, at_commit, speed_cpu_table, speed_table  # noqa: E402
from render_stacked import stacked_runs_table, stacked_table  # noqa: E402
from render_stages import stages_table  # noqa: E402
from render_study import study_section  # noqa: E402
from render_sweep import speed_sweep_table  # noqa: E402

RUN = ROOT / "experiments" / "default_run"
MEMORY = ROOT / "benchmarks" / "results" / "memory.json"
HALVING = ROOT / "benchmarks" / "results" / "sweep_halving.json"
RUNGS = ROOT / "benchmarks" / "results" / "sweep_rungs.json"
OVERHEAD = ROOT / "benchmarks" / "results" / "sweep_overhead.json"
MERGE = ROOT / "benchmarks" / "results" / "merge.json"
MERGE_ONTO = ROOT / "benchmarks" / "results" / "merge_onto.json"
STARTUP = ROOT / "benchmarks" / "results" / "startup.json"


def default_run_table() -> str:
    """The result of experiments/default_run as a Markdown table."""
    result = json.loads((RUN / "result.json").read_text())
    lock = json.loads((RUN / "run.json").read_text())
    command = json.loads((RUN / "command.json").read_text())
    rows = [
        ("held-out loss, nats a token", f"{result['eval_loss_before']:.3f}", f"{result['eval_loss']:.3f}"),
        ("exact match on held-out requests", "-", f"{result['exact_match']:.0%}"),
        ("answers that compose", "-", f"{result['composes']:.0%}"),
        ("optimizer steps", "", str(result["num_steps"])),
        ("the whole command", "", f"{command['whole_command_s']:.0f} s"),
        ("training time", "", f"{result['train_runtime_s']:.0f} s"),
        ("speed", "", f"{result['tokens_per_s']:.0f} tokens/s"),
        ("peak memory of the process", "", f"{result['peak_memory_gib']:.2f} GiB"),
        ("trained parameters", "", f"{result['num_trainable_params']:,}"),
    ]
    hardware = lock["hardware"]
    lines = ["| | before | after |", "|---|---:|---:|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    source = f"{hardware['cpu']}, {hardware['torch_threads']} threads, torch {lock['versions']['torch']}"
    source += f", computing in {lock['model']['compute_dtype']}, at commit {lock['code']['commit'][:7]}"
    return "\n".join([*lines, "", f"Measured on {source}: experiments/default_run."])


def default_run_samples() -> str:
    """The first held-out requests with the answers before and after, as a Markdown table."""
    text = (RUN / "samples.md").read_text()
    parts = re.findall(r"^## (.*?)\n.*?Before:\n\n```+\n(.*?)\n```+\n.*?After:\n\n```+\n(.*?)\n```+", text, re.S | re.M)
    lines = ["| request | before | after |", "|---|---|---|"]
    lines += ["| " + " | ".join(_cell(part) for part in sample) + " |" for sample in parts]
    return "\n".join(lines)


def startup_table() -> str:
    """Start-up times beside a bare Hydra app."""
    rows = json.loads(STARTUP.read_text())["rows"]
    lines = ["| case | system | median ms | ratio to a bare Hydra app |", "|---|---|---:|---:|"]
    lines += [f"| {r['case']} | {r['system']} | {r['median_ms']:.0f} | {r['ratio_to_bare']:.2f} |" for r in rows]
    source = f"{rows[0]['cpu']}, Python {rows[0]['python']}, median of {rows[0]['runs']} runs{at_commit(rows[0])}"
    return "\n".join([*lines, "", f"Measured on {source}: benchmarks/results/startup.json."])


def memory_table() -> str:
    """Peaks measured on a GPU beside the predictions of llama_lab/memory.py."""
    rows = [row for row in json.loads(MEMORY.read_text())["rows"] if row["on_gpu"]]
    lines = ["| settings | measured GiB | predicted GiB | error |", "|---|---:|---:|---:|"]
    for row in rows:
        said = " ".join(word for word in row["settings"] if not word.startswith("model="))
        numbers = f"{row['peak_memory_gib']:.2f} | {row['predicted_gib']:.2f} | {row['relative_error']:+.1%}"
        lines.append(f"| `{said}` | {numbers} |")
    versions = ", ".join(f"{name} {rows[0]['versions'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    worst = max(abs(row["relative_error"]) for row in rows)
    source = f"A Llama-2-7B-shaped model on one {rows[0]['card']}, {versions}{at_commit(rows[0])}"
    source += f"; the largest error is {worst:.1%}"
    return "\n".join([*lines, "", f"{source}: benchmarks/results/memory.json."])


def sweep_overhead_table() -> str:
    """What a trial costs beside its training."""
    rows = json.loads(OVERHEAD.read_text())["rows"]
    names = {
        "optuna_memory": "Optuna alone, in memory",
        "optuna_journal": "Optuna alone, on a journal",
        "hydra_grid": "Hydra's grid and basic launcher",
        "study": "our study on a journal through the same launcher",
    }
    lines = ["| system | ms a trial without training |", "|---|---:|"]
    lines += [f"| {names[row['system']]} | {row['ms_a_trial']:.1f} |" for row in rows]
    study = next(row for row in rows if row["system"] == "study")
    added = f"The study adds {study['added_to_hydra_ms']:.1f} ms to Hydra's own; {study['target_ms']} are allowed"
    versions = ", ".join(f"{name} {version}" for name, version in study["versions"].items())
    return "\n".join(
        [*lines, "", f"{added}. {study['cpu']}, {versions}{at_commit(study)}: benchmarks/results/sweep_overhead.json."]
    )


def sweep_halving_table() -> str:
    """The same studies with every trial whole and with bad trials ended early."""
    rows = json.loads(HALVING.read_text())["rows"]
    lines = [
        "| sampler, seed | pruner | trials, whole ones | best loss | optimizer steps | steps to the best of `none` |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        study = (row["sampler"], row["seed"])
        whole = next(r["optimizer_steps"] for r in rows if (r["sampler"], r["seed"], r["pruner"]) == (*study, "none"))
        reached = row["steps_to_best_of_none"]
        share = f"{reached} = {reached / whole:.1%} of {whole}" if reached else "not reached"
        lines.append(
            f"| `{row['sampler']}`, {row['seed']} | `{row['pruner']}` | {row['trials']}, {row['whole_trials']} | "
            f"{row['best_loss']:.3f} | {row['optimizer_steps']} | {share} |"
        )
    said = " ".join(word for word in rows[-1]["words"] if word.startswith(("dataset", "trainer")))
    source = f"`search=lora_quant {said}`, {rows[0]['cpu']}{at_commit(rows[0])}"
    return "\n".join([*lines, "", f"{source}: benchmarks/results/sweep_halving.json."])


def merge_onto_table() -> str:
    """What merging onto each kind of weights does to the answers."""
    found = json.loads(MERGE_ONTO.read_text())
    lines = [
        "| onto | KL, nats a token | greedy agreement | largest logit difference | perplexity (adapter "
        f"{found['perplexity_adapter']:.3f}) |",
        "|---|---:|---:|---:|---:|",
    ]
    for onto, row in found["tried"].items():
        numbers = f"{row['greedy_agreement']:.1%} | {row['max_logit_diff']:.2f} | {row['perplexity']:.3f}"
        lines.append(f"| {onto} | {row['kl']:.2g} | {numbers} |")
    source = f"`{found['run']}`, merged in {found['dtype']}, {found['num_tokens']} tokens of "
    source += f"{found['num_rows']} held-out rows, computed in {found['computed_in']}{at_commit(found)}"
    return "\n".join(
        [*lines, "", f"{source}: benchmarks/results/merge_onto.json, by `python -m benchmarks.merge --onto`."]
    )


def merge_memory_table() -> str:
    """Peaks of merge on made-up weights."""
    rows = json.loads(MERGE.read_text())["rows"]
    lines = ["| shape | weights in bf16, GiB | one layer in fp32, GiB | peak memory, GiB |", "|---|---:|---:|---:|"]
    for row in rows:
        shape = f"{row['case']}, {row['num_layers']} layers"
        numbers = f"{row['weights_bf16_gib']:.2f} | {row['layer_fp32_gib']:.2f} | {row['peak_memory_gib']:.2f}"
        lines.append(f"| {shape} | {numbers} |")
    card = rows[0]["card"].removeprefix("none; ")
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    source = f"Random weights of that shape with NF4 and rank 16, the process's highest resident memory, {card}"
    source += f"; {versions}{at_commit(rows[0])}: benchmarks/results/merge.json, by `python -m benchmarks.merge`"
    return "\n".join([*lines, "", f"{source}."])


def sweep_rungs_table() -> str:
    """Pruners and rungs tried on what is recorded."""
    rows = json.loads(RUNGS.read_text())["rows"]
    lines = [
        "| pruner | first rung | options | share of the steps | the best is kept | loss at half | as good at half |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        lines.append(
            f"| `{row['pruner']}` | {row['first_rung']} | {options} | {row['share_of_steps']:.0%} | "
            f"{row['best_is_kept']:.0%} | {row['loss_at_half']:.3f} | {row['as_good_at_half']:.0%} |"
        )
    one = rows[0]
    said = (
        f"Share and best kept: means over {one['orders']} random orders of recorded trials. Loss at half: median of "
        f"{one['studies']} simulated studies after half of the steps of one without pruning, which ends at "
        f"{one['loss_without_at_all']:.3f}; as good at half: how often it is not above such a one. The model misses a "
        f"recorded final loss by {one['misfit']:.0%} ({one['recorded']} trials): benchmarks/results/sweep_rungs.json."
    )
    return "\n".join([*lines, "", said])


BLOCKS = {
    "modules": modules_table,
    "stacked": stacked_table,
    "stacked_runs": stacked_runs_table,
    "stages": stages_table,
    "study": study_section,
    "merge_onto": merge_onto_table,
    "merge_memory": merge_memory_table,
    "sweep_halving": sweep_halving_table,
    "speed": speed_table,
    "speed_short": partial(speed_table, is_short=True),
    "speed_h200": partial(speed_table, SPEED_H200),
    "speed_sweep": speed_sweep_table,
    "speed_profile": speed_profile_table,
    "stacked_profile": stacked_profile_table,
    "learning": learning_table,
    "sweep_rungs": sweep_rungs_table,
    "speed_cpu": speed_cpu_table,
    "sweep_overhead": sweep_overhead_table,
    "default_run": default_run_table,
    "samples": default_run_samples,
    "startup": startup_table,
    "memory": memory_table,
}
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("modules", "taking_away", "planning", "preferences", "searching", "speed", "stacked")
    ),
)


def rendered(text: str) -> str:
    """`text` with every block between `<!-- NAME -->` and `<!-- end -->` made anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if pattern.search(text):
            content = make()
            text = pattern.sub(lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text)
    return text


def main(check: bool) -> int:
    """Write the files, or say which are out of date; the exit code."""
    stale = []
    made = {ROOT / page: rendered((ROOT / page).read_text(encoding="utf-8")) for page in PAGES}
    if picture := speed_sweep_svg():
        made[IMAGE] = picture
    for path, new in made.items():
        if not path.exists() or new != path.read_text(encoding="utf-8"):
            stale.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and stale:
        print(f"Out of date: {', '.join(stale)}. Type: python docs/render.py")
        return 1
    return 0


def _cell(text: str) -> str:
    short = " ".join(text.split())
    short = short if len(short) <= 160 else short[:159] + "…"
    return short.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
