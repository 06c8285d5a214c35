"""Command line: measure, print, and write JSON, Markdown and pictures.

python -m bench                     what fits two minutes of every section, into bench/results/cpu-avx2-short.*
python -m bench --full              all of it, into bench/results/cpu-avx2.*, which the README quotes; avx2: of this CPU
python -m bench section ...         all of some sections: see SECTIONS
python -m bench report              the tables, the pictures and the README's again, from every JSON
python -m bench codegen             machine code of the kernels, compiled offline
python -m bench gpu                 everything that needs a GPU: tests, times, goals
python -m bench claims [name ...]   what the papers claim, with verdicts from the data
python -m bench lm [name ...]       a language model trained without its logits
"""

from __future__ import annotations

import sys

from . import accuracy, digits, host, linear, plots, report, sigmoid, soft, speed, tracker
from .command import RESULTS, Book, Picture, Section, main
from .measure import Effort
from .record import commit, instruction_set

SECTIONS = {
    "accuracy": Section("Accuracy", accuracy.run, report.accuracy, {"": Picture(plots.accuracy, 13, 7.5)}),
    "speed": Section("Speed and memory", speed.run, report.speed, {"": Picture(plots.speed, 13, 6)}),
    "soft": Section("Soft targets", soft.run, report.soft),
    "sigmoid": Section("Sigmoid family", sigmoid.run, report.sigmoid),
    "linear": Section("The last layer without its logits", linear.run, report.linear),
    "host": Section("Host time on a GPU, launches mocked", host.run, report.host),
    "tracker": Section("Example tracker", tracker.run, report.tracker),
    "digits": Section(
        "Digits", digits.run, report.digits,
        {"-margin": Picture(plots.margins, 7, 4.5), "-hardest": Picture(plots.hardest, 11, 5.4)},
    ),
}  # fmt: skip


BOOK = Book(
    "python -m bench", "Measure what bonus_ops costs and how exact it is.", "Benchmark results", SECTIONS,
    lambda: f"cpu-{instruction_set()}", report.opening, report.quote, Effort.SHORT,
)  # fmt: skip

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["codegen"]:
        from . import codegen

        codegen.main(arguments[1:], RESULTS, commit)
    elif arguments[:1] == ["gpu"]:
        from . import gpu

        gpu.main(arguments[1:], RESULTS, commit)
    elif arguments[:1] == ["claims"]:
        from . import claims

        main(claims.BOOK, arguments[1:])
    elif arguments[:1] == ["lm"]:
        from . import lm

        main(lm.BOOK, arguments[1:])
    else:
        main(BOOK, arguments)
