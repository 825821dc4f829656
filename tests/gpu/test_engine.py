"""What only a GPU computes: compiled pieces, attention by row, recorded graphs, and weights made whole from 4 bits.

python -m pytest tests/gpu -n 0            # on a machine with a GPU; elsewhere all of it is skipped
"""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from llama_lab.choices import Memory
from llama_lab.compose import compose_words
from llama_lab.engine.batch import Batch, joined
from llama_lab.engine.dropout import step_keys
from llama_lab.engine.network import Network
from llama_lab.engine.replay import Replay
from llama_lab.engine.stream import stream_of
from llama_lab.lora import add_adapter, add_named_adapter
from llama_lab.model import load_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(path)
    return path


def model_of(folder, dropout, ranks=(16,)):
    """An NF4 base with an adapter for each rank, named row0, row1 and so on; their B is not 0."""
    words = ["model=llama2_7b", f"model.name={folder}", "quant=nf4", "quant.double_quant=true", "lora=all_linear"]
    configs = [compose_words([*words, f"lora.r={rank}", f"lora.dropout={dropout}"]) for rank in ranks]
    model = add_adapter(load_base(configs[0].model, configs[0].quant, dense=False), configs[0].lora, seed=0)
    for i, config in enumerate(configs):
        add_named_adapter(model, f"row{i}", config.lora, seed=i)
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model


def streams(num):
    generator = torch.Generator().manual_seed(2)
    rows = [[torch.randint(3, 2048, (n,), generator=generator).tolist() for n in (90, 37, 129)] for _ in range(num)]
    return [stream_of([{"input_ids": row, "labels": row} for row in of]) for of in rows]


def batch_of(found, num, shares):
    """The same micro-batch every time; row k has keys of seed k."""
    tokens, starts, spans = joined(streams(num), size=320, longest=129)
    keys = torch.stack([step_keys(k, 0, 0, [0.5] * found.num_keys, shares[k]) for k in range(num)], dim=1)
    share_K = torch.tensor([1 / stream.num_learned for stream in streams(num)])
    return Batch(tokens_3KN=tokens, starts=starts, spans=spans, longest=129, keys_PKW=keys, share_K=share_K)


def network(model, names, memory, *, compiled, rank=16):
    found = Network(model, memory, num_rows=len(names), rank=rank, dropout=True, compiled=compiled)
    for k, name in enumerate(names):
        found.adapter.take(k, name)
    return found


def losses_and_gradients(found, batch, *, record=False, times=1):
    replay = Replay(found, record=record)
    for _ in range(times):
        replay.losses_K.zero_()
        replay.run(batch)
    return replay.losses_K.tolist(), found.adapter.grad_KS.float().clone()


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()


@pytest.mark.parametrize("memory", list(Memory))
def test_compiled_and_recorded_it_computes_the_same(folder, memory):
    if memory is Memory.auto:
        pytest.skip("a level is chosen before")
    model = model_of(folder, 0.3)
    plain = network(model, ["row0"], Memory.balanced, compiled=False)
    wanted, gradient = losses_and_gradients(plain, batch_of(plain, 1, [0.3]))
    plain.adapter.release(0, "row0")
    found = network(model, ["row0"], memory, compiled=True)
    batch = batch_of(found, 1, [0.3])
    losses, again = losses_and_gradients(found, batch, record=True, times=3)
    assert losses == pytest.approx(wanted, rel=2e-3)
    assert cosine(gradient, again) > 0.999


def test_gradients_are_pefts(folder):
    model = model_of(folder, 0.0)
    model.set_adapter("row0")
    (stream,) = streams(1)
    loss, start = torch.zeros((), device="cuda"), 0
    for length in stream.lengths:
        ids = stream.tokens[:1, start : start + length].cuda()
        loss = loss + model(input_ids=ids, labels=ids).loss * (length - 1) / stream.num_learned
        start += length
    loss.backward()
    found = network(model, ["row0"], Memory.balanced, compiled=True)
    layers = [layer for layers in found.lora for layer in layers]
    wanted = [m["row0"].weight.grad.float().flatten() for layer in layers for m in (layer.lora_A, layer.lora_B)]
    batch = batch_of(found, 1, [0.0])
    batch.keys_PKW = step_keys(0, 0, 0, [layer.scaling["row0"] for layer in layers], 0.0)[:, None]
    losses, gradient = losses_and_gradients(found, batch)
    assert losses[0] == pytest.approx(loss.item(), rel=2e-3)
    assert cosine(_flat(found, gradient, 0, "row0"), torch.cat(wanted)) > 0.99


def test_rows_of_a_stack_are_what_they_are_alone(folder):
    ranks, shares = (8, 16, 32), [0.0, 0.1, 0.3]
    model = model_of(folder, 0.1, ranks)
    names = [f"row{k}" for k in range(3)]
    together = network(model, names, Memory.balanced, compiled=True, rank=32)
    losses, gradients = losses_and_gradients(together, batch_of(together, 3, shares), record=True, times=3)
    kept = [_flat(together, gradients, k, name) for k, name in enumerate(names)]
    for k, name in enumerate(names):
        together.adapter.release(k, name)
    for k, name in enumerate(names):
        alone = network(model, [name], Memory.balanced, compiled=True, rank=ranks[k])
        batch = batch_of(alone, 3, shares)
        own = Batch(
            tokens_3KN=batch.tokens_3KN[:, k : k + 1].contiguous(),
            starts=joined([streams(3)[k]], size=320, longest=129)[1],
            spans=joined([streams(3)[k]], size=320, longest=129)[2],
            longest=129,
            keys_PKW=batch.keys_PKW[:, k : k + 1].contiguous(),
            share_K=batch.share_K[k : k + 1],
        )
        loss, gradient = losses_and_gradients(alone, own)
        assert loss[0] == pytest.approx(losses[k], rel=2e-3)
        assert cosine(_flat(alone, gradient, 0, name), kept[k]) > 0.999
        alone.adapter.release(0, name)


def _flat(found, gradients, k, name):
    return torch.cat([m.flatten() for m in found.adapter.matrices(gradients, k, name)])


def test_fewer_adapters_compile_nothing_again(folder):
    model = model_of(folder, 0.3, (8, 16, 16, 8))
    found = network(model, [f"row{k}" for k in range(4)], Memory.balanced, compiled=True)
    known = 0
    for num_adapters in (4, 3, 1, 2):
        losses_and_gradients(found, batch_of(found, num_adapters, [0.3] * num_adapters))
        number = counters["stats"]["unique_graphs"]
        assert known in (0, number), f"{number - known} compiled again for {num_adapters} adapters"
        known = number
    for k in range(4):
        found.adapter.release(k, f"row{k}")
