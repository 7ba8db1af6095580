"""Failure prediction: which answers to leave out, by what a method costs.

Two networks. A text classifier, five of them trained on the same news from other initial weights: every method is
measured on each, and the five together are the deep ensemble. EfficientNet-Lite0 on photographs, beside an ensemble of
the published Lite0, Lite1 and Lite2, three networks of different sizes. Quick mode leaves the photographs out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import results_file
from bench.paper.failure_subjects import Found, Pictures, Texts
from bench.paper.failures import ENSEMBLE, SOFTMAX, areas, curve, standing
from bench.paper.rows import Rows
from bench.paper.table import Options, Page, Table
from fastgrad.plots import COLOURS, new_axes

#: What the figure shows.
SHOWN = (SOFTMAX, "energy", "fastgrad, probabilities", "fastgrad, uncertainty", ENSEMBLE, "fastgrad, both")


def evaluate(subject: Texts | Pictures) -> Found:
    """Answers of every method on every case."""
    return subject.measure()


def write(options: Options, subjects: Sequence[Texts | Pictures], found: Sequence[Found]) -> Page:
    """Areas with intervals for each network and case, what they say, and the curves."""
    rows: Rows = []
    sections: list[tuple[str, str]] = [(INTRODUCTION, "")]
    for subject, own in zip(subjects, found, strict=True):
        sections.append((f"**{subject.name}.** {own.about}.", ""))
        for case, answers in own.answers.items():
            area = areas(answers, own.source[case])
            said = f"{case.capitalize()}, {len(own.source[case]):,} inputs. {verdict(area)}"
            lines = []
            for method, one in area.items():
                passes = own.passes.get(method, 1.0)
                row = {"case": f"{subject.name}, {case}", "method": method, "forward_passes": passes, **one}
                rows.append({key: _rounded(value) for key, value in row.items()})
                lines.append(
                    {
                        "method": method, "passes": f"{passes:.2f}", "errors": f"{one['errors']:.1%}",
                        "area": f"{1e3 * one['aurc']:.1f} {_range(one['interval'], '.1f')}",
                        "oracle": f"{1e3 * one['oracle']:.1f}",
                        "less softmax": "" if method == SOFTMAX else f"{1e3 * one['less softmax']:+.1f} "
                        f"{_range(one['interval of the difference'], '+.1f')} "
                        f"{standing(one['interval of the difference'])}",
                    }
                )  # fmt: skip
            sections.append((said, results_file.table(lines)))
    return Page(rows, sections, _figure(subjects, found))


INTRODUCTION = (
    "Area under the risk-coverage curve in thousandths, lower is better, with 95 % intervals from resampled inputs "
    "(corrupted copies of one input are drawn together). *oracle*: the area of an order by the errors themselves. "
    "*less softmax*: the difference, on the same resamples; *none* where its interval holds zero. *passes*: price in "
    "forward passes. *temperature* is pytorch-ood's, fitted on the calibration part; *fastgrad, probabilities* are "
    "`TwoStageModel`'s, which without an introspective classifier are a softmax with a temperature too, so that these "
    "two rows differ by how one number is fitted. *fastgrad, uncertainty* answers another question, how unusual the "
    "input is. *fastgrad, both*: Fisher's sum of the two p-values, fixed beforehand. An ensemble errs less often, "
    "which lowers its area too: its own oracle says by how much. Intervals are those of these networks, not of others "
    "trained anew, and not widened for the number of comparisons."
)


def verdict(area: Mapping[str, Mapping[str, Any]]) -> str:
    """What the differences say."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "none": []}
    for method, one in area.items():
        if method != SOFTMAX:
            groups[standing(one["interval of the difference"])].append(f"*{method}*")
    words = {
        "better": "Better than the softmax",
        "worse": "worse",
        "none": "no difference to it",
    }
    said = "; ".join(f"{words[name]}: {', '.join(own) or 'nothing'}" for name, own in groups.items())
    ours = [name for name in groups["better"] if "fastgrad" in name]
    return f"{said}." + ("" if ours else " This package adds nothing to the softmax here.")


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def _range(interval: Sequence[float], form: str) -> str:
    low, high = (format(1e3 * value, form) for value in interval)
    return f"[{low}, {high}]"


def _figure(subjects: Sequence[Texts | Pictures], found: Sequence[Found]) -> Any:
    first = new_axes(9.6, 3.1 * len(found))
    figure = first.get_figure(root=True)
    assert figure is not None
    first.remove()
    grid = figure.subplots(len(found), 3, squeeze=False)
    for line, subject, own in zip(grid, subjects, found, strict=True):
        for axes, (case, answers) in zip(line, own.answers.items(), strict=True):
            for colour, method in zip(COLOURS, SHOWN, strict=False):
                coverage, risk, best = curve(answers[method])
                axes.plot(coverage, risk, color=colour, lw=1.2, label=method)
                if method == SOFTMAX:
                    axes.plot(coverage, best, color="0.6", lw=1, ls="--", label="oracle")
            axes.set_title(f"{subject.name.split()[0]}, {case}", fontsize=9)
            axes.set(xlabel="coverage", ylabel="risk", xlim=(0, 1), ylim=(0, None))
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    return grid[0][0]


TABLE = Table(
    "failure",
    "Failure prediction",
    ("photographs",),
    lambda options: [Texts(options)] if options.quick else [Texts(options), Pictures(options)],
    evaluate,
    write,
)
