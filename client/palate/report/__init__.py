"""Reports of jobs and comparisons: one HTML file each, which loads nothing. Knows jobs and files, no command line.

gather   what a store says of a job: manifest, status, metrics, data, answers
charts   its curves, as figures of Plotly
page     both as one HTML document
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from palate_recipes.errors import ConfigurationError
from palate_recipes.text import expand_path, html_text

if TYPE_CHECKING:
    from palate.job import TrainingJob

_MOST_JOBS = 12
"""Jobs in one comparison. More curves in a chart cannot be told apart."""


@dataclass(frozen=True)
class Report:
    """A report as one HTML document. It contains everything that it shows, and makes no request.

    Attributes:
        title: Its heading.
        html: The document.
    """

    title: str
    html: str

    def save(self, path: str | Path) -> Path:
        """Writes the document and returns its path.

        Raises:
            ConfigurationError: The path is not valid, or is a folder.
        """
        try:
            target = Path(expand_path(path))
        except ValueError as error:
            raise ConfigurationError(f"the path of the report {error}") from None
        if target.is_dir():
            raise ConfigurationError(f"{target} is a folder: give the path of a file, such as {target}/report.html")
        target.write_text(self.html, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        # A frame of its own: the notebook's styles and scripts stay out, and the report's have no access to the notebook.
        return (
            f'<iframe sandbox="allow-scripts" title="{html_text(self.title)}" srcdoc="{html_text(self.html)}"'
            ' style="width:100%;height:800px;border:1px solid #ccc"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Report(title={self.title!r}, {len(self.html):,} characters)"


def make_report(jobs: Sequence[TrainingJob], *, answers: str | Path | None = None) -> Report:
    """Returns the report of a job, or the comparison of several.

    Args:
        jobs: One to twelve jobs, in any state.
        answers: A file with answers of several models to the same questions, such as the quickstart's `answers.json`.

    Raises:
        MissingDependencyError: Plotly is not installed.
        ConfigurationError: There are no jobs, too many, or one twice; or `answers` is not such a file.
        DamagedFilesError: A job's record is damaged.
    """
    from palate.report.charts import require_plotly
    from palate.report.gather import gather, read_answers
    from palate.report.page import render

    names = [job.uri for job in jobs]
    if not 1 <= len(names) <= _MOST_JOBS or len(set(names)) < len(names):
        raise ConfigurationError(
            f"a report needs 1 to {_MOST_JOBS} different jobs, got {len(names)}: {', '.join(names)[:500] or 'none'}"
        )
    require_plotly()  # before the data is read
    shared = None if answers is None else read_answers(Path(answers))
    title = f"job {jobs[0].id}" if len(jobs) == 1 else f"comparison of {len(jobs)} jobs"
    return Report(title=title, html=render(title, [gather(job) for job in jobs], shared))
