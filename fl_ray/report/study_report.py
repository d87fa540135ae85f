"""The report of a study: its trials as a table, and figures, from its folder alone."""

from __future__ import annotations

import csv
from pathlib import Path

import optuna

from fl_ray.report import page as html
from fl_ray.report.comparison_report import Table, markdown_table
from fl_ray.report.figures import save_svg
from fl_ray.report.study_figures import COSTS, front_figure, history_figure, importance_figure, parallel_figure
from fl_ray.studies.run_study import journal_of, study_wall_s
from fl_ray.studies.settings import Study
from fl_ray.studies.trials import Trial, all_trials, best_trials, finished_trials, shown, twin_of
from fl_ray.summary import mean_std

__all__ = ["study_report"]

_SHOWN = 10
_MOST_SETTINGS = 8  # that a table has columns for
_LEAST_FOR_IMPORTANCE = 5
_NOTE = (
    "Metrics are means over the seeds of a trial. A pruned trial has the values that it had when it was stopped. "
    "Rounds, time and energy to a target that was not reached count twice what the whole run costs. Wall seconds hold "
    "what went on beside the trial, too."
)


def study_report(study: Study, output: Path) -> Table:
    """Write trials.csv, study.md, figures and report.html into the study's folder; the table of its best trials."""
    trials = all_trials(output)
    _write_csv(trials, output / "trials.csv")
    ranked = best_trials(study.mode, study.metric, trials)
    if len(study.metric) == 1:
        sign = 1 if study.mode[0] == "min" else -1
        finished = finished_trials(study.metric, trials)
        ranked = sorted(finished, key=lambda trial: sign * trial.metrics[study.metric[0]])
    ranked = [trial for place, trial in enumerate(ranked) if twin_of(trial, ranked[:place]) is None]
    table = _table(study, ranked[:_SHOWN])
    (output / "study.md").write_text(markdown_table(*table), encoding="utf-8")
    title = "The Pareto front" if len(study.metric) > 1 else "The best trials"
    note = f'<p class="note">{_NOTE}</p>'
    sections = [html.section(title, html.table(*table), note), *_figures(study, trials, output)]
    if study.objective == "plan":
        from fl_ray.studies.direct_search import direct_searches

        columns, rows = direct_searches(study, trials, study_wall_s(output))
        (output / "direct.md").write_text(markdown_table(columns, rows), encoding="utf-8")
        sections.append(html.section("The same search without Ray Tune", html.table(columns, rows)))
    sections.append(html.section("All trials", html.table(*_table(study, trials))))
    counts = ", ".join(
        f"{sum(trial.state == state for trial in trials)} {state}"
        for state in ("finished", "pruned", "failed", "running")
        if any(trial.state == state for trial in trials)
    )
    seeds = " ".join(map(str, study.seeds))
    lead = f"{' and '.join(study.metric)} by {study.algorithm.name}; {len(trials)} trials: {counts}; seeds {seeds}"
    lead += f"; {study_wall_s(output):.0f} s of wall time"
    (output / "report.html").write_text(html.page(f"Study: {study.name}", lead, sections), encoding="utf-8")
    return table


def _table(study: Study, trials: list[Trial]) -> Table:
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    names = names if len(names) <= _MOST_SETTINGS else []
    also = [name for name in ("final_accuracy", "virtual_time_s", "energy_j") if name not in study.metric]
    also = also if study.objective == "run" else []
    columns = ["trial", *names, *study.metric, *also, "state", "wall [s]"]
    rows = []
    for trial in trials:
        row = [str(trial.number), *(shown(trial.params.get(name)) for name in names)]
        row += [_spread(trial, name) + _missed(trial, name) for name in study.metric]
        row += [shown(trial.metrics.get(name)) for name in also]
        state = trial.state if trial.error is None else f"failed: {trial.error[:80]}"
        rows.append([*row, state, f"{trial.wall_s:.1f}"])
    return columns, rows


def _spread(trial: Trial, name: str) -> str:
    """A metric's mean, and its sample standard deviation over several seeds."""
    each = [found[name] for found in trial.by_seed.values() if found.get(name) is not None]
    if len(each) < 2:
        return shown(trial.metrics.get(name))
    mean, std = mean_std(each)
    return f"{mean:.4g} ± {std:.2g}"


def _missed(trial: Trial, name: str) -> str:
    """How many of a trial's seeds did not reach the metric's target."""
    count = trial.misses(name)
    return f" (missed by {count} of {len(trial.by_seed)})" if count else ""


def _figures(study: Study, trials: list[Trial], output: Path) -> list[str]:
    finished = finished_trials(study.metric, trials)
    sections: list[str] = []
    if finished:
        values = {
            name: [trial.metrics.get(name) if trial.state == "finished" else None for trial in trials]
            for name in study.metric
        }
        drawn = save_svg(output, "history", history_figure(values, study.mode))
        caption = "Trials that came to their end, and the best so far."
        sections.append(html.section("History", html.figure(drawn, caption)))
    importances = _importances(study, output)
    if not importances:
        why = f"It needs {_LEAST_FOR_IMPORTANCE} finished trials that differ in settings and results."
        sections.append(html.section("Importance", f'<p class="note">{why}</p>'))
    else:
        drawn = save_svg(output, "importance", importance_figure(importances))
        caption = "Of the settings that every finished trial has; with few trials a rough estimate."
        sections.append(html.section("Importance", html.figure(drawn, caption)))
    if len(finished) > 1:
        space = study.search_space()
        logarithmic = {each.name for each in space.parameters if getattr(each.kind, "log", False)}
        params = [trial.params for trial in finished]
        for name in study.metric:
            found = [trial.metrics[name] for trial in finished]
            drawn = save_svg(output, f"parallel_{name}", parallel_figure(params, logarithmic, found, name))
            sections.append(html.section(f"Settings and {name}", html.figure(drawn, "A line is a finished trial.")))
    searched = [name for name, mode in zip(study.metric, study.mode, strict=True) if mode == "min"]
    costs = dict.fromkeys([*searched, *COSTS])
    priced = finished_trials(("final_accuracy", *costs), trials)
    if priced:
        fronts = {cost: best_trials(("max", "min"), ("final_accuracy", cost), priced) for cost in costs}
        numbers = {cost: [trial.number for trial in front] for cost, front in fronts.items()}
        drawn = save_svg(output, "front", front_figure({trial.number: trial.metrics for trial in priced}, numbers))
        caption = "Finished trials; numbered: those that no other one beats in both (the Pareto front)."
        sections.append(html.section("Accuracy, energy and time", html.figure(drawn, caption)))
    return sections


def _importances(study: Study, output: Path) -> dict[str, dict[str, float]]:
    """By metric, fANOVA's importance of each setting; empty where there are too few trials."""
    journal = journal_of(study, output)
    done = journal.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(done) < _LEAST_FOR_IMPORTANCE:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in done))
    varied = [name for name in done[0].params if name in shared and len({trial.params[name] for trial in done}) > 1]
    found = {}
    for place, name in enumerate(study.metric):
        if len({trial.values[place] for trial in done}) == 1 or not varied:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=study.seed)
        found[name] = optuna.importance.get_param_importances(
            journal, evaluator=evaluator, params=varied, target=lambda trial, place=place: trial.values[place]
        )
    return found


def _write_csv(trials: list[Trial], path: Path) -> None:
    params = list(dict.fromkeys(name for trial in trials for name in trial.params))
    metrics = list(dict.fromkeys(name for trial in trials for name in trial.metrics))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["trial", "state", *params, *metrics, "missed", "wall_s", "error"])
        for trial in trials:
            chosen = [trial.params.get(name) for name in params]
            found = [trial.metrics.get(name) for name in metrics]
            missed = " ".join(f"{name}:{count}" for name in trial.metrics if (count := trial.misses(name)))
            writer.writerow([trial.number, trial.state, *chosen, *found, missed, round(trial.wall_s, 2), trial.error])
