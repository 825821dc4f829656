"""One study from its first trial to its last: slots that launch, a board that shows, files that say what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from omegaconf import OmegaConf

from llama_lab.errors import RunError
from llama_lab.sweep.confirm import confirm, show_confirmed
from llama_lab.sweep.design import Design
from llama_lab.sweep.driver import Driver, Launch, make_driver
from llama_lab.sweep.files import BEST, TRIALS, StudyFiles, best_command, winning_words, words_command
from llama_lab.sweep.methods import PrunerName
from llama_lab.sweep.rows import Row, ranked, row_of
from llama_lab.sweep.show import Board, show_end, study_console
from llama_lab.sweep.storage import in_use, open_storage
from llama_lab.sweep.study import SweepStudy, open_study
from llama_lab.sweep.study_run import RUN_ID, log_study
from llama_lab.sweep.words import trial_words


def drive(design: Design, launch: Launch) -> float:
    """Run the study; the best value of its first objective.

    Raises:
        RunError: the study is another one's, hopeless, none of its trials ended well, or its storage cannot be used.
    """
    with in_use(design.storage):
        return _drive(design, launch)


def _drive(design: Design, launch: Launch) -> float:
    study = _open(design)
    OmegaConf.save(launch.tree, design.folder / "multirun.yaml")
    board = Board(console=study_console(), design=design, n_trials=study.n_trials)
    driver = make_driver(design, study, launch, lambda found: trial_words(design, found, launch.tree), board.note)
    files = StudyFiles(design, launch.context.config_loader)
    with _interruptible(board):
        board.start(_rows(study))
        _say_what_is_measured(design, launch, board)

        def show() -> None:
            rows = _rows(study)
            board.update(rows)
            files.update(rows)

        driver.run(show)
        board.stop()
        rows = _rows(study)
        show_end(board.console, design, study.study, rows)
        _check_end(driver, rows)
        best = _confirmed(design, study, ranked(rows, design.directions), launch, board)
        files.write_best(best[0])
        if driver.ended or RUN_ID not in study.study.user_attrs:
            for line in log_study(design, study.study, rows, best[0], launch.configs[0].tracking):
                board.note(line)
    board.note(f"Files:       {design.folder}/{TRIALS}, {BEST}, and a folder a trial")
    board.note(f"The winner:  {best_command(design)}")
    board.note(f"In words:    {words_command(design, winning_words(design, best[0]))}")
    return best[0].values[0]


def _open(design: Design) -> SweepStudy:
    study = open_study(
        design.settings.study_name,
        open_storage(design.storage),
        design.settings,
        design.space,
        directions=design.directions,
        n_trials=design.settings.n_trials,
        given=design.baselines,
    )
    study.check_same(design.identity, str(design.folder))
    design.folder.mkdir(parents=True, exist_ok=True)
    return study


def _say_what_is_measured(design: Design, launch: Launch, board: Board) -> None:
    pruner = design.settings.pruner
    if pruner.name is PrunerName.none or all(run.trainer.eval_steps is not None for run in launch.configs):
        return
    if factor := pruner.factor:
        first = f"{pruner.min_resource}" if pruner.min_resource else f"1/{pruner.num_measurements} of the"
        said = f"at its rungs, after {first} steps and from there at {factor} times as many each"
    else:
        said = f"{pruner.num_measurements} times in a trial"
    board.note(f"trainer.eval_steps is null: for the pruner the held-out loss is measured {said}.")


def _confirmed(design: Design, study: SweepStudy, best: list[Row], launch: Launch, board: Board) -> list[Row]:
    """The best trials in the order that other seeds give, where the study asks for them."""
    if not design.settings.confirm:
        return best
    num = min(design.settings.confirm, len(best))
    board.note(f"Training the best {num} again with {design.settings.confirm_seeds} other seeds each.")
    confirmed = confirm(design, study, best, launch, board.note)
    show_confirmed(board.console, design, confirmed)
    return [c.row for c in confirmed] or best


def _rows(study: SweepStudy) -> list[Row]:
    return [row_of(trial) for trial in study.trials()]


def _check_end(driver: Driver, rows: Sequence[Row]) -> None:
    failed = driver.failed()
    if driver.is_hopeless():
        raise RunError(
            f"{len(failed)} of the {len(driver.ended)} trials of this start failed, and hydra.sweeper.max_failure_rate "
            f"is {driver.study.settings.max_failure_rate:g}. The first: trial {failed[0].number}: {failed[0].error} "
            "Mend it and type the same command, or hydra.sweeper.max_failure_rate=1 to go on regardless."
        )
    if not any(row.state == "done" for row in rows):
        first = next((row for row in rows if row.error), None)
        reason = f" The first: trial {first.number}: {first.error}" if first else ""
        raise RunError(f"None of the {len(rows)} trials ended well.{reason} What each printed is in its output.log.")


@contextmanager
def _interruptible(board: Board) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise KeyboardInterrupt("The same command goes on with the study.") from None
    finally:
        board.stop()
