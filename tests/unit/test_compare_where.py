"""`--where` reads comparisons and nothing else."""

import pytest

from llama_lab.compare.show import Options, comparison
from llama_lab.errors import ConfigError

from .compare_runs import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    make_run(top / "a", 1.0, lora__r=8, quant__type="nf4", lora__use_dora=True, model__revision=None)
    make_run(top / "b", 2.0, lora__r=16, quant__type="nf4", lora__target_modules=["q_proj", "v_proj"])
    make_run(top / "c", 3.0, lora__r=64, quant__type="fp4", model__revision="main")
    make_run(top / "d", 3.0, status="failed", error="no and (yes)", lora__r=64)
    make_run(top / "e", None, lora__r=32, lora__init="it's")
    hydra = top / "c" / ".hydra"
    hydra.mkdir()
    # as Hydra writes it
    (hydra / "hydra.yaml").write_text(
        "hydra:\n  runtime:\n    version: 1.3.8\n    choices:\n      lora: attention\n      quant: my_fp4\n"
        "      hydra/launcher: basic\n  verbose: false\n"
    )
    return top


@pytest.mark.parametrize(
    ("text", "fitting"),
    [
        ("lora.r>=16 and quant.type=nf4", "bde"),
        ("lora.r >= 16 AND quant.type == nf4 and status=ok", "b"),
        ("lora.r<16 or lora.r>32", "acd"),
        ("not (lora.r<16 or lora.r>32)", "be"),
        ("not status=ok", "de"),
        ("status!=ok", "de"),
        ("lora.r=8 or lora.r=16 and quant.type=fp4", "a"),
        ("quant=nf4", "abde"),
        ("quant=my_fp4", "c"),
        ("lora=attention", "c"),
        ("eval_loss<=2.0", "ab"),
        ("loss<1.5", "a"),
        ("eval_loss=null", "de"),
        ("lora.use_dora=true", "a"),
        ("model.revision=null and status=ok", "ab"),
        ("model.revision=main", "c"),
        ("lora.target_modules=[q_proj,v_proj]", "b"),
        ("lora.target_modules='[q_proj, v_proj]'", "b"),
        ("note='no and (yes)'", "d"),
        ('lora.init="it\'s"', "e"),
        ("rank=16", "b"),
        ("lr>=1e-9", "abcde"),
        ("lora.r=16.0", "b"),
        ("run=A", "a"),
        ("lora.r in (8, 16)", "ab"),
        ("lora.r IN (8,64.0) and status=ok", "ac"),
        ("lora.r not in (8,16)", "cde"),
        ("not lora.r in (8) and (quant in ('my_fp4', x))", "c"),
        ("model.revision in (main, null)", "abcde"),
    ],
)
def test_expression(runs, text, fitting):
    found = comparison(Options(paths=[runs], where=text))
    assert sorted(run.name for run in found.runs) == list(fitting)
    assert (len(found.runs) < 5) == any("runs fit --where" in note for note in found.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no comparison"),
        ("lora.r", "is no comparison"),
        ("lora.r>=", "is no comparison"),
        ("lora.r>=16 and", "is no comparison"),
        ("lora.r>=16 quant=nf4", "nothing fits at 'quant'"),
        ("(lora.r>=16", "not closed"),
        ("lora.r>=16)", "nothing fits at"),
        ("lora.r>many", "many is no number"),
        ("lora.r='8", "cannot be read"),
        ("lora.rr=8", r"Did you mean lora\.r\?"),
        ("quantt=nf4", r"Did you mean quant\?"),
        ("__import__('os').system('true')", "is no comparison"),
        ("(" * 3000, "more than 2000 characters"),
        ("(" * 1000, "nested more than"),
        ("not " * 400 + "lora.r=8", "nested more than"),
        ("lora.r in 8", r"after lora\.r in stand values in parentheses: lora\.r in \(8, 16\)"),
        ("lora.r in ()", "stand values in parentheses"),
        ("lora.r not in (8", "stand values in parentheses"),
        ("lora.r in (8=9)", "stand values in parentheses"),
        ("lora.r=7777", "none of the 5 runs fits"),
    ],
)
def test_expression_that_cannot_be_read_is_one_message(runs, text, message):
    with pytest.raises(ConfigError, match=message):
        comparison(Options(paths=[runs], where=text))
