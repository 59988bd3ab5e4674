"""One round as report.json and as a page that stands alone: figures, plots, answers before and
after.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from contracts.artifact import write_text_durably
from instructloop import plots

Section = Mapping[str, Any]

_CSS = Path(__file__).with_name("report.css")


def write_report(report: Section, folder: Path) -> None:
    """Write `report.json` and `report.html` into `folder`. A section that the report lacks is left
    out of the page.

    Values that are no finite numbers become null: JSON has no word for them.
    """
    finite = _finite(report)
    write_text_durably(folder / "report.json", json.dumps(finite, indent=1, allow_nan=False) + "\n")
    write_text_durably(folder / "report.html", page(finite))


def page(report: Section) -> str:
    """The page. Every text that comes from the report is escaped."""
    body = "\n".join(section for render in _SECTIONS if (section := render(report)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Instructloop: one round</title>\n"
        f"<style>\n{_CSS.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(report: Section) -> str:
    facts = [f"seed {report['seed']}" if "seed" in report else "", str(report.get("created", ""))]
    seconds = sum(float(s.get("seconds") or 0) for s in report.get("stages", {}).values())
    facts.append(_duration(seconds) if seconds else "")
    facts += [
        f"{name.replace('_', ' ')} {value}" for name, value in report.get("machine", {}).items()
    ]
    line = " · ".join(escape(fact) for fact in facts if fact)
    return (
        '<header><p class="kicker">Instructloop</p><h1>One round of the loop</h1>'
        f'<p class="facts">{line}</p></header>'
    )


def _verdict(report: Section) -> str:
    gate, release = report.get("gate"), report.get("release", {})
    if not gate:
        return ""
    reasons = _list(gate.get("reasons", []))
    before, after = (
        f"<b>{escape(str(release.get(key) or '?'))}</b>" for key in ("before", "after")
    )
    if gate["passed"]:
        said = f"The gate let the new policy through: {after} took over from {before}."
        return f'<div class="verdict good"><p>{said}</p>{reasons}</div>'
    said = f"The gate refused the new policy; {before} stays."
    return f'<div class="verdict bad"><p>{said}</p>{reasons}</div>'


def _headlines(report: Section) -> str:
    tiles = [
        tile
        for make in (_policy_tiles, _reward_tiles, _swap_tiles, _consent_tiles)
        for tile in make(report)
    ]
    return (
        f'<section class="tiles" aria-label="Headline figures">{"".join(tiles)}</section>'
        if tiles
        else ""
    )


def _policy_tiles(report: Section) -> Iterable[str]:
    policy = report.get("policy", {})
    if "gold_win_rate" in policy:
        interval = policy.get("gold_win_rate_ci95")
        good = None if not _known(interval) else interval[0] > 0.55
        yield _tile(
            "Win rate, true taste", _percent(policy["gold_win_rate"]), _interval(interval), good
        )
    if "kl_to_sft" in policy:
        before, after = (policy.get(f"lm_loss_{when}") for when in ("before", "after"))
        loss = "" if before is None else f"LM loss {_number(before)} → {_number(after)}"
        yield _tile("KL to the SFT policy", _number(policy["kl_to_sft"]), loss)


def _reward_tiles(report: Section) -> Iterable[str]:
    model = report.get("reward_model", {})
    if "accuracy" in model:
        ceiling = model.get("ceiling")
        notes = [
            _interval(model.get("ci95")),
            f"ceiling {_percent(ceiling)}" if ceiling is not None else "",
            *_other_reward_models(model),
        ]
        good = (
            None
            if ceiling is None or model["accuracy"] is None
            else model["accuracy"] >= ceiling - 0.05
        )
        yield _tile(
            "Reward model accuracy",
            _percent(model["accuracy"]),
            ", ".join(filter(None, notes)),
            good,
        )


def _other_reward_models(model: Section) -> Iterable[str]:
    if "disagreement" in model:
        yield f"other seeds differ by {_number(model['disagreement'])}"
    found = [f["accuracy"] for f in model.get("folds", []) if f["accuracy"] is not None]
    if found:
        yield f"{_percent(sum(found) / len(found))} on new labelers in {len(found)} folds"
    for name, group in model.get("groups", {}).items():
        own = _percent(group["own_accuracy"])
        yield f"{_percent(group['accuracy'])} of {name}, {own} by a head of their own"


def _swap_tiles(report: Section) -> Iterable[str]:
    swap = report.get("swap", {})
    if "pause_ms" in swap:
        parts = [
            f"{name} {_number(swap[key])} ms"
            for name, key in (("staged", "stage_ms"), ("drained", "drain_ms"))
            if key in swap
        ]
        yield _tile("Pause of the swap", f"{_number(swap['pause_ms'])} ms", ", ".join(parts))
    if "requests_during" in swap:
        faults = {name: swap[name] for name in ("failed", "unstamped", "mixed") if name in swap}
        note = ", ".join(f"{count} {name}" for name, count in faults.items())
        yield _tile(
            "Requests around the swap", str(swap["requests_during"]), note, not any(faults.values())
        )


def _consent_tiles(report: Section) -> Iterable[str]:
    if "leaked_events" in (consent := report.get("consent", {})):
        yield _tile(
            "Events without consent",
            str(consent["leaked_events"]),
            "in the log",
            consent["leaked_events"] == 0,
        )


def _learning(report: Section) -> str:
    if not (rows := report.get("ppo")):
        return ""
    figures = [
        _figure(plots.iterations(rows, panels), caption)
        for panels, caption in (
            (plots.LEARNING, "Reward and distance from the SFT policy, iteration by iteration."),
            (plots.HEALTH, "Health of the training."),
        )
        if any(row.get(key) is not None for row in rows for key, _ in panels)
    ]
    return f"<section><h2>Learning</h2>{''.join(figures)}</section>"


def _quality(report: Section) -> str:
    policy = report.get("policy", {})
    bins = report.get("reward_model", {}).get("calibration", [])
    bins = _complete(bins, "predicted", "observed")
    rates = [
        (name, policy[key], tuple(policy[f"{key}_ci95"]))
        for name, key in (("true taste", "gold_win_rate"), ("reward model", "reward_win_rate"))
        if policy.get(key) is not None and _known(policy.get(f"{key}_ci95"))
    ]
    figures = ""
    if rates:
        figures += _figure(
            plots.win_rates(rates), "Win rate of the new release, with 95 % intervals."
        )
    if bins:
        figures += _figure(
            plots.calibration(bins), "Calibration of the reward model; larger dots hold more pairs."
        )
    return (
        f'<section><h2>How good</h2><div class="pair">{figures}</div></section>' if figures else ""
    )


def _by_use_case(report: Section) -> str:
    given = report.get("by_use_case", {})
    scores = {name: row for name, row in given.items() if _complete([row], "before", "after")}
    if not scores:
        return ""
    caption = "Mean score on held-out prompts, their number in brackets."
    return f"<section><h2>By use case</h2>{_figure(plots.use_cases(scores), caption)}</section>"


def _swap(report: Section) -> str:
    requests = _complete(report.get("swap", {}).get("latencies", []), "at", "seconds", "release")
    if not requests:
        return ""
    caption = "Each dot is a request; its colour is the release that answered it."
    return f"<section><h2>The swap</h2>{_figure(plots.latencies(requests), caption)}</section>"


def _samples(report: Section) -> str:
    if not (samples := report.get("samples")):
        return ""
    return f"<section><h2>Before and after</h2>{''.join(map(_sample, samples))}</section>"


def _sample(sample: Section) -> str:
    sides = "".join(
        f'<div class="{when}"><h4>{when.capitalize()}'
        f" <span>{_number(sample.get(f'{when}_score'))}</span></h4>"
        f"<pre>{escape(str(sample.get(when, '')))}</pre></div>"
        for when in ("before", "after")
    )
    use_case = escape(str(sample.get("use_case", "")).replace("_", " "))
    prompt = escape(str(sample.get("prompt", "")))
    return (
        f'<article class="sample"><h3>{use_case}</h3><pre class="prompt">{prompt}</pre>'
        f'<div class="pair">{sides}</div></article>'
    )


def _dataset(report: Section) -> str:
    dataset = report.get("dataset", {})
    rules = dataset.get("rules", [])
    sets = list(dict.fromkeys(name for rule in rules for name in rule.get("rows_in", {})))
    if not rules:
        return ""
    rows = [[rule["rule"], *(_kept(rule, name) for name in sets)] for rule in rules]
    total = _rows_left(dataset.get("rows", {}))
    table = _table(["rule", *sets], rows)
    return (
        f"<section><h2>Data set</h2><p>Rows into and out of each rule.</p>{table}{total}</section>"
    )


def _kept(rule: Section, name: str) -> str:
    given, left = rule["rows_in"].get(name), rule["rows_out"].get(name)
    return str(given) if given == left else f"{given} → {left}"


def _rows_left(rows: Section) -> str:
    """`rows` is set to split to count, or set to count."""
    if not rows:
        return ""
    counts = (
        f"{name}: "
        + (
            ", ".join(f"{n} {split}" for split, n in c.items())
            if isinstance(c, Mapping)
            else str(c)
        )
        for name, c in rows.items()
    )
    return f'<p class="facts">{escape("; ".join(counts))}</p>'


def _stages(report: Section) -> str:
    stages = {
        name: float(stage.get("seconds") or 0) for name, stage in report.get("stages", {}).items()
    }
    if not stages:
        return ""
    longest = max(stages.values()) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{_duration(seconds)}</td>'
        f'<td class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></td></tr>'
        for name, seconds in stages.items()
    )
    return f"<section><h2>Stages</h2><table class='stages'>{rows}</table></section>"


def _consent(report: Section) -> str:
    consent = report.get("consent", {})
    if "leaked_events" not in consent:
        return ""
    searched = ""
    if "markers_searched" in consent:
        searched = (
            f" {consent['markers_searched']:,} marked texts of people who had not agreed were"
            " searched for"
            f" in {consent.get('bytes_searched', 0):,} bytes."
        )
    found = f"{consent['leaked_events']} events of people who had not opted in.{searched}"
    return f"<section><h2>Consent</h2><p>{found}</p></section>"


_SECTIONS: tuple[Callable[[Section], str], ...] = (
    _head,
    _verdict,
    _headlines,
    _quality,
    _learning,
    _by_use_case,
    _swap,
    _samples,
    _dataset,
    _stages,
    _consent,
)


def _tile(name: str, value: str, note: str, good: bool | None = None) -> str:
    mark = {True: " good", False: " bad", None: ""}[good]
    return (
        f'<div class="tile{mark}"><h3>{escape(name)}</h3><p>{escape(value)}</p>'
        f"<small>{escape(note)}</small></div>"
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(items: Iterable[str]) -> str:
    points = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{points}</ul>" if points else ""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(bounds: Sequence[float | None] | None) -> str:
    return "" if not _known(bounds) else f"95 %: {_percent(bounds[0])} to {_percent(bounds[1])}"


def _known(bounds: Sequence[float | None] | None) -> TypeGuard[Sequence[float]]:
    return bounds is not None and None not in bounds


def _complete(rows: Iterable[Section], *keys: str) -> list[Section]:
    """The rows that have a value for each of `keys`: only they can be drawn."""
    return [row for row in rows if all(row.get(key) is not None for key in keys)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
