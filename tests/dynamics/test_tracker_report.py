"""The map: kinds by the ranks of two axes, as a table and a plot; and the tracker's benchmark."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import math

import pytest
import torch

from bench import tracker as bench_tracker
from bonus_ops import Scores, difficulty_scores
from bonus_ops.dynamics import DEFAULT_FIELDS, ExampleTracker, Mean, Report

NUM = 40
EPOCH_ONE = ("mean_el2n", "mean_margin", Mean("entropy", (1, 1)))


def scores(el2n: torch.Tensor, entropy: torch.Tensor) -> Scores:
    rest = torch.linspace(0.0, 1.0, len(el2n))
    return Scores(rest, el2n, -rest, entropy, rest, rest.to(torch.int32))


def tracked(seed: int = 0, unseen: int = 3) -> ExampleTracker:
    """Return a tracker whose two axes are two shuffles of 1 .. NUM; the last ``unseen`` were never observed."""
    random = torch.Generator().manual_seed(seed)
    el2n, entropy = (torch.randperm(NUM, generator=random).float() + 1 for _ in range(2))
    tracker = ExampleTracker(NUM, EPOCH_ONE)
    index = torch.arange(NUM)
    index[NUM - unseen :] = -1
    tracker.update(scores(el2n, entropy), index)
    tracker.end_epoch()
    tracker.el2n, tracker.entropy = el2n[: NUM - unseen], entropy[: NUM - unseen]
    return tracker


@pytest.mark.parametrize(("suspect", "uncertain"), [(0.15, 0.15), (0.1, 0.3), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("unseen", [0, 3])
def test_kinds_are_the_quarters_of_the_map(suspect, uncertain, unseen):
    tracker = tracked(unseen=unseen)
    report, seen = tracker.report(suspect=suspect, uncertain=uncertain), NUM - unseen
    by_el2n, by_entropy = sorted(tracker.el2n, reverse=True), sorted(tracker.entropy, reverse=True)
    for example in range(seen):
        high = tracker.el2n[example] in by_el2n[: int(suspect * seen)]
        odd = tracker.entropy[example] in by_entropy[: int(uncertain * seen)]
        expected = {(0, 0): "easy", (0, 1): "hard", (1, 0): "suspect_label", (1, 1): "suspect_input"}[high, odd]
        assert example in report.of_kind(expected).tolist()
    assert report.of_kind("unknown").tolist() == list(range(seen, NUM))
    assert len(report.suspects) == int(suspect * seen)
    assert report.columns["mean_el2n"][report.suspects].tolist() == [float(x) for x in by_el2n[: int(suspect * seen)]]
    assert sum(int(word) for word in str(report).replace(",", "").split()[::2]) == NUM


def test_ranks_do_not_move_with_the_scale():
    tracker = tracked()
    squeezed = ExampleTracker(NUM, EPOCH_ONE)
    index = torch.arange(NUM - 3)
    squeezed.update(scores((tracker.el2n / 1000).tanh(), tracker.entropy**3), index)
    squeezed.end_epoch()
    assert torch.equal(tracker.report().kind, squeezed.report().kind)


def test_equal_examples_stay_together_unflagged():
    tracker = ExampleTracker(NUM, EPOCH_ONE)
    tracker.update(scores(torch.ones(NUM), torch.ones(NUM)), torch.arange(NUM))
    assert (tracker.report().kind == 0).all() and len(tracker.report().suspects) == 0


def test_table_goes_to_csv_as_it_is(tmp_path):
    report = tracked().report()
    report.to_csv(tmp_path / "map.csv")
    with open(tmp_path / "map.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(NUM))
    assert list(rows[0]) == ["index", "kind", "mean_el2n", "mean_margin", "early_entropy"]
    for row in rows:
        index = int(row["index"])
        assert index in report.of_kind(row["kind"])
        for name, column in report.columns.items():
            assert row[name] == "" if column[index].isnan() else float(row[name]) == float(column[index])


def test_table_goes_to_pandas():
    pandas = pytest.importorskip("pandas")
    report = tracked().report()
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == NUM
    assert (frame["kind"] == "unknown").sum() == 3 and frame["mean_el2n"].isna().sum() == 3


def test_without_pandas_that_is_what_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        tracked().report().to_pandas()


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
def test_plot_marks_the_examples_to_look_at(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    marked, titles = [], []
    annotate, set_title = Axes.annotate, Axes.set_title
    monkeypatch.setattr(
        Axes, "annotate", lambda self, text, *a, **k: marked.append(text) or annotate(self, text, *a, **k)
    )
    monkeypatch.setattr(
        Axes, "set_title", lambda self, text, *a, **k: titles.append(text) or set_title(self, text, *a, **k)
    )
    with pytest.raises(TypeError, match="suspect must be a number, got str"):
        tracked().report(suspect="0.3")
    with pytest.raises(TypeError, match="shown must be an int, got float"):
        tracked().report().plot(tmp_path / "map.png", shown=1.5)
    report = tracked().report(suspect=0.3, uncertain=0.6)
    labels, inputs = report.of_kind("suspect_label"), report.of_kind("suspect_input")
    assert len(labels) > 3 and len(inputs) > 3
    expected = [str(i) for i in (*labels[:3].tolist(), *inputs[:3].tolist())]
    report.plot(tmp_path / "map.png", images=torch.rand(NUM, 4, 4), captions=["a"] * NUM, shown=3)
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert marked == expected and [title for title in titles if title] == [f"{i}: a" for i in expected]
    marked.clear()
    report.plot(tmp_path / "map.svg", shown=0)  # no images, nobody marked
    assert not marked and (tmp_path / "map.svg").exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tracked().report(suspect=1.5), r"suspect must be in \[0, 1\], got 1.5"),
        (lambda: tracked().report(uncertain=-0.1), r"uncertain must be in \[0, 1\], got -0.1"),
        (lambda: tracked().report(suspect=math.nan), "suspect must be in"),
        (lambda: tracked().report().of_kind("noisy"), "expected one of easy, hard, .*got 'noisy'"),
        (lambda: tracked().report().plot("never.png", shown=-1), "shown must be at least 0, got -1"),
        (lambda: ExampleTracker(3, "mean_el2n").report(), "needs the field early_entropy, kept are mean_el2n"),
        (lambda: ExampleTracker(3).report(), "no example has mean entropy in epochs 6 to 6: .* no update"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def short(epochs: int, ended: bool, label: bool = True, fields=DEFAULT_FIELDS) -> ExampleTracker:
    tracker, values = ExampleTracker(NUM, fields), scores(torch.rand(NUM), torch.rand(NUM))
    if not label:
        values = values._replace(**{name: torch.full((NUM,), math.nan) for name in ("loss", "el2n", "margin")})
    for _ in range(epochs):
        tracker.update(values, torch.arange(NUM))
        if ended:
            tracker.end_epoch()
    return tracker


CURE = r'fields=\("mean_el2n", Mean\("entropy", \(first, last\)\)\)'


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        (short(9, ended=False), r"all 9 updates are of epoch 1. Call tracker.end_epoch\(\) after every .*" + CURE),
        (short(3, ended=True), r"6 to 6: epochs 1 to 3 have ended, the epoch is 4. Train longer, .*" + CURE),
        (short(6, ended=True, label=False), "no example has mean el2n: it needs examples with a label"),
    ],
    ids=["no end_epoch", "short", "no labels"],
)
def test_a_report_of_too_little_says_what_to_do(tracker, message):
    with pytest.raises(ValueError, match=message):
        tracker.report()


def test_the_default_window_needs_six_epochs_and_the_cure_fewer():
    assert short(6, ended=False).epoch == 1
    assert short(6, ended=True).report().kind.shape == (NUM,)
    with pytest.raises(ValueError, match="Train longer"):
        short(5, ended=True).report()
    assert short(3, ended=True, fields=("mean_el2n", Mean("entropy", (2, 3)))).report().kind.shape == (NUM,)


def test_reprs_are_short():
    tracker = tracked()
    assert repr(tracker) == "ExampleTracker(40 examples; mean_el2n, mean_margin, early_entropy; epoch 2; cpu)"
    report = tracker.report()
    assert repr(report) == f"Report({report})" and "3 unknown" in repr(report)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize(
    ("shape", "numpy"),
    [((5, 6), True), ((1, 5, 6), False), ((3, 5, 6), True), ((4, 5, 6), False), ((5, 6, 3), False), ((5, 6, 1), True)],
    ids=str,
)
def test_images_may_have_their_channels_first(monkeypatch, shape, numpy):
    from matplotlib.axes import Axes

    images, shown = torch.rand(NUM, *shape, requires_grad=not numpy), []
    monkeypatch.setattr(Axes, "imshow", lambda self, image, **kwargs: shown.append(torch.as_tensor(image)))
    report = tracked().report(suspect=0.1)
    report.plot(images=images.numpy() if numpy else images)
    first = len(shape) == 3 and shape[0] < 5
    expected = images.detach().movedim(1, -1) if first else images.detach()
    marked = [*report.of_kind("suspect_label").tolist(), *report.of_kind("suspect_input").tolist()]
    assert len(shown) == len(marked) == 3
    assert all(torch.equal(image, expected[index]) for image, index in zip(shown, marked, strict=True))


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
@pytest.mark.parametrize("shape", [(36,), (2, 5, 6), (1, 3, 5, 6)], ids=str)
def test_images_of_another_shape_raise_and_write_nothing(tmp_path, shape):
    with pytest.raises(ValueError, match=r"images: expected each \[H, W\], .*got shape \[" + str(shape[0])):
        tracked().report().plot(tmp_path / "map.png", images=torch.rand(NUM, *shape))
    assert not (tmp_path / "map.png").exists()


def test_what_the_report_needs_is_kept_by_default():
    assert {"mean_el2n", "early_entropy"} <= set(DEFAULT_FIELDS)
    assert isinstance(tracked().report(), Report)


def test_a_report_of_columns_is_the_trackers():
    columns = tracked().report().columns
    assert str(Report.of(columns)) == str(tracked().report()) != str(Report.of(columns, suspect=0.5))
    with pytest.raises(ValueError, match="no example has early_entropy together"):
        Report.of(columns | {"early_entropy": columns["early_entropy"] * math.nan})


def test_the_benchmark_judges():
    slow = {name: {"ratios": {"all fields": {"median": value}}} for name, value in (
        ("beside a training step", 0.03), ("beside index_add_", 2.0)
    )}  # fmt: skip
    assert [each["passed"] for each in bench_tracker.verdicts(slow)] == [False, True]


# --- labels, figures, options -----------------------------------------------------------------------------------------


def voted(observations: list[tuple[list[list[float]], list[int]]], known: bool = True) -> ExampleTracker:
    """Return a tracker of what is a logit row an example and a label an example, epoch by epoch."""
    tracker = ExampleTracker(len(observations[0][1]), "all")
    for logits, target in observations:
        labels = torch.tensor(target)
        columns = difficulty_scores(torch.tensor(logits), labels)
        tracker.update(Scores(*columns, target=labels if known else None), torch.arange(len(target)))
        tracker.end_epoch()
    return tracker


def plain_votes(predictions: list[int], probs: list[dict[int, float]]) -> tuple[int, float]:
    """Return the candidate of a majority vote and the sum of its probability since it took over."""
    candidate, lead, total = -1, 0, 0.0
    for prediction, prob in zip(predictions, probs, strict=True):
        if candidate != prediction and lead == 0:
            candidate, total = prediction, 0.0
        lead += 1 if candidate == prediction else -1
        total += prob.get(candidate, 0.0)
    return candidate, total


def test_the_suggested_label_is_voted_by_the_predictions_and_its_confidence_is_a_mean():
    random, n, classes, epochs = torch.Generator().manual_seed(5), 40, 5, 9
    mean, given = 2 * torch.randn(n, classes, generator=random), torch.randint(classes, (n,), generator=random)
    seen = [mean + torch.randn(n, classes, generator=random) for _ in range(epochs)]
    labels = voted([(logits.tolist(), given.tolist()) for logits in seen]).labels()
    assert torch.equal(labels.given, given) and labels.suggested.dtype == torch.int64
    p = torch.stack(seen).double().softmax(2)
    torch.testing.assert_close(
        labels.given_confidence.double(), p[:, torch.arange(n), given].mean(0), rtol=1e-5, atol=0
    )
    majorities = 0
    for i in range(n):
        predictions, known = p[:, i].argmax(1).tolist(), []
        for row in p[:, i]:
            rest = row.clone()
            rest[given[i]] = -1
            known.append({k: float(row[k]) for k in (int(given[i]), int(rest.argmax()))})
        candidate, total = plain_votes(predictions, known)
        assert labels.suggested[i] == candidate
        assert math.isclose(labels.suggested_confidence[i], total / epochs, rel_tol=1e-5)
        for k in range(classes):
            if predictions.count(k) > epochs / 2:
                majorities += 1
                assert candidate == k
        assert labels.suggested_confidence[i] <= p[:, i, candidate].mean() + 1e-6
    assert n / 2 < majorities < n


def test_a_corrected_label_starts_its_confidence_anew():
    logits = [[2.0, 0.0, 0.0]]
    tracker = voted([(logits, [1]), (logits, [1]), (logits, [0])])
    p = torch.tensor(logits).softmax(1)[0]
    labels = tracker.labels()
    assert labels.given.tolist() == labels.suggested.tolist() == [0]
    torch.testing.assert_close(labels.given_confidence[0], p[0] / 3)


def test_without_a_target_no_label_is_given_and_none_suggested(tmp_path):
    tracker = voted([([[2.0, 0.0], [0.0, 1.0]], [0, 0])] * 6, known=False)
    labels = tracker.labels()
    assert labels.given.tolist() == labels.suggested.tolist() == [-1, -1]
    assert labels.given_confidence.isnan().all() and labels.suggested_confidence.isnan().all()
    tracker.report().to_csv(tmp_path / "map.csv")
    with open(tmp_path / "map.csv", newline="") as file:
        assert all(row["given_label"] == row["suggested_confidence"] == "" for row in csv.DictReader(file))
    with pytest.raises(ValueError, match="the field 'suggested_label' is not kept"):
        ExampleTracker(3, "mean_loss").labels()


def test_the_table_has_both_labels_and_the_confidence_in_each(tmp_path):
    tracker = voted([([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]], [0, 1])] * 6)
    tracker.report().to_csv(tmp_path / "map.csv")
    with open(tmp_path / "map.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["given_label", "suggested_label", "given_confidence", "suggested_confidence"]
    assert list(rows[0])[2:6] == names
    assert [(row["given_label"], row["suggested_label"]) for row in rows] == [("0", "0"), ("1", "2")]
    p = torch.tensor([0.0, 1.0, 3.0]).softmax(0)
    assert math.isclose(float(rows[1]["given_confidence"]), p[1], rel_tol=1e-5)
    assert math.isclose(float(rows[1]["suggested_confidence"]), p[2], rel_tol=1e-5)


def test_report_names_its_own_options_to_editors_and_in_errors():
    parameters = inspect.signature(ExampleTracker.report).parameters
    assert list(parameters) == ["self", "suspect", "uncertain"]
    assert inspect.signature(Report.of).parameters["suspect"].default == parameters["suspect"].default
    assert inspect.signature(Report.of).parameters["uncertain"].default == parameters["uncertain"].default
    with pytest.raises(TypeError, match="ExampleTracker.report.. got an unexpected keyword argument 'sus'"):
        tracked().report(sus=0.3)


needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


@needs_matplotlib
@pytest.mark.parametrize("images", [torch.rand(3, 4, 4), [torch.rand(4, 4)] * 3, {0: torch.rand(4, 4)}], ids=type)
def test_too_few_images_are_named_before_anything_is_written(images, tmp_path):
    with pytest.raises(
        ValueError, match=r"plot: images must be indexed by example, one for each of 40, got \d: none for \d+"
    ):
        tracked().report().plot(tmp_path / "map.png", images=images)
    with pytest.raises(ValueError, match=r"plot: captions must be indexed by example, one for each of 40, got 3: none"):
        tracked().report().plot(tmp_path / "map.png", images=torch.rand(NUM, 4, 4), captions="abc")
    with pytest.raises(ValueError, match=r"plot: images must be indexed by example, one for each of 40, got int: none"):
        tracked().report().plot(tmp_path / "map.png", images=3)
    assert not list(tmp_path.iterdir())


@needs_matplotlib
def test_without_a_path_the_figure_comes_back_and_nothing_is_registered(tmp_path, monkeypatch):
    import matplotlib.pyplot
    from matplotlib.figure import Figure

    monkeypatch.chdir(tmp_path)
    figure = tracked().report().plot()
    assert isinstance(figure, Figure) and not matplotlib.pyplot.get_fignums() and not list(tmp_path.iterdir())
    assert isinstance(tracked().report().plot(tmp_path / "map.pdf"), Figure) and (tmp_path / "map.pdf").exists()


@needs_matplotlib
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_marks_do_not_collide_and_are_as_near_as_can_be(spread):
    tracker = ExampleTracker(NUM, EPOCH_ONE)
    near = 1 + spread * torch.rand(NUM, generator=torch.Generator().manual_seed(1))
    near[20:] = torch.linspace(0, 0.5, 20)
    tracker.update(scores(near, near.flip(0)), torch.arange(NUM))
    tracker.end_epoch()
    figure = tracker.report(suspect=0.6, uncertain=0.3).plot(shown=10)
    marks = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [mark.get_window_extent().padded(1) for mark in marks]
    assert len(marks) >= 10
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(math.hypot(*mark.get_position()) <= 91 for mark in marks)


@needs_matplotlib
def test_marks_stay_inside_the_map_and_the_legend_hides_no_part_of_it():
    tracker = ExampleTracker(NUM, EPOCH_ONE)
    at_the_top = torch.arange(NUM) < 30  # the others in the opposite corner
    tracker.update(scores(at_the_top.float(), (~at_the_top).float()), torch.arange(NUM))
    tracker.end_epoch()
    figure = tracker.report(suspect=1.0, uncertain=0.25).plot(shown=10)
    inside = figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == 20 and not any(inside.overlaps(legend.get_window_extent()) for legend in figure.legends)
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    assert figure.axes[0].get_legend() is None


@needs_matplotlib
def test_an_image_tells_the_label_given_and_the_one_suggested():
    tracker = voted([([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]], [0, 1])] * 6)
    figure = tracker.report(suspect=1.0, uncertain=0.0).plot(images=torch.rand(2, 4, 4))
    assert {axes.get_title() for axes in figure.axes[1:]} == {"0", "1: 1, not 2?"}
