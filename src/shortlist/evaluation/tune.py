"""Search for settings by their validation NDCG@k, with the same effort for every arm; the test window is never read.

    OUT/trials.jsonl     every finished trial as it ended: a search that was stopped, or given a larger budget, goes on from there
    OUT/tune.json        all of it with the best, the command and the surroundings
    OUT/best.toml        the best settings of all arms, for `shortlist train --config`; best-NAME.toml of each arm where there are several
    OUT/trials.png       score per trial

An arm is one system, or the whole cascade. A retriever stands alone and searches the whole catalogue; a ranker takes the ranking stage
alone, behind the retrieval of the run, and the page is its order; without a system, the page of the whole cascade counts. The first trial
of an arm has the settings as they are. Further ones come from the tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011) of
Optuna: a function of seed, number and the trials before, so that a search that was stopped ends as one that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shortlist.cascade.build import train_unsaved
from shortlist.cascade.config import RunConfig
from shortlist.cascade.fitting import check_fits
from shortlist.cascade.lessons import full_ranking_score, sample
from shortlist.cascade.sharing import Shared, fingerprint
from shortlist.data.dataset import Dataset
from shortlist.errors import ConfigError
from shortlist.evaluation.evidence import surroundings, write_json
from shortlist.evaluation.runs import counted
from shortlist.evaluation.tables import aligned
from shortlist.evaluation.tuning_space import Choice, as_text, current, refuse_unused, space_of
from shortlist.extras import library
from shortlist.registry import find
from shortlist.training.trainer import Diverged

CASCADE = "cascade"
"""Name of the arm that is the whole cascade."""
TRIALS, RESULT, BEST, PLOT, WORK = "trials.jsonl", "tune.json", "best.toml", "trials.png", "work"
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What every arm may spend: trials, seconds, or whichever ends first."""

    trials: int | None = None
    """The one with the settings as they are included."""
    seconds: float | None = None
    """Of trials, pauses not counted; a trial under way is finished."""

    def __post_init__(self) -> None:
        if self.trials is None and self.seconds is None:
            raise ConfigError("tuning needs a budget: give trials, minutes or both")
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"trials must be at least 1, got {self.trials}")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"minutes must be above 0, got {self.seconds / 60:g}")

    def allows(self, trials: Sequence[Trial]) -> bool:
        """Whether one more trial may begin."""
        spent = sum(trial.seconds for trial in trials)
        few = self.trials is None or len(trials) < self.trials
        return not trials or (few and (self.seconds is None or spent < self.seconds))

    def __str__(self) -> str:
        parts = [f"{self.trials:,} trials"] if self.trials is not None else []
        parts += [f"{self.seconds:g} s"] if self.seconds is not None else []
        return " or ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One set of settings and what it reached."""

    arm: str
    number: int
    """0 has the settings as they are."""
    settings: Mapping[str, str]
    """By path, as `--set` takes them."""
    params: Mapping[str, Any]
    """The same as the estimator knows them; what lies outside its range is left out."""
    score: float | None
    """Validation NDCG@k; None where the trial failed."""
    seconds: float
    error: str | None = None
    """Why it failed: settings that do not go together, or a loss that became infinite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One system, or the whole cascade, with what is tried for it."""

    name: str
    config: RunConfig
    space: tuple[Choice, ...]

    def settings(self, params: Mapping[str, Any]) -> dict[str, str]:
        """The estimator's values as `--set` takes them."""
        return {choice.path: choice.text(params[choice.path]) for choice in self.space}

    def with_settings(self, settings: Mapping[str, str]) -> RunConfig:
        """The arm's run with other settings; ConfigError where they do not go together."""
        return self.config.override(*(f"{path}={text}" for path, text in settings.items()))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A finished search."""

    arms: tuple[Arm, ...]
    trials: tuple[Trial, ...]
    budget: Budget
    seed: int
    k: int
    requests: int
    """Validation requests behind every score."""
    command: str = ""
    ranked: Mapping[str, list[Trial]] = field(init=False)
    """By arm, best first; failed ones last, equals as they came."""

    def __post_init__(self) -> None:
        ranked = {
            arm.name: sorted(
                (t for t in self.trials if t.arm == arm.name),
                key=lambda t: (t.score is None, -(t.score or 0.0), t.number),
            )
            for arm in self.arms
        }
        object.__setattr__(self, "ranked", ranked)

    def best_of(self, arm: Arm) -> RunConfig:
        """The arm's best run; settings as they are where nothing was better."""
        best = self.ranked[arm.name][0]
        return arm.config if best.number == 0 else arm.with_settings(best.settings)

    @property
    def best_arm(self) -> Arm:
        """The arm with the best trial; the first of equals."""
        return max(self.arms, key=lambda arm: self.ranked[arm.name][0].score or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "objective": f"ndcg@{self.k} on {self.requests:,} requests of the validation window; the test window was not read",
            "effort": f"{self.budget} for each arm, the settings as they are first",
            "budget": asdict(self.budget),
            "seed": self.seed,
            "command": self.command,
            "best": self.best_arm.name,
            "arms": [
                {
                    "name": arm.name,
                    "stages": {stage.name: list(stage.systems) for stage in arm.config.stages},
                    "space": {choice.path: str(choice) for choice in arm.space},
                    "seconds": round(sum(t.seconds for t in self.ranked[arm.name]), 2),
                    "best": asdict(self.ranked[arm.name][0]),
                    "defaults": next(asdict(t) for t in self.ranked[arm.name] if t.number == 0),
                    "trials": [asdict(t) for t in self.trials if t.arm == arm.name],
                }
                for arm in self.arms
            ],
            **surroundings(),
        }


def arm_config(config: RunConfig, name: str | None) -> RunConfig:
    """The run in which an arm is judged; see the top of this file.

    Args:
        config: with stages. Settings of systems and trainers that it names are kept; a ranker without a [trainer.NAME] is trained as the
            one whose place it takes.
        name: as the config or the registry has it; None = the whole cascade.

    Raises ConfigError: no such system, or one that does not act in a cascade, or no stage for it.
    """
    if name is None:
        return config
    table = config.to_table()
    kind = config.systems[name].entry.kind if name in config.systems else find(name).kind
    stages: dict[str, Any] = table["stages"]
    kinds = {stage.name: config.systems[stage.systems[0]].entry.kind for stage in config.stages}
    if kind == "retriever":
        table["stages"] = {config.stages[0].name: {"systems": [name]}}
    elif kind in ("ranker", "reranker"):
        at = [n for n, (stage, its) in enumerate(kinds.items()) if its == kind]
        if not at:
            raise ConfigError(f"{name} is a {kind}, and no stage of the run has one; give --config with a stage for it")
        names = list(kinds)[: at[-1] + 1]
        before = table["trainer"].get(stages[names[-1]]["systems"][0])
        if isinstance(before, Mapping):
            table["trainer"].setdefault(name, before)
        table["stages"] = {n: stages[n] for n in names[:-1]} | {names[-1]: {"systems": [name]}}
    else:
        raise ConfigError(f"{name} is a {kind} and can not act in a cascade; tune a retriever, a ranker or a re-ranker")
    used = {n for stage in table["stages"].values() for n in stage["systems"]}
    table["systems"] = {n: values for n, values in table["systems"].items() if n in used}
    table["trainer"] = {n: v for n, v in table["trainer"].items() if not isinstance(v, Mapping) or n in used}
    return RunConfig.from_table(table)


def make_arms(
    config: RunConfig,
    names: Sequence[str],
    ranges: Mapping[str, str | Mapping[str, str]],
    *,
    only: bool = False,
) -> tuple[Arm, ...]:
    """The arms of a search; none named = the whole cascade. ConfigError as `arm_config` and `space_of`, and for a range of no arm."""
    if len(set(names)) < len(names):
        raise ConfigError(f"a system is named twice: {', '.join(names)}")
    wanted: list[str | None] = list(names) or [None]
    configs = {name or CASCADE: (arm_config(config, name), name) for name in wanted}
    refuse_unused(ranges, configs)
    return tuple(
        Arm(name=label, config=own, space=space_of(own, system, ranges, only=only))
        for label, (own, system) in configs.items()
    )


def tune(
    dataset: Dataset,
    arms: Sequence[Arm],
    out: Path,
    *,
    budget: Budget,
    seed: int = 0,
    command: str = "",
    fresh: bool = False,
    say: Say = lambda line: None,
    progress: bool = False,
) -> Tuning:
    """Search, arm by arm in turn so that a machine that slows down slows all alike, and write what the top of this file lists.

    Args:
        dataset: built with the arms' data settings.
        out: folder of the search; one of other arms, ranges or data that stands there is refused.
        budget: of each arm.
        seed: of the estimator; training has its own in `trainer.seed`.
        fresh: forget the trials found in `out`.
        say: a line per trial.
        progress: also show the trainings.

    Raises:
        ConfigError: `out` holds something else; a system the log can not serve; the settings as they are do not work.
        TrainingInterrupted, KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    optuna = library("optuna", extra="tune", user="shortlist tune")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for arm in arms:
        check_fits(arm.config, dataset)
    trials = _open(out, dataset, arms, seed, fresh)
    if trials:
        say(f"{len(trials):,} finished trials found in {out}; the search goes on from there")
    shared = Shared()  # a trial changes little: what it leaves alone is not made again
    progressed = True
    while progressed:
        progressed = False
        for arm in arms:
            mine = [trial for trial in trials if trial.arm == arm.name]
            if budget.allows(mine):
                trial = _next(optuna, dataset, arm, mine, out / WORK, seed, progress, shared)
                _keep(out, trial)
                trials.append(trial)
                say(_line(trial, [*mine, trial], budget))
                progressed = True
    learning = arms[0].config.learning
    tuning = Tuning(
        arms=tuple(arms),
        trials=tuple(trials),
        budget=budget,
        seed=seed,
        k=arms[0].config.surface.k,
        requests=min(len(dataset.split.valid), learning.valid_requests),
        command=command,
    )
    _write(tuning, out)
    return tuning


def table_text(tuning: Tuning, most: int = 10) -> str:
    """The best trials of every arm, best first, and where the settings as they are stand."""
    blocks = []
    for arm in tuning.arms:
        ranked = tuning.ranked[arm.name]
        shown = ranked[:most] + [t for t in ranked[most:] if t.number == 0]
        heads = [choice.path.removeprefix("trainer.").removeprefix(f"{arm.name}.") for choice in arm.space]
        rows = [[arm.name, f"ndcg@{tuning.k}", "seconds", *heads]]
        for trial in shown:
            name = f"{trial.number} (defaults)" if trial.number == 0 else str(trial.number)
            score = "failed" if trial.score is None else f"{trial.score:.4f}"
            cells = [_short(trial.settings.get(choice.path, "")) for choice in arm.space]
            rows.append([name, score, f"{trial.seconds:.1f}", *cells])
        spent = sum(trial.seconds for trial in ranked)
        failed = sum(trial.score is None for trial in ranked)
        note = f"{len(ranked):,} trials in {spent:.1f} s" + (f", {failed} failed" if failed else "")
        blocks.append("\n".join([*aligned(rows), note]))
    effort = f"Each arm had {tuning.budget}. " if len(tuning.arms) > 1 else ""
    blocks.append(
        f"{effort}Scores are of {tuning.requests:,} validation requests, on which the best was chosen, and so a little too good; "
        "the test window was not read."
    )
    return "\n\n".join(blocks)


# -- trials -----------------------------------------------------------------------------------------------------------


def _next(
    optuna: Any,
    dataset: Dataset,
    arm: Arm,
    trials: Sequence[Trial],
    work: Path,
    seed: int,
    progress: bool,
    shared: Shared,
) -> Trial:
    """The arm's next trial, run."""
    number = len(trials)
    if number == 0:
        now = {choice.path: current(arm.config, choice) for choice in arm.space}
        params = {c.path: c.holds(now[c.path]) for c in arm.space if c.holds(now[c.path]) is not None}
        settings = {path: as_text(value) for path, value in now.items()}
    else:
        params = _suggest(optuna, arm, trials, seed)
        settings = arm.settings(params)
    began = time.perf_counter()
    before = _stopped(work, arm, number)
    score, error = None, None
    try:
        score = judge(
            dataset,
            arm.config if number == 0 else arm.with_settings(settings),
            work / arm.name,
            progress,
            first=number == 0,
            shared=shared,
        )
    except (ConfigError, Diverged) as failed:
        if number == 0:
            raise
        error = str(failed)
    except KeyboardInterrupt:
        spent = {"number": number, "seconds": before + time.perf_counter() - began}
        write_json(work / f"{arm.name}.stopped.json", spent)
        raise
    seconds = before + time.perf_counter() - began
    return Trial(
        arm=arm.name,
        number=number,
        settings=settings,
        params=params,
        score=score,
        seconds=round(seconds, 3),
        error=error,
    )


def _stopped(work: Path, arm: Arm, number: int) -> float:
    """Seconds that the same trial had already taken when it was stopped."""
    try:
        spent = json.loads((work / f"{arm.name}.stopped.json").read_text())
    except (OSError, ValueError):
        return 0.0
    return float(spent["seconds"]) if spent["number"] == number else 0.0


def _suggest(optuna: Any, arm: Arm, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """What the estimator would try next, given the finished trials."""
    ranges = {choice.path: _distribution(optuna, choice) for choice in arm.space}
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(trials)) % (1 << 32))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    states = optuna.trial.TrialState
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(trial.params),
                distributions={path: ranges[path] for path in trial.params},
                value=trial.score,
                state=states.FAIL if trial.score is None else states.COMPLETE,
            )
        )
    asked: dict[str, Any] = study.ask(ranges).params
    return asked


def _distribution(optuna: Any, choice: Choice) -> Any:
    kinds = optuna.distributions
    if choice.values:
        return kinds.CategoricalDistribution(choice.values)
    if choice.whole:
        return kinds.IntDistribution(int(choice.low), int(choice.high), log=choice.log)
    return kinds.FloatDistribution(choice.low, choice.high, log=choice.log)


def judge(
    dataset: Dataset,
    config: RunConfig,
    work: Path,
    progress: bool = False,
    *,
    first: bool = True,
    shared: Shared | None = None,
) -> float:
    """Validation NDCG@k of a run: of its page, which for a retriever alone is its full ranking.

    A single retriever that only counts is counted on what stands before the validation window and asked; all else is trained as a run is.
    What the first trial trained is kept in `work`: what no trial changes, such as the retrieval before a ranker, is trained once. What
    only counts, and what rankers learn from, is kept in `shared`. Nothing else is written: a trial is measured, not served.
    """
    (only, *others) = config.systems.values()
    k = config.surface.k
    if not others and len(config.stages) == 1 and only.entry.cls.feed is None and config.learning.refresh:  # type: ignore[attr-defined]
        system = counted(only.entry, dataset, "valid", {f: getattr(only.settings, f) for f in _names(only.settings)})
        asked = sample(dataset.split.valid, config.learning.valid_requests, config.trainer.seed)
        with torch.no_grad():
            return full_ranking_score(system, dataset, asked, k)
    state = work / "run.training"
    kept = {path.name for path in state.glob("*")}
    run = train_unsaved(dataset, config, state, progress=progress, shared=shared)
    if not first:
        for path in state.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
    return float(run.metrics["validation"][f"ndcg@{k}"])


def _names(settings: Any) -> list[str]:
    return list(settings.__dataclass_fields__)


# -- files ------------------------------------------------------------------------------------------------------------


def _open(out: Path, dataset: Dataset, arms: Sequence[Arm], seed: int, fresh: bool) -> list[Trial]:
    """The folder made ready, and the trials of the same search that it holds."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / TRIALS
    searched = fingerprint(
        [dataset.schema.to_toml(), dataset.plan.now, dataset.histories.num_events, seed],
        [[arm.name, arm.config.to_toml(), [asdict(choice) for choice in arm.space]] for arm in arms],
    )
    if fresh:
        path.unlink(missing_ok=True)
        shutil.rmtree(out / WORK, ignore_errors=True)
    if not path.exists():
        others = [
            other.name for other in out.iterdir() if other.name not in (RESULT, PLOT, WORK) and other.suffix != ".toml"
        ]
        if others:
            raise ConfigError(f"{out} holds {others[0]}, which is of no search; choose another folder")
        path.write_text(json.dumps({"search": searched}) + "\n")
        return []
    lines = path.read_text().splitlines()
    try:
        head = json.loads(lines[0])["search"]
        rows = [json.loads(line) for line in lines[1:]]
        trials = [Trial(**row) for row in rows]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it, or start anew with --fresh") from error
    if head != searched:
        raise ConfigError(
            f"{out} holds a search of other systems, ranges, settings or data; choose another folder, or start anew with --fresh"
        )
    return trials


def _keep(out: Path, trial: Trial) -> None:
    with (out / TRIALS).open("a") as file:
        file.write(json.dumps(asdict(trial)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write(tuning: Tuning, out: Path) -> None:
    write_json(out / RESULT, tuning.as_dict())
    (out / BEST).write_text(tuning.best_of(tuning.best_arm).to_toml())
    if len(tuning.arms) > 1:
        for arm in tuning.arms:
            (out / f"best-{arm.name}.toml").write_text(tuning.best_of(arm).to_toml())
    trials_plot(tuning, out / PLOT)
    shutil.rmtree(out / WORK, ignore_errors=True)


def trials_plot(tuning: Tuning, path: Path) -> None:
    """Score per trial and the best so far, one colour per arm; the dotted line is the settings as they are."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6))
    for number, arm in enumerate(tuning.arms):
        mine = [t for t in tuning.trials if t.arm == arm.name and t.score is not None]
        scores = [t.score or 0.0 for t in mine]
        best = [max(scores[: n + 1]) for n in range(len(scores))]
        colour = f"C{number}"
        axis.scatter([t.number for t in mine], scores, s=14, color=colour, alpha=0.6)
        axis.step([t.number for t in mine], best, where="post", color=colour, label=arm.name)
        axis.axhline(scores[0], color=colour, linestyle=":", linewidth=1)
    axis.set_xlabel("trial")
    axis.set_ylabel(f"validation ndcg@{tuning.k}")
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(trial: Trial, mine: Sequence[Trial], budget: Budget) -> str:
    """One trial as a line of progress."""
    best = max(t.score for t in mine if t.score is not None)
    of = f"/{budget.trials}" if budget.trials is not None else ""
    result = f"failed: {trial.error}" if trial.score is None else f"{trial.score:.4f} (best {best:.4f})"
    tried = "defaults" if trial.number == 0 else " ".join(f"{p}={_short(t)}" for p, t in trial.settings.items())
    return f"[{trial.arm} {trial.number + 1}{of}] {result}  {tried}  {trial.seconds:.1f} s"


def _short(text: str) -> str:
    """Numbers with four digits, all else as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text.strip('"')
