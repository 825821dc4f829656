"""`merge`: the adapter in the weights, verified before and after they are written."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_lab.choices import QuantType
from llama_lab.data.splits import build_splits
from llama_lab.errors import ConfigError, RunError
from llama_lab.rundir import write_json
from llama_lab.take.card import Loading, card, fidelity_rows
from llama_lab.take.fidelity import Fidelity, held_out_prompts
from llama_lab.take.load import load_tokenizer_of
from llama_lab.take.merging import Merger
from llama_lab.take.options import MERGE_FILE, MergeOptions, Onto
from llama_lab.take.source import Source
from llama_lab.take.target import new_folder
from llama_lab.take.ticker import Ticker
from llama_lab.take.weights import adapter_parts, base_files, copy_files

SCHEMA = 1
"""Version of merge.json."""


def merge(source: Source, to: Path, options: MergeOptions) -> int:
    """Merge into the folder `to`, which is written whole or not at all; the exit code.

    Raises:
        RunError: no merge is faithful and `force` is off.
        ModelError: the adapter cannot be merged.
    """
    with Ticker() as tick, new_folder(to) as folder:
        numbers = merge_into(folder, source, options, tick)
    print(f"Merged onto the {numbers['onto']} weights in {options.dtype}: {to}")
    print(f"Its numbers are in {to / 'README.md'} and {MERGE_FILE} beside it.")
    return 0


def merge_into(folder: Path, source: Source, options: MergeOptions, tick: Ticker) -> dict[str, Any]:
    """Fill an empty folder with the merged model and its card; what merge.json says.

    Args:
        folder: lies in a work folder of its own, see `target`.
    Raises:
        RunError: no merge is faithful and `force` is off.
    """
    card(source, Loading(is_adapter=False))  # what of it cannot be read is told now, and not after the merge
    tick("reading base and held-out rows")
    tokenizer = load_tokenizer_of(source)
    config = source.config
    splits = build_splits(config.dataset, tokenizer, seed=config.seed, trainer=config.trainer.name)
    merger = Merger(
        source=source,
        base=base_files(source.config.model),
        parts=adapter_parts(source.adapter, source.peft),
        dtype=options.dtype,
        prompts=held_out_prompts(splits.valid, tokenizer, options.num_rows),
        work=folder.parent,
        tick=tick,
    )
    found = merger.measure(candidates(source, options.onto))
    best = min(found, key=lambda onto: math.inf if math.isnan(found[onto].kl) else found[onto].kl)
    _show(found, best)
    _check_faithful(found[best], best, options)
    merger.write(folder, best)
    written = merger.check(folder)
    _check_faithful(written, best, options)
    numbers = _numbers(merger, best, written, found, options)
    write_json(folder / MERGE_FILE, numbers)
    tokenizer.save_pretrained(folder)
    copy_files(source.adapter, folder, ("generation_config.json",))
    copy_files(merger.base.folder, folder, ("tokenizer.model",))  # llama.cpp's converter reads Llama-2's pieces there
    (folder / "README.md").write_text(card(source, Loading(is_adapter=False), numbers), encoding="utf-8")
    return numbers


def candidates(source: Source, onto: Onto | None) -> list[Onto]:
    """The weights to try. Of a base that was not quantised there is one kind.

    Raises:
        ConfigError: one that this run does not have.
    """
    if source.config.quant.type is QuantType.none:
        if onto not in (None, Onto.original):
            raise ConfigError(f"--onto {onto}: this base is not quantised. Leave it out.")
        return [Onto.original]
    return [Onto.original, Onto.dequantised] if onto is None else [onto]


def _check_faithful(found: Fidelity, onto: Onto, options: MergeOptions) -> None:
    if found.is_within(options.max_kl) or options.force:
        return
    raise RunError(
        f"The merge onto the {onto} weights is not faithful: its KL divergence from the adapter on its base is "
        f"{found.kl:.3g} nats a token, and {options.max_kl:g} are allowed. Nothing was written. Type --dtype fp32 for "
        "less rounding, a larger --max-kl, or --force to write it all the same."
    )


def _numbers(
    merger: Merger, best: Onto, written: Fidelity, found: dict[Onto, Fidelity], options: MergeOptions
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "onto": str(best),
        "dtype": str(options.dtype),
        **asdict(written),
        "num_rows": merger.prompts.num_rows,
        "max_kl": options.max_kl,
        "is_faithful": written.is_within(options.max_kl),
        "computed_in": str(merger.computes_in).removeprefix("torch."),
        "tried": {str(onto): asdict(fidelity) for onto, fidelity in found.items()},
    }


def _show(found: dict[Onto, Fidelity], best: Onto) -> None:
    table = Table(title="Merged weights against the adapter on its base", title_justify="left")
    table.add_column("")
    for onto in found:
        table.add_column(f"onto {onto}" + " (chosen)" * (onto is best and len(found) > 1), justify="right")
    for rows in zip(*(fidelity_rows(asdict(fidelity)) for fidelity in found.values()), strict=True):
        table.add_row(rows[0][0], *(value for _, value in rows))
    Console().print(table)
