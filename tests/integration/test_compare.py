"""`compare` and `diff` as they are typed, and the page in a real browser."""

import copy
import json
import random
import re
import signal
import urllib.request

import optuna
import pytest

from llama_lab.compare.find import find_runs
from llama_lab.sweep.storage import open_storage, storage_address
from tests.unit.compare_runs import make_run, tiny_lock

from .browser import CHROMIUM, Browser

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><b>bold</b>%{x}"
READY = "document.body && document.body.dataset.ready === 'yes'"


def evil_study(top):
    """18 runs that ended well and five that did not; their names, settings, errors and samples hold tags."""
    draw = random.Random(0)
    for number in range(18):
        lock = copy.deepcopy(tiny_lock()) | {"overrides": [EVIL], "note": EVIL}
        lock["code"] = {"commit": "c", "diff": EVIL * 200}
        r, rate = draw.choice([4, 8, 16]), 10 ** draw.uniform(-5, -3)
        settings = {"lora__r": r, "trainer__learning_rate": rate, "model__chat_template": EVIL if number % 2 else "x"}
        result = {"peak_memory_gib": 1 + r / 4, "tokens_per_s": 5000 / r}
        loss = 1 + abs(rate - 2e-4) * 1000 + draw.random() / 10
        folder = make_run(
            top / f"{number} <script>x<b>", loss, lock=lock, result=result, tracking__name=EVIL, **settings
        )
        (folder / "samples.md").write_text(
            f"# The same\n\n## {EVIL}\n\nBefore:\n\n```\n{EVIL}\n```\n\nAfter:\n\n````\n```\nafter {number}\n````\n"
        )
    for status in ("failed", "pruned", "infeasible"):
        make_run(top / status, 1.0, status=status, error=EVIL, lora__r=4)
    make_run(top / "killed", None, lora__r=4)
    (make_run(top / "broken", 1.0) / "result.json").write_text('{"status": "o')
    return top


@pytest.fixture(scope="module")
def report(lab, tmp_path_factory):
    """The page of `evil_study`."""
    folder = tmp_path_factory.mktemp("report")
    done = lab("compare", evil_study(folder / "study"), "--html", "report.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "shows 23 runs" in done.stdout
    return folder / "report.html"


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    """The page in a browser."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        browser.open(report, READY)
        yield browser
    finally:
        browser.close()


def test_page_draws_all_figures_without_an_error_and_without_the_network(page, report):
    for figure, mark in (("curves", ".scatterlayer .trace"), ("scatter", ".point"), ("importance", ".bars .point")):
        assert page.value(f"document.querySelectorAll('#{figure} {mark}').length") > 0, figure
    assert page.value("document.querySelectorAll('#parallel canvas').length") > 0
    assert page.value("document.querySelectorAll('#parallel .axis').length") >= 5
    assert page.errors == []
    assert page.requests in ([], [report.as_uri()])
    buttons = page.value("[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert "Zoom" in buttons
    assert "Share chart..." not in buttons  # Plotly would upload the figure


def test_no_text_is_read_as_a_tag(page, report):
    assert page.value("window.hacked") is None
    assert page.value("document.querySelectorAll('img, #runs b, #samples-table b, svg b, svg script').length") == 0
    assert page.value("document.querySelector('#runs tbody').textContent.includes('</script><script>')")
    assert page.value("document.querySelector('#samples-table tbody').textContent.includes('<img src=x')")
    assert page.value("document.querySelector('#curves .legendtext').textContent").endswith(" <script>x<b>")
    assert EVIL not in report.read_text()


def column(page, key):
    return page.value(
        f"(() => {{ const at = [...document.querySelectorAll('th.head')].findIndex((h) => h.dataset.key === '{key}');"
        "return [...document.querySelectorAll('#runs tbody tr')].map((row) => row.children[at].textContent) })()"
    )


def test_table_is_sorted_by_a_click_and_filtered(page):
    assert column(page, "rank") == [*map(str, range(1, 19)), *[""] * 5]
    page.value("document.querySelector('th.head[data-key=\"lora.r\"]').click()")
    ranks = [int(value) for value in column(page, "lora.r")]
    assert ranks == sorted(ranks)
    page.value("document.querySelector('th.head[data-key=\"lora.r\"]').click()")
    assert [int(value) for value in column(page, "lora.r")] == ranks[::-1]
    typed = "f.value = '{}'; f.dispatchEvent(new Event('input'))"
    at = "const f = document.querySelector('input[aria-label=\"filter {}\"]'); "
    page.value("(() => {" + at.format("lora.r") + typed.format(">=8") + "})()")
    assert set(column(page, "lora.r")) == {"8", "16"}
    page.value("(() => {" + at.format("lora.r") + typed.format("") + "})()")
    page.value("(() => {" + at.format("status") + typed.format("infeas") + "})()")
    assert column(page, "status") == ["infeasible"]
    page.value("(() => {" + at.format("status") + typed.format("") + "})()")
    assert sorted(set(column(page, "status"))) == ["broken", "failed", "infeasible", "interrupted", "ok", "pruned"]
    assert page.errors == []


def test_curves_are_coloured_by_a_setting_and_say_their_run_under_the_mouse(page):
    press = "(() => {{ const gd = document.getElementById('curves'); const b = gd.layout.updatemenus[0].buttons"
    press += ".find((b) => b.label === '{}'); return Plotly.restyle(gd, ...b.args).then(() => 1) }})()"
    page.value(press.format("lora.r"))
    legend = page.value("[...document.querySelectorAll('#curves .legendtext')].map((t) => t.textContent)")
    assert sorted(legend, key=int) == ["4", "8", "16"]
    page.value("(() => { Plotly.Fx.hover('curves', [{ curveNumber: 0, pointNumber: 1 }]) })()")
    told = page.value("document.querySelector('#curves .hoverlayer').textContent")
    assert "<script>x<b>" in told
    assert "lora.r=" in told
    assert page.errors == []


def test_samples_and_locks_of_the_page(page):
    choose = "(() => {{ const s = document.getElementById('samples-runs'); "
    choose += "[...s.options].forEach((o, at) => o.selected = {}); s.dispatchEvent(new Event('change')) }})()"
    page.value(choose.format("at < 3"))
    heads = page.value("[...document.querySelectorAll('#samples-table th')].map((h) => h.textContent)")
    assert heads[:2] == ["prompt", "before"]
    assert len(heads) == 5
    cells = page.value("[...document.querySelectorAll('#samples-table td')].map((h) => h.textContent)")
    assert cells[:2] == [EVIL, EVIL]
    assert cells[2].startswith("```\nafter ")
    page.value("document.querySelector('#locks details').open = true; 1")
    page.value("new Promise((done) => setTimeout(done, 100))")
    lock = json.loads(page.value("document.querySelector('#locks details pre').textContent"))
    assert lock["note"] == EVIL
    assert "more characters in" in lock["code"]["diff"]


def test_page_of_200_long_runs_is_under_5_mb(lab, tmp_path):
    draw = random.Random(0)
    for number in range(200):
        folder = make_run(tmp_path / "runs" / str(number), 1 + draw.random(), seed=number % 4, lora__r=number // 4 + 1)
        lines = [{"step": n, "train/loss": draw.random(), "train/grad_norm": draw.random()} for n in range(1000)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = " ".join(str(draw.random()) for _ in range(30))
        (folder / "samples.md").write_text("".join(f"## {n}\n\nAfter:\n\n```\n{text}\n```\n\n" for n in range(3)))
    done = lab("compare", "runs", "--html", "out/report.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size < 5_000_000


def test_compare_of_a_real_run_shows_its_numbers_and_is_alone(lab, tiny_run):
    done = lab("compare", tiny_run, cwd=tiny_run.parent)
    assert done.returncode == 0, done.stderr
    (run,), _ = find_runs([tiny_run])
    assert f"{run.numbers['eval_loss']:.4g}" in done.stdout
    assert "1 runs: 1 ok" in done.stdout
    assert "the only one that has ended well" in done.stdout
    assert run.choices["quant"] == "nf4"
    assert run.choices["lora"] == "all_linear"


def test_table_of_the_command_line_and_its_formats(lab, tmp_path):
    top = evil_study(tmp_path / "study")
    done = lab("compare", top, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("failed", "pruned", "infeasible", "interrupted", "broken", "23 runs: 18 ok"):
        assert word in done.stdout
    told = json.loads(lab("compare", top, "--format", "json", "--where", "lora.r>=8", cwd=tmp_path).stdout)
    assert {row["settings"]["lora.r"] for row in told["rows"]} <= {8, 16}
    both = lab("compare", "diff", top / "killed", top / "broken", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert "lora.r" in both.stdout


def test_dashboard_serves_a_study_on_the_loopback_address(lab, tmp_path):
    pytest.importorskip("optuna_dashboard")
    study = optuna.create_study(storage=open_storage(storage_address(None, tmp_path / "study")), study_name="mine")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    process = lab.start("dashboard", "study", cwd=tmp_path)
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert "mine" in urllib.request.urlopen(f"{address}api/studies", timeout=20).read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dashboard", "empty"], "empty is no folder of a study: there is no study.journal in it."),
        (["dashboard", "emty"], "emty: there is no such folder. Did you mean empty?"),
        (["compare"], "the following arguments are required: PATH. See: python -m llama_lab compare --help"),
        (["compare", "nowhere"], "nowhere: there is no such folder."),
        (["compare", "empty"], "No run lies in or below empty."),
        (["compare", "runs", "--where", "lora.rr=8"], "Did you mean lora.r?"),
        (["compare", "runs", "--where", "lora.r>>8"], "is no comparison"),
        (["compare", "runs", "--sort", "eval_los"], "Did you mean eval_loss?"),
        (["compare", "runs", "--format", "xml"], "xml is no choice"),
        (["compare", "runs", "--htm", "x"], "--htm is no flag here. Did you mean --html?"),
        (["compare", "runs", "--live", "--html", "x"], "Leave --html, --wandb-report and --format out."),
        (["compare", "runs", "--html", "runs"], "--html runs is there already, and no page of llama_lab's"),
        (["diff", "runs"], "the following arguments are required: B"),
        (["diff", "runs/a", "runs/bb"], "runs/bb: there is no such folder. Did you mean runs/b?"),
        (["diff", "runs", "runs/a"], "holds 2 runs, and diff takes one."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_words_are_one_message(lab, tmp_path_factory, words, message):
    folder = tmp_path_factory.mktemp("wrong")
    make_run(folder / "runs" / "a")
    make_run(folder / "runs" / "b", lora__r=4)
    (folder / "empty").mkdir()
    done = lab(*words, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
