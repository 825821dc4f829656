"""Rows of a stack learn what they learn alone, whatever trains beside them; in fp64, where that can be seen."""

import copy
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from peft import PeftModel

from llama_lab.checkpoints import step_of
from llama_lab.choices import Engine, Memory
from llama_lab.compose import compose_words
from llama_lab.config import RunConfig
from llama_lab.data.batches import training_rows
from llama_lab.data.splits import build_splits
from llama_lab.engine import loop
from llama_lab.engine.adapter import lora_layers
from llama_lab.engine.batch import Batch, joined
from llama_lab.engine.checkpoint import load_weights
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.network import Network
from llama_lab.engine.optimizer import NOTHING, FlatAdamW, Update
from llama_lab.engine.replay import Replay
from llama_lab.engine.row import Row
from llama_lab.engine.shapes import Shapes
from llama_lab.engine.stack import Stack
from llama_lab.engine.stream import stream_of
from llama_lab.errors import RunError
from llama_lab.events import Pruned
from llama_lab.lora import add_adapter, add_named_adapter
from llama_lab.model import load_base, load_tokenizer
from llama_lab.training import FitSettings

WORDS = ["model=tiny", "quant=none", "quant.compute_dtype=float32", "dataset.max_train_rows=24"]
POINTS = {
    "short": [
        "seed=5",
        "lora.r=4",
        "lora.alpha=32",
        "lora.dropout=0",
        "trainer.max_steps=6",
        "trainer.learning_rate=3e-3",
        "trainer.max_grad_norm=0.2",
        "trainer.per_device_train_batch_size=2",
        "trainer.gradient_accumulation_steps=1",
        "trainer.eval_steps=4",
    ],
    "long": [
        "seed=6",
        "lora.r=8",
        "lora.alpha=8",
        "lora.dropout=0.3",
        "trainer.max_steps=20",
        "trainer.learning_rate=1e-2",
        "trainer.max_grad_norm=0.05",
        "trainer.weight_decay=0.2",
        "trainer.per_device_train_batch_size=3",
        "trainer.gradient_accumulation_steps=1",
        "trainer.lr_scheduler_type=cosine",
        "trainer.group_by_length=true",
        "trainer.eval_steps=5",
    ],
    "summed": [
        "seed=7",
        "lora.r=3",
        "lora.use_rslora=true",
        "lora.dropout=0.1",
        "trainer.max_steps=5",
        "trainer.learning_rate=5e-3",
        "trainer.per_device_train_batch_size=1",
        "trainer.gradient_accumulation_steps=3",
        "trainer.lr_scheduler_type=linear",
        "trainer.warmup_ratio=0.5",
        "trainer.logging_steps=2",
    ],
}
IDS = torch.arange(40).view(2, 20) + 3


@pytest.fixture(autouse=True)
def cache(model_cache):
    """Models of these tests are made in the session's own folder."""


@pytest.fixture(scope="module")
def base(model_cache):
    config = config_of("short")
    return load_base(config.model, config.quant).double()


def config_of(point: str, *words: str) -> RunConfig:
    return compose_words([*WORDS, "trainer.logging_steps=1", *POINTS[point], *words])


@dataclass
class Run:
    """One run and what was heard of it."""

    name: str
    config: RunConfig
    folder: object
    stop_at: int = 0
    rows: list = field(default_factory=list)
    adapter: dict = field(default_factory=dict)
    is_over: bool = False
    row: Row | None = None

    def started(self, start_step, num_steps):
        self.start_step = start_step

    def stepped(self, step):
        if step == self.stop_at:
            raise Pruned(step, "bad")

    def logged(self, step, metrics):
        self.rows.append({"step": step} | metrics)

    def saved(self, step, checkpoint):
        assert step_of(checkpoint) == step

    def ended(self):
        self.is_over = True

    def arguments(self, model):
        tokenizer = load_tokenizer(self.config.model)
        splits = build_splits(self.config.dataset, tokenizer, seed=self.config.seed)
        settings = FitSettings(
            trainer=self.config.trainer,
            engine=Engine.fast,
            seed=self.config.seed,
            checkpoints=self.folder / self.name,
            autocast_bf16=False,
        )
        return tokenizer, training_rows(splits.train.tokens, self.config.dataset), settings, self, measure(model)

    def take(self, model, name):
        assert self.is_over
        self.adapter = {
            f"{path}.{kind}": getattr(layer, kind)[name].weight.detach().clone()
            for path, layer in lora_layers(model, name).items()
            for kind in ("lora_A", "lora_B")
        }


def measure(model):
    """Something of the model as it is, its active adapter included."""

    @torch.no_grad()
    def held_out():
        model.eval()
        return {"eval/loss": model(IDS).logits.square().mean().item()}

    return held_out


def run_of(point, folder, *words, **kwargs):
    return Run(name=point, config=config_of(point, *words), folder=folder, **kwargs)


def alone(base, run):
    model = add_adapter(copy.deepcopy(base), run.config.lora, seed=run.config.seed)
    loop.fit(model, *run.arguments(model))
    run.take(model, "default")
    return run


class Together:
    """A stack, and the runs that wait for a slot."""

    def __init__(self, base, runs, num_rows, rank=8):
        first = runs[0]
        self.model = add_adapter(copy.deepcopy(base), first.config.lora, seed=first.config.seed, name=first.name)
        for run in runs[1:]:
            add_named_adapter(self.model, run.name, run.config.lora, seed=run.config.seed)
        self.stack = Stack(self.model, num_rows=num_rows, rank=rank, memory=Memory.balanced, dropout=True, paid=False)
        self.waiting, self.by_row, self.slots = list(runs), {}, {run.name: [] for run in runs}

    def step(self):
        """A micro-step; the runs that have ended with it."""
        while self.waiting and self.stack.num_free:
            run = self.waiting.pop(0)
            run.row = Row(self.model, run.name, *run.arguments(self.model))
            self.by_row[run.row] = run
            self.stack.join(run.row)
        over = [self.by_row[row] for row in self.stack.step()]
        for run in over:
            run.take(self.model, run.name)
        for row in self.stack.live:
            self.slots[row.name].append(row.slot)
        return over

    def finish(self):
        while self.waiting or not self.stack.is_empty:
            self.step()


def same(run, wanted, tolerance=1e-9):
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "train/epoch", "eval/loss"):
        found, expected = ([(row["step"], row[name]) for row in r.rows if name in row] for r in (run, wanted))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert run.adapter.keys() == wanted.adapter.keys()
    for name, value in wanted.adapter.items():
        torch.testing.assert_close(run.adapter[name], value, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def lone(base, tmp_path_factory):
    """Every point trained alone."""
    folder = tmp_path_factory.mktemp("alone")
    return {point: alone(base, run_of(point, folder)) for point in POINTS}


def test_rows_learn_what_they_learn_alone(base, lone, tmp_path):
    runs = [run_of(point, tmp_path) for point in POINTS]
    together = Together(base, runs, num_rows=3)
    together.finish()
    assert len(lone["long"].rows) == 20 + 3
    for run in runs:
        assert run.row.error is None
        assert run.row.result.num_steps == run.config.trainer.max_steps
        same(run, lone[run.name])
        assert max((a - b).abs().max() for a, b in pairs(run.adapter, lone["long" if run.name == "short" else "short"]))
    # the rows that were left have moved into the slots that became free
    assert together.slots["long"][0] == 1
    assert together.slots["long"][-1] == 0


def pairs(adapter, other):
    return [(adapter[name].flatten()[:9], other.adapter[name].flatten()[:9]) for name in adapter]


def test_a_slot_is_filled_again_when_a_row_is_pruned(base, lone, tmp_path):
    pruned = run_of("short", tmp_path, "trainer.logging_steps=2", stop_at=3)  # the loss of step 3 is told to nobody
    runs = [pruned, run_of("long", tmp_path), run_of("summed", tmp_path)]
    Together(base, runs, num_rows=2).finish()
    assert isinstance(pruned.row.error, Pruned)
    assert pruned.row.error.step == 3
    assert [row["step"] for row in pruned.rows] == [2]
    for run in runs[1:]:
        same(run, lone[run.name])


def test_a_row_whose_loss_is_not_finite_ends_alone(base, lone, tmp_path):
    lost = run_of("short", tmp_path, "trainer.learning_rate=1e200", "trainer.lr_scheduler_type=constant")
    runs = [lost, run_of("summed", tmp_path)]
    Together(base, runs, num_rows=2).finish()
    assert isinstance(lost.row.error, RunError)
    same(runs[1], lone["summed"])


def test_recorded_sizes_and_empty_slots_change_nothing(base, lone, tmp_path):
    runs = [run_of(point, tmp_path) for point in POINTS]
    together = Together(base, runs, num_rows=5)
    together.stack.shapes = Shapes(5, record=True)  # as on a GPU, but for the graphs
    together.finish()
    assert together.stack.shapes.width == 3
    for run in runs:
        same(run, lone[run.name])


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_what_is_not_finite_changes_no_bit_of_another_row(base, tmp_path, poison):
    found = []
    for folder, value in ((tmp_path / "a", 0.0), (tmp_path / "b", poison)):
        # the sick row tells nothing before its end, so that both stacks have the same shapes until then
        runs = [run_of("summed", folder), run_of("short", folder, "trainer.logging_steps=99", "trainer.max_steps=16")]
        together = Together(base, runs, num_rows=2)
        together.step()
        together.stack.network.adapter.master_KS[1, :40] += value
        together.finish()
        found.append(runs)
    (well, _), (beside, sick) = found
    assert isinstance(sick.row.error, RunError)
    assert [row["train/loss"] for row in beside.rows] == [row["train/loss"] for row in well.rows]
    assert all(torch.equal(beside.adapter[name], value) for name, value in well.adapter.items())


def test_padding_of_ranks_stays_zero(base, tmp_path):
    together = Together(base, [run_of("summed", tmp_path), run_of("long", tmp_path)], num_rows=2, rank=11)
    for _ in range(12):
        together.step()
    adapter, optimizer = together.stack.network.adapter, together.stack.optimizer
    for flat_KS in (adapter.master_KS, adapter.grad_KS, optimizer.m_KS, optimizer.v_KS, optimizer.total_KS):
        for k, rank in enumerate((3, 8)):
            for matrices in adapter.layout.views(flat_KS):
                assert not matrices.a_KPRD[k, :, rank:].any()
                assert not any(b[k, :, rank:].any() for b in matrices.b_KOR)
                assert matrices.a_KPRD[k, :, :rank].any()
                assert all(b[k, :, :rank].any() for b in matrices.b_KOR)


def test_the_optimizer_touches_only_the_rows_that_step(base):
    model = add_adapter(copy.deepcopy(base), config_of("short").lora, seed=0)
    network = Network(model, Memory.balanced, num_rows=3, rank=4, dropout=False, compiled=False)
    optimizer, grad = FlatAdamW(network.adapter, compiled=False), network.adapter.grad_KS
    buffers = (network.adapter.master_KS, optimizer.m_KS, optimizer.v_KS, optimizer.norm_K1)
    for buffer in buffers:
        buffer.uniform_(generator=torch.Generator().manual_seed(0))
    before = [buffer.clone() for buffer in buffers]
    grad.fill_(1.0)
    grad[0] = float("nan")
    optimizer.step([NOTHING, Update(is_first=True, number=4, learning_rate=0.1)])
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer[[0, 2]], old[[0, 2]])
        assert not torch.equal(buffer[1], old[1])
        assert buffer.isfinite().all()


@pytest.mark.parametrize("again_alone", [True, False])
def test_a_row_goes_on_from_its_own_checkpoint(base, tmp_path, again_alone):
    words = ["trainer.save_steps=2", "trainer.save_total_limit=null"]
    runs = [run_of("summed", tmp_path, *words), run_of("short", tmp_path, *words)]
    if again_alone:
        Together(base, runs, num_rows=2).finish()
    else:
        runs = [alone(base, run) for run in runs]
    for checkpoint in tmp_path.glob("*/checkpoint-*"):
        if step_of(checkpoint) > 2:
            shutil.rmtree(checkpoint)
    again = [run_of("summed", tmp_path, *words), run_of("short", tmp_path, *words)]
    if again_alone:
        again = [alone(base, run) for run in again]
    else:
        Together(base, again, num_rows=2).finish()
    for run, whole in zip(again, runs, strict=True):
        assert run.start_step == 2
        whole.rows = [row for row in whole.rows if row["step"] > 2]
        same(run, whole)


def test_what_is_saved_is_a_plain_peft_adapter(base, tmp_path):
    runs = [run_of("short", tmp_path, "trainer.save_steps=6"), run_of("summed", tmp_path)]
    together = Together(base, runs, num_rows=2)
    together.finish()
    for run in runs:
        together.model.set_adapter(run.name)
        together.model.save_pretrained(tmp_path / "saved", selected_adapters=[run.name])
        folders = [tmp_path / "saved" / run.name, *(tmp_path / run.name).glob("checkpoint-6")]
        for folder in folders:
            plain = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
            with torch.no_grad():
                found, own = (model.eval()(IDS).logits for model in (plain, together.model))
            torch.testing.assert_close(found, own, rtol=0, atol=1e-12)
            assert plain.peft_config["default"].r == run.config.lora.r
    assert not torch.equal(*(next(iter(run.adapter.values()))[:3] for run in runs))
    load_weights(tmp_path / "short" / "checkpoint-6", together.model, "short")  # complete, and of its rank


def test_gradients_of_rows_with_different_dropout_are_right(base):
    config = config_of("long")
    model = add_adapter(copy.deepcopy(base), config.lora, seed=0, name="long")
    add_named_adapter(model, "short", config_of("short").lora, seed=1)
    network = Network(model, Memory.balanced, num_rows=2, rank=8, dropout=True, compiled=False)
    for k, name in enumerate(("long", "short")):
        network.adapter.take(k, name)
    master, generator = network.adapter.master_KS, torch.Generator().manual_seed(1)
    master.copy_(torch.randn(master.shape, generator=generator, dtype=master.dtype) / 9)
    rows = [[*range(5, 12)], [*range(20, 31)]]
    streams = [stream_of([{"input_ids": row, "labels": row}]) for row in rows]
    tokens, starts, spans = joined(streams, size=12, longest=11)
    own = [
        step_keys(k, 0, 0, [scale] * network.num_keys, share) for k, (scale, share) in enumerate(((1, 0.5), (8, 0.2)))
    ]
    keys = torch.stack(own, dim=1)
    share_K = torch.tensor([0.5, 2.0], dtype=torch.float64)
    batch = Batch(tokens_3KN=tokens, starts=starts, spans=spans, longest=11, keys_PKW=keys, share_K=share_K)

    def losses():
        replay = Replay(network, record=False)
        replay.run(batch)
        return replay.losses_K

    losses()
    gradient = network.adapter.grad_KS.clone()
    for k in range(2):
        direction = torch.zeros_like(master)
        direction[k] = torch.randn(master.shape[1], generator=generator, dtype=master.dtype)
        sides = []
        for sign in (1, -1):
            master.add_(direction, alpha=sign * 1e-6)
            sides.append(losses())
            master.add_(direction, alpha=-sign * 1e-6)
        slope = (sides[0] - sides[1]) / 2e-6
        assert slope[k].item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)
        assert slope[1 - k].item() == 0  # a row's loss knows nothing of another row's adapter


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["lora.r=9"], "its rank is 9, the stack's 8"),
        (["lora.target_modules=[q_proj]"], None),
    ],
)
def test_a_row_that_the_stack_was_not_made_for_is_refused(base, tmp_path, words, reason):
    runs = [run_of("short", tmp_path), run_of("long", tmp_path, *words)]
    together = Together(base, runs, num_rows=2)
    if reason:
        with pytest.raises(ValueError, match=reason):
            together.step()
        return
    together.finish()  # a part of the layers is no harm
    same(runs[1], alone(base, run_of("long", tmp_path / "alone", *words)))


def test_sizes_suit_the_longest_row_of_each_micro_step():
    shapes = Shapes(4, record=True)
    few, many = [(100, 2), (200, 2)], [(900, 3), (30, 3), (60, 3)]
    assert shapes.plan(300, [few, many]) == [960]
    assert (shapes.size(30), shapes.size(901)) == (960, 960)
    assert shapes.segments == 3 + 4  # three rows, and 960 - 30 tokens of padding in rows of 300
    assert shapes.plan(300, [few, [(2000, 1)]]) == [2048]
    assert (shapes.size(30), shapes.size(961)) == (960, 2048)


def test_fewer_slots_are_computed_when_that_pays():
    shapes = Shapes(6, record=True)
    shapes.plan(1024, [[(1024, 1)] * 500] * 6)
    assert [shapes.settle(n, 500) for n in (6, 5, 4, 3, 2)] == [6, 6, 4, 3, 2]
    assert shapes.settle(1, 10) == 2  # it would be over before that pays
    assert shapes.settle(3, 500) == 3
    assert shapes.settle(2, 3) == 2  # known already
    unrecorded = Shapes(6, record=False)
    assert [unrecorded.settle(n, 1) for n in (6, 5, 3)] == [6, 5, 3]
