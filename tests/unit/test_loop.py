"""The fast engine's own loop trains as TRL's trainer does, and its streams, masks and checkpoints keep that so."""

import json
import shutil

import pytest
import torch

from llama_lab import trainer
from llama_lab.checkpoints import step_of
from llama_lab.choices import Engine, Memory
from llama_lab.compose import compose_words
from llama_lab.data.batches import Collator, training_rows
from llama_lab.data.splits import build_splits
from llama_lab.data.templates import IGNORED
from llama_lab.engine import loop
from llama_lab.engine.batch import Batch, joined
from llama_lab.engine.dropout import kept, step_keys
from llama_lab.engine.install import speed_up
from llama_lab.engine.network import Network
from llama_lab.engine.replay import Replay
from llama_lab.engine.stream import chosen_sizes, made_ahead, next_size, stream_of
from llama_lab.errors import ConfigError, RunError
from llama_lab.lora import add_adapter
from llama_lab.model import load_base, load_tokenizer
from llama_lab.training import FitSettings

WORDS = [
    "model=tiny",
    "quant=nf4",
    "quant.compute_dtype=float32",
    "dataset.max_train_rows=24",
    "trainer.logging_steps=1",
]


@pytest.fixture(autouse=True)
def cache(model_cache):
    """Models of these tests are made in the session's own folder."""


class Heard:
    """A listener that writes down."""

    def __init__(self):
        self.rows, self.saved_steps, self.is_over = [], [], False

    def started(self, start_step, num_steps):
        return None

    def stepped(self, step):
        pass

    def logged(self, step, metrics):
        self.rows.append({"step": step} | metrics)

    def saved(self, step, checkpoint):
        assert (checkpoint / "adapter_model.safetensors").exists()
        self.saved_steps.append(step)

    def ended(self):
        self.is_over = True


def train(fit, folder, *words, memory=Memory.balanced, evaluate=dict, on_cpu=False):
    """The trained adapter by name, and what was heard.

    Args:
        on_cpu: TRL's trainer as the fast engine of a CPU uses it.
    """
    config = compose_words([*WORDS, *words])
    tokenizer = load_tokenizer(config.model)
    rows = training_rows(build_splits(config.dataset, tokenizer, seed=config.seed).train.tokens, config.dataset)
    engine = Engine.standard if fit is trainer.fit and not on_cpu else Engine.fast
    model = add_adapter(load_base(config.model, config.quant, dense=on_cpu), config.lora, seed=config.seed)
    if on_cpu:
        speed_up(model)
    settings = FitSettings(
        trainer=config.trainer,
        engine=engine,
        memory=memory,
        seed=config.seed,
        checkpoints=folder,
        autocast_bf16=False,
    )
    heard = Heard()
    fit(model, tokenizer, rows, settings, heard, evaluate)
    assert heard.is_over
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, heard


@pytest.mark.parametrize(
    "words",
    [
        ["lora.dropout=0", "trainer.num_train_epochs=4", "trainer.max_steps=20"],
        ["lora.dropout=0", "trainer.gradient_accumulation_steps=4", "trainer.max_steps=5"],
        ["lora.dropout=0", "dataset.packing=true", "dataset.max_length=256", "trainer.max_steps=6"],
        ["lora.dropout=0", "trainer.group_by_length=true", "trainer.max_steps=8"],
        ["lora=attention", "lora.dropout=0", "trainer.weight_decay=0.1", "trainer.max_grad_norm=0.1"],
        ["lora=rslora", "lora.dropout=0", "lora.target_modules=[o_proj,up_proj]", "trainer.lr_scheduler_type=cosine"],
    ],
)
def test_it_learns_what_trl_does(words, tmp_path):
    wanted, told = train(trainer.fit, tmp_path / "standard", *words)
    found, heard = train(loop.fit, tmp_path / "fast", *words, memory=Memory.lean)
    assert [row["step"] for row in heard.rows] == [row["step"] for row in told.rows]
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch"):
        assert [row[name] for row in heard.rows] == pytest.approx([row[name] for row in told.rows], rel=1e-6, abs=1e-6)
    assert heard.rows[-1].keys() == told.rows[-1].keys()
    assert found.keys() == wanted.keys()
    assert max((found[name] - wanted[name]).abs().max().item() for name in found) < 3e-6


def test_a_cpu_learns_with_the_noise_of_trl_on_its_embeddings(tmp_path):
    words = ["lora.dropout=0", "trainer.neftune_noise_alpha=20", "trainer.max_steps=3"]
    (wanted, told), (found, heard) = (
        train(trainer.fit, tmp_path / name, *words, on_cpu=name == "fast") for name in ("standard", "fast")
    )
    losses = [[row["train/loss"] for row in one.rows] for one in (told, heard)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert max((found[name] - wanted[name]).abs().max().item() for name in found) < 3e-6


def test_levels_of_memory_learn_the_same(tmp_path):
    words = ["lora.dropout=0.2", "trainer.max_steps=4"]
    adapters = [train(loop.fit, tmp_path / level, *words, memory=level)[0] for level in ("lean", "balanced", "fast")]
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in other)


@pytest.mark.parametrize("fit", [loop.fit, trainer.fit])
def test_it_goes_on_from_its_checkpoint_bit_by_bit(fit, tmp_path):
    words = ["lora.dropout=0.3", "trainer.max_steps=9", "trainer.save_steps=2", "trainer.save_total_limit=null"]
    whole, heard = train(fit, tmp_path, *words, "trainer.group_by_length=true")
    assert heard.saved_steps == [2, 4, 6, 8, 9]
    for start in (9, 8, 4):  # an epoch has 6 steps: the end, in the middle of the second, in the first
        for checkpoint in tmp_path.iterdir():
            if step_of(checkpoint) > start:
                shutil.rmtree(checkpoint)
        again, heard = train(fit, tmp_path, *words, "trainer.group_by_length=true")
        assert [row["step"] for row in heard.rows] == list(range(start + 1, 10))
        assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("first", "second"), [(loop.fit, trainer.fit), (trainer.fit, loop.fit)])
def test_a_checkpoint_of_the_other_engine_is_refused(first, second, tmp_path):
    train(first, tmp_path, "trainer.max_steps=1", "trainer.save_steps=1")
    with pytest.raises(ConfigError, match=r"Type trainer\.engine="):
        train(second, tmp_path, "trainer.max_steps=2", "trainer.save_steps=1")


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    with pytest.raises(RunError, match=r"smaller trainer\.learning_rate"):
        train(loop.fit, tmp_path, "trainer.learning_rate=1e30", "trainer.lr_scheduler_type=constant")


@pytest.mark.parametrize("fit", [loop.fit, trainer.fit])
def test_a_warm_up_that_leaves_a_polynomial_no_step_is_refused_before_the_first(fit, tmp_path):
    words = ["trainer.lr_scheduler_type=polynomial", "dataset.max_train_rows=4"]
    with pytest.raises(ConfigError, match=r"Type trainer\.warmup_ratio=0,"):
        train(fit, tmp_path, *words)
    with pytest.raises(ConfigError, match=r"trainer\.warmup_ratio=0\.5 takes all of 1\."):
        compose_words([*words, "trainer.warmup_ratio=0.5", "trainer.max_steps=1"])
    with pytest.raises(ConfigError, match=r"ends at 1e-07; type more"):
        compose_words([*words, "trainer.learning_rate=1e-7"])
    _, heard = train(fit, tmp_path, *words, "trainer.warmup_ratio=0")
    assert len(heard.rows) == 1


def test_held_out_numbers_come_when_they_are_due(tmp_path):
    words = ["trainer.eval_steps=2", "trainer.max_steps=5"]
    _, heard = train(loop.fit, tmp_path, *words, evaluate=lambda: {"eval/loss": 1.0})
    assert [row["step"] for row in heard.rows if "eval/loss" in row] == [2, 4]


def network(*words):
    """The tiny model in fp64, and its network with a dropout of 0.4 where it has dropout."""
    config = compose_words(["model=tiny", "quant=none", "quant.compute_dtype=float32", *words])
    model = add_adapter(load_base(config.model, config.quant).double(), config.lora, seed=0)
    has_dropout = config.lora.dropout > 0
    found = Network(model, Memory.lean, num_rows=1, rank=config.lora.r, dropout=has_dropout, compiled=False)
    found.adapter.take(0, "default")
    found.adapter.master_KS.copy_(
        torch.randn(found.adapter.master_KS.shape, generator=torch.Generator().manual_seed(0)) / 9
    )
    return found


def losses_and_gradient(found, rows, padding=0):
    stream = stream_of([{"input_ids": row, "labels": row} for row in rows])
    tokens, starts, spans = joined([stream], size=stream.num_tokens + padding, longest=9)
    keys = step_keys(0, 0, 0, [0.7] * found.num_keys, 0.4)[:, None]
    share = torch.tensor([1 / stream.num_learned], dtype=torch.float64)
    replay = Replay(found, record=False)
    replay.run(Batch(tokens_3KN=tokens, starts=starts, spans=spans, longest=9, keys_PKW=keys, share_K=share))
    return replay.losses_K.item(), found.adapter.grad_KS.clone()


ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [21, 22, 23], [31, 32, 33, 34, 35]]


def test_gradients_are_right_with_dropout():
    found = network("lora.dropout=0.4")
    master, generator = found.adapter.master_KS, torch.Generator().manual_seed(1)
    _, gradient = losses_and_gradient(found, ROWS)
    for _ in range(4):
        direction = torch.randn(master.shape, generator=generator, dtype=master.dtype)
        sides = []
        for sign in (1, -1):
            master.add_(direction, alpha=sign * 1e-6)
            sides.append(losses_and_gradient(found, ROWS)[0])
            master.add_(direction, alpha=-sign * 1e-6)
        # the masks are the same each time: they depend on the keys alone
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("padding", [1, 13, 47])
@pytest.mark.parametrize("dropout", [0, 0.4])
def test_padding_changes_nothing(padding, dropout):
    found = network(f"lora.dropout={dropout}")
    loss, gradient = losses_and_gradient(found, ROWS)
    padded, again = losses_and_gradient(found, ROWS, padding)
    assert padded == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(again, gradient, rtol=1e-9, atol=1e-12)


def test_rows_do_not_see_each_other():
    found = network("lora.dropout=0")
    loss, gradient = losses_and_gradient(found, ROWS)
    parts = [losses_and_gradient(found, [row]) for row in ROWS]
    weights = [(len(row) - 1) / sum(len(row) - 1 for row in ROWS) for row in ROWS]
    assert loss == pytest.approx(sum(w * part[0] for w, part in zip(weights, parts, strict=True)), rel=1e-12)
    summed = sum(w * part[1] for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(gradient, summed, rtol=1e-9, atol=1e-12)


def test_masks_leave_out_the_share_and_differ_by_step_and_layer():
    keys = torch.stack([step_keys(3, step, micro, [1.0] * 4, 0.05) for step, micro in [(0, 0), (1, 0), (0, 1)]])
    assert len({tuple(key) for key in keys.flatten(0, 1)[:, :2].tolist()}) == 12
    assert torch.equal(keys[1], step_keys(3, 1, 0, [1.0] * 4, 0.05))
    masks = kept(keys.flatten(0, 1), 256, 1024).float()
    assert (1 - masks.mean(dim=(1, 2))).tolist() == pytest.approx([0.05] * 12, abs=0.003)
    assert len({tuple(mask[:2].flatten().tolist()) for mask in masks}) == 12


def test_hashed_masks_are_not_correlated():
    (keys,) = step_keys(7, 0, 0, [1.0] * 6, 0.1)[None]
    left_out = 1 - kept(keys, 128, 2048).double().flatten(1)
    around = left_out - left_out.mean(dim=1, keepdim=True)
    normal = around / around.norm(dim=1, keepdim=True)
    others = normal @ normal.t() - torch.eye(6, dtype=torch.float64)
    assert others.abs().max().item() < 0.01
    for lag in (1, 2, 3, 4, 8, 64, 2048):
        assert (normal[:, lag:] * normal[:, :-lag]).sum(dim=1).abs().max().item() < 0.01


def test_streams_learn_nothing_across_rows_and_in_padding():
    stream = stream_of([{"input_ids": row, "labels": row} for row in ROWS])
    assert (stream.num_tokens, stream.lengths) == (17, [9, 3, 5])
    assert stream.num_learned == 14  # the first of a row is never predicted; transformers counts those of the collator
    labels = Collator(pad_token_id=0)([{"input_ids": row, "labels": row} for row in ROWS])["labels"]
    assert (labels != IGNORED).sum() == (labels[:, 1:] != IGNORED).sum() == 14
    (ids, targets, positions), starts, spans = joined([stream, None], size=28, longest=9, num_starts=12)
    learned = [*ROWS[0][1:], IGNORED, *ROWS[1][1:], IGNORED, *ROWS[2][1:]]
    assert ids[0, :17].tolist() == [token for row in ROWS for token in row]
    assert targets.tolist() == [learned + [IGNORED] * 12, [IGNORED] * 28]
    assert positions.tolist() == [[*range(9), *range(3), *range(5), *range(9), 0, 1], [*range(9)] * 3 + [0]]
    assert starts.tolist() == [0, 9, 12, 17, 26, 28, 37, 46, 55, 56, 56, 56]
    assert [end for _, end in spans] == starts[1:10].tolist()


def test_sizes_are_few_and_hold_every_batch():
    totals = [100, 110, 120, 130, 900, 905, 1000, 2000] * 50
    sizes = chosen_sizes(totals, cost=2000)
    assert all(next_size(sizes, total) >= total for total in totals)
    cost = len(sizes) * 2000 + sum(next_size(sizes, total) - total for total in totals)
    for other in ([2048], [128, 192, 2048], [128, 192, 960, 1024, 2048], [192, 1024, 2048]):
        assert cost <= len(other) * 2000 + sum(next_size(other, total) - total for total in totals)
    assert chosen_sizes([64] * 3) == [64]


def test_errors_of_the_thread_that_makes_batches_are_raised():
    def make(batch):
        if batch == [2]:
            raise ValueError("row 2")
        return batch

    ready = made_ahead(make, [[1], [2], [3]])
    assert next(ready) == [1]
    with pytest.raises(ValueError, match="row 2"):
        next(ready)


def test_checkpoints_hold_a_plain_peft_adapter(tmp_path):
    from peft import PeftModel

    trained, _ = train(loop.fit, tmp_path, "trainer.max_steps=2", "trainer.save_steps=2")
    config = compose_words(WORDS)
    loaded = PeftModel.from_pretrained(load_base(config.model, config.quant), str(tmp_path / "checkpoint-2"))
    found = dict(loaded.named_parameters())
    assert all(torch.equal(found[name].detach(), value) for name, value in trained.items())
    assert json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())["r"] == config.lora.r
